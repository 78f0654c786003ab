# SPDX-License-Identifier: Apache-2.0
"""The benchmark of estimates shows what was expected beside what was taken, by stage."""

import json
import re
from pathlib import Path

import pytest

import estimates

TINY = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": True,
}


def test_both_are_shown_by_stage(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setitem(estimates.SHAPES, "llama-3.2-1b", TINY)
    changes = "batch_size=2 learn.steps=2 search.rounds=3 recover.end_to_end.steps=2"
    words = "llama-3.2-1b --rows 12 --sequence-length 32 --method learned+end_to_end"
    out = tmp_path / "estimates.json"
    estimates.main(
        [
            *words.split(),
            "--set",
            *changes.split(),
            "--device",
            "cpu",
            "--out",
            str(out),
        ]
    )
    printed = capsys.readouterr().out
    stages = ["statistics", "search", "learn", "recover", "fold and prune", "save"]
    assert re.findall(r"^\| (\w[\w ]*) \| +\d", printed, re.M) == [*stages, "all"]
    assert "unfit" not in printed
    record = json.loads(out.read_text())
    assert set(record["expected"]) == set(record["taken"]) == set(stages)
    for name, (seconds, cpu, peak) in record["taken"].items():
        assert min(seconds, cpu, peak) >= 0, name
        assert record["expected"][name][2] > 0
