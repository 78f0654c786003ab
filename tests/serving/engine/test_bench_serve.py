# SPDX-License-Identifier: Apache-2.0
"""``bench-serve`` on the real engine, tiny; whatever is wrong is one clear line."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nm_permute_plugin.checkpoint.config import SparsityConfig, with_sparsity_config
from nm_permute_plugin.cli.app import app


@pytest.fixture
def sparse_config(tmp_path: Path) -> Path:
    """A folder whose ``config.json`` says that it is 2:4."""
    config = with_sparsity_config({}, SparsityConfig())
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def error_of(*words: object) -> str:
    result = CliRunner().invoke(app, ["bench-serve", *map(str, words)])
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    return result.stderr


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    assert "config.json" in error_of(tmp_path)


def test_a_checkpoint_that_is_not_sparse_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "does not say that it is 2:4" in error_of(tmp_path)


@pytest.mark.parametrize(
    ("text", "told"), [("{", "is not JSON"), ("[1]", "is no JSON object")]
)
def test_arguments_of_the_engine_are_a_json_object(
    tmp_path: Path, text: str, told: str
) -> None:
    assert told in error_of(tmp_path, "--engine", text)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_the_way_to_it_is_named(sparse_config: Path) -> None:
    assert "pip install '.[vllm]'" in error_of(sparse_config)


def test_a_mode_that_leaves_nothing_to_compare_is_refused(
    sparse_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NM_PERMUTE_SERVE", "dense")
    assert "NM_PERMUTE_SERVE is dense" in error_of(sparse_config)


@pytest.mark.slow
def test_both_sides_are_timed_in_one_run(pruned, run_engine) -> None:
    path = pruned("int8", "sparse-24-bitmask")
    words = "--batch 1 --batch 2 --prompt-tokens 16 --output-tokens 4 --repeats 1"
    done = run_engine(
        "nm_permute.py",
        "bench-serve",
        path,
        *words.split(),
        "--enforce-eager",
        "--engine",
        '{"max_num_batched_tokens": 64}',
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [
        row.split(" | ")
        for row in re.findall(r"^\| (\w+ \| \d.*) \|$", done.stdout, re.M)
    ]
    assert [row[:2] for row in rows] == [
        ["prefill", "1"],
        ["decode", "1"],
        ["prefill", "2"],
        ["decode", "2"],
    ]
    for row in rows:
        sparse, dense, *_, ratio = map(float, row[2:])
        assert ratio == pytest.approx(sparse / dense, rel=0.05)
    assert "both sides were served dense" in done.stdout
