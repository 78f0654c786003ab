# SPDX-License-Identifier: Apache-2.0
"""``nm-permute report`` makes a page anew, and compares runs."""

from pathlib import Path

import pytest
from commands import assert_one_error, nm_permute, prune

from nm_permute_plugin.evaluation.results import (
    Evaluations,
    TextResult,
    write_evaluations,
)


@pytest.fixture
def out(ready: list[str], tmp_path: Path, text_file: Path, pages: None) -> Path:
    """A checkpoint that the command made."""
    done = prune(tmp_path, "--text", text_file, "--samples", 8)
    assert done.exit_code == 0, done.output
    assert f"report: {tmp_path / 'out' / 'nm_permute' / 'report.html'};" in done.stdout
    return tmp_path / "out"


def result(perplexity: float) -> TextResult:
    return TextResult(
        text="t.txt", form="windows of 8 tokens", tokens=8, perplexity=perplexity
    )


def test_a_page_is_made_anew_and_runs_are_compared(out: Path, tmp_path: Path) -> None:
    page = out / "nm_permute" / "report.html"
    assert "123.45" not in page.read_text()
    write_evaluations(out, Evaluations(texts=(result(123.45),)))
    done = nm_permute("report", out)
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(page)
    assert "123.45" in page.read_text()
    assert nm_permute("verify", out).exit_code == 0

    several = tmp_path / "several.html"
    for _ in range(2):  # one of ours is written over
        done = nm_permute("report", out, out, "--out", several)
        assert done.exit_code == 0, done.output
    assert several.read_text().count("123.45") == 2
    done = nm_permute("report", out, "--out", tmp_path / "one.html")
    assert done.exit_code == 0, done.output
    assert "nm-permute verify out" in (tmp_path / "one.html").read_text()

    assert_one_error(nm_permute("report", out, out), r"give --out FILE")
    mine = tmp_path / "mine.html"
    mine.write_text("my notes")
    refused = nm_permute("report", out, out, "--out", mine)
    assert_one_error(refused, r"mine\.html exists and is no report")
    assert mine.read_text() == "my notes"
    refused = nm_permute("report", out, "--out", tmp_path / "no" / "page.html")
    assert_one_error(refused, r"no does not exist")
    (out / "nm_permute" / "evaluations.json").write_text('{"texts": [{}]}')
    assert_one_error(nm_permute("report", out), r"evaluations\.json is damaged")
    (out / "nm_permute" / "report.json").write_text('{"history": ')
    assert_one_error(nm_permute("report", out), r"report\.json: is no JSON")
    assert "123.45" in page.read_text()


def test_what_is_no_checkpoint_is_refused(tiny_checkpoint, tmp_path: Path) -> None:
    dense = tiny_checkpoint()
    assert_one_error(nm_permute("report", dense), r"report\.json does not exist")
    assert_one_error(nm_permute("report", tmp_path / "none"), r"none is no folder")
