# SPDX-License-Identifier: Apache-2.0
"""``evaluate --dataset``: the same records give the same perplexity in every file."""

import json
from pathlib import Path

import datasets
import pytest
from commands import assert_one_error, nm_permute

from nm_permute_plugin.evaluation.data_sources import data_source


def test_a_data_set_is_measured(
    trained_checkpoint: Path,
    chain_rows,
    words,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    texts = [words(row) for row in chain_rows(20, 32, seed=55)]
    lines, table = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    lines.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    datasets.Dataset.from_dict({"story": texts, "text_id": range(20)}).to_parquet(table)
    named = ["--dataset", table, "--text-column", "story"]

    def evaluate(*more: object) -> str:
        options = ["--sequence-length", 32, "--device", "cpu"]
        result = nm_permute("evaluate", trained_checkpoint, *options, *more)
        assert result.exit_code == 0, result.output
        return result.stdout

    whole = evaluate("--text", lines)
    assert "(20 documents in windows of up to 32 tokens, 620 tokens predicted)" in whole
    assert evaluate(*named) == evaluate("--dataset", lines) == whole
    assert "(5 documents in " in evaluate(*named, "--samples", 5)
    weighted = ["--dataset", f"{lines}=3", "--device", "cpu"]
    refused = nm_permute("evaluate", trained_checkpoint, *weighted)
    assert_one_error(
        refused, "a.jsonl=3: a weight deals rows to calibrate on; .* leave"
    )


def test_what_is_measured_is_called_by_no_path(tmp_path: Path) -> None:
    assert data_source(str(tmp_path)).title == tmp_path.name
    assert data_source(f"{tmp_path}@test").title == f"{tmp_path.name}@test"
    assert data_source("org/name:en@test").title == "org/name:en@test"
