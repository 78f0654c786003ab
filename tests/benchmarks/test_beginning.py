# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the token that begins a text."""

import pytest

import beginning


def test_both_kinds_of_rows_are_measured_on_both_kinds_of_windows(
    arguments: list[str], text_file, capsys: pytest.CaptureFixture[str]
) -> None:
    test = ["--test", text_file("test", 1000), "--window", "32", "--steps", "2"]
    share = ["--validation-share", "0.1"]
    beginning.main([*arguments, *test, *share, "--begin", "<eos>"])
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[3:]]
    named = [(row[0], row[1]) for row in rows]
    both = ("without", "with")
    expected = [(method, name) for method in ("wanda", "learned") for name in both]
    assert named == [("dense", ""), *expected]
    dense, wanda = ([float(value) for value in row[2:4]] for row in rows[:2])
    assert dense[0] != dense[1]  # the windows differ
    assert wanda[1] > dense[1]
    assert rows[1][4] == "0.0%"


def test_a_beginning_of_several_tokens_is_refused(
    arguments: list[str], text_file
) -> None:
    test = ["--test", text_file("test", 1000), "--window", "32"]
    with pytest.raises(ValueError, match="--begin 'a b' is 2 tokens"):
        beginning.main([*arguments, *test, "--begin", "a b"])
