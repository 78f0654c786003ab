# SPDX-License-Identifier: Apache-2.0
"""A sparse checkpoint whose config forgot it is refused, and never random weights."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_files import MakeDense, assert_same_tensors, tensors_of
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers import auto

from nm_permute_plugin.checkpoint import checksums
from nm_permute_plugin.checkpoint.transformers_reader import register_reader
from nm_permute_plugin.checkpoint.transformers_refusal import register_refusal
from nm_permute_plugin.checkpoint.verify import verify
from nm_permute_plugin.checkpoint.writer import convert


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    mappings = auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING
    before = [dict(mapping) for mapping in mappings]
    register_reader()
    register_refusal()
    yield
    for mapping, old in zip(mappings, before, strict=True):
        mapping.update(old)


def strip(config: dict) -> None:
    """Takes the whole block away."""
    del config["quantization_config"]


def rename(config: dict) -> None:
    """Calls the block by its old name."""
    config["compression_config"] = config.pop("quantization_config")


def empty(config: dict) -> None:
    """Keeps the quantization and forgets the sparsity, as llm-compressor writes it."""
    config["quantization_config"]["sparsity_config"] = {}


DAMAGES = [("bf16", strip), ("bf16", rename), ("fp8", strip), ("fp8", rename)]
DAMAGES = [*DAMAGES, ("fp8", empty), ("int8", empty)]


@pytest.fixture(params=DAMAGES, ids=lambda case: f"{case[0]} {case[1].__name__}")
def damaged(request, make_dense: MakeDense) -> tuple[Path, Path]:
    """A dense checkpoint, and a sparse one whose config.json forgot that it is."""
    kind, damage = request.param
    dense = make_dense(kind)
    sparse = dense.parent / "sparse"
    convert(dense, sparse, "sparse-24-bitmask")
    config = json.loads((sparse / "config.json").read_text())
    damage(config)
    (sparse / "config.json").write_text(json.dumps(config))
    (sparse / checksums.FILE).unlink()  # the names alone have to tell
    return dense, sparse


def test_it_is_never_read_as_random_weights(damaged: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="stored sparse, and config.json does not say"):
        AutoModelForCausalLM.from_pretrained(damaged[1])


def test_it_is_a_fault(damaged: tuple[Path, Path]) -> None:
    report = verify(damaged[1])
    assert not report.good
    # A line for what config.json forgot, and none for every matrix.
    assert {fault.file for fault in report.faults} == {"config.json"}
    assert len(report.faults) <= 2
    said = " ".join(fault.message for fault in report.faults)
    stored = "matrices that are stored as sparse-24-bitmask: take the config.json"
    assert stored in said or "call it quantization_config" in said


def test_it_is_converted_by_its_tensors_or_refused(damaged: tuple[Path, Path]) -> None:
    dense, sparse = damaged
    target = dense.parent / "back"
    config = json.loads((sparse / "config.json").read_text())
    if torch.float8_e4m3fn in {t.dtype for t in tensors_of(dense).values()} and not (
        {"quantization_config", "compression_config"} & set(config)
    ):
        with pytest.raises(ValueError, match="says nothing of quantization, and model"):
            convert(sparse, target, "dense")
        assert not target.exists()
        return
    convert(sparse, target, "dense")
    assert_same_tensors(tensors_of(target), tensors_of(dense))
    assert verify(target).good
    convert(sparse, sparse, "sparse-24-bitmask")
    assert verify(sparse).good


def test_registering_twice_changes_nothing() -> None:
    before = PreTrainedModel._load_pretrained_model
    register_refusal()
    assert PreTrainedModel._load_pretrained_model is before


@pytest.mark.slow
@pytest.mark.parametrize(
    "before",
    [
        "import nm_permute_plugin",
        "import transformers.modeling_utils, nm_permute_plugin",
    ],
    ids=["plugin first", "transformers first"],
)
def test_the_import_alone_is_enough(make_dense: MakeDense, before: str) -> None:
    dense = make_dense()
    sparse = dense.parent / "sparse"
    convert(dense, sparse, "sparse-24-bitmask")
    config = json.loads((sparse / "config.json").read_text())
    strip(config)
    (sparse / "config.json").write_text(json.dumps(config))
    script = (
        f"{before}\nfrom transformers import AutoModelForCausalLM as Auto\n"
        f"Auto.from_pretrained({str(dense)!r})\nprint('dense is read')\n"
        f"Auto.from_pretrained({str(sparse)!r})\nprint('sparse is read')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == ["dense is read"], done.stderr
    assert "is stored sparse, and config.json does not say" in done.stderr
