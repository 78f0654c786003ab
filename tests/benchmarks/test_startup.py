# SPDX-License-Identifier: Apache-2.0
"""What a first start's benchmark says of its choices."""

import pytest

import startup


def choice(tokens: int, chosen: float, fastest: float, dense: float) -> dict:
    return {
        "dtype": "bf16",
        "shape": "(32, 64)",
        "tokens": tokens,
        "chosen_microseconds": chosen,
        "fastest_microseconds": fastest,
        "dense_microseconds": dense,
    }


def test_the_summary_tells_seconds_and_the_worst_choice(
    capsys: pytest.CaptureFixture[str],
) -> None:
    starts = [{"dtype": "bf16", "seconds": 12.34}]
    choices = [choice(1, 10, 10, 20), choice(4, 12, 10, 11.5), choice(8, 10, 10, 10)]
    startup.summarize({"starts": starts, "choices": choices})
    assert capsys.readouterr().out.splitlines() == [
        "bf16: first start 12.3 s",
        "3 choices over the fastest: mean 1.0667, median 1.0000, worst 1.200 "
        "(bf16 (32, 64), 4 tokens); over dense: worst 1.043",
    ]


def test_without_a_card_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "isolated", lambda *arguments: [])
    with pytest.raises(SystemExit, match="--startup needs a CUDA device"):
        startup.main(["bf16"], None)
