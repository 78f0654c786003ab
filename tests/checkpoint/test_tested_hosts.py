# SPDX-License-Identifier: Apache-2.0
"""The tested versions of the hosts are those that pip installs; others are named."""

import importlib.metadata
import tomllib
import warnings
from pathlib import Path

import pytest
from checkpoint_files import MakeDense
from packaging.requirements import Requirement

from nm_permute_plugin.checkpoint import tested_hosts
from nm_permute_plugin.checkpoint.tested_hosts import TESTED, requirement
from nm_permute_plugin.checkpoint.writer import convert

ROOT = Path(__file__).parents[2]


def test_pip_installs_what_was_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = project["optional-dependencies"].values()
    asked = [Requirement(one) for extra in lists for one in extra]
    pinned = {one.name: one.specifier for one in asked if one.name in TESTED}
    assert pinned == {name: Requirement(requirement(name)).specifier for name in TESTED}


@pytest.mark.parametrize("host", ["transformers", "compressed-tensors"])
def test_reading_beside_another_version_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, make_dense: MakeDense, tmp_path: Path, host: str
) -> None:
    from transformers import AutoConfig
    from transformers.quantizers import auto

    from nm_permute_plugin.checkpoint.transformers_reader import register_reader

    register_reader()
    convert(make_dense("fp8"), tmp_path / "sparse", "sparse-24-bitmask")
    block, stock = (
        AutoConfig.from_pretrained(path).quantization_config
        for path in (tmp_path / "sparse", make_dense("fp8"))
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of the installed versions nothing is said
        auto.AutoQuantizationConfig.from_dict(block)
    # A stand-in for a version that is yet to come.
    real = importlib.metadata.version
    monkeypatch.setattr(
        tested_hosts, "version", lambda name: "6.1.0" if name == host else real(name)
    )
    with pytest.warns(UserWarning, match=f"{host} 6.1.0.*pip install '{host}>="):
        auto.AutoQuantizationConfig.from_dict(block)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        auto.AutoQuantizationConfig.from_dict(stock)
