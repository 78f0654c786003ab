# SPDX-License-Identifier: Apache-2.0
"""A long loop says once, after its first steps, how much is left."""

from collections.abc import Iterator

import pytest
from loguru import logger

from nm_permute_plugin.pruning.data import split_text
from nm_permute_plugin.pruning.run import prune
from nm_permute_plugin.pruning.running.forecast import TIMED, WARM_UPS, Forecast
from nm_permute_plugin.pruning.settings import Settings


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What is logged meanwhile."""
    said: list[str] = []
    sink = logger.add(lambda message: said.append(message.record["message"]))
    yield said
    logger.remove(sink)


def test_it_is_said_once_with_what_is_left(lines: list[str]) -> None:
    forecast = Forecast("learning", steps=20, validations=3, of_validation=60.0)
    for _ in range(WARM_UPS + TIMED - 1):
        forecast.step()
    assert lines == []
    for _ in range(10):
        forecast.step()
    (line,) = lines
    left = 20 - WARM_UPS - TIMED
    assert line.startswith("About 3.0 minutes more for learning: ")
    assert f"{left} steps of 0.0 s, 3 validations of 60 s" in line


def test_what_is_behind_a_run_that_goes_on_is_not_said(lines: list[str]) -> None:
    recover = {"stages": ["end_to_end"], "end_to_end": {"steps": 40}}
    settings = Settings(learn={"steps": 100}, recover=recover)
    for done, left in ((0, "140 steps, 7"), (70, "70 steps, 4"), (110, "30 steps, 2")):
        lines.clear()
        forecast = Forecast.of_training(settings, done, of_validation=60.0)
        for _ in range(WARM_UPS + TIMED):
            forecast.step()
        steps, validations = left.split(", ")
        assert f"{int(steps.split()[0]) - WARM_UPS - TIMED} steps of" in lines[0]
        assert f"{validations} validations of 60 s" in lines[0]


def test_a_run_says_what_it_does_then_how_long_it_will_take(
    tiny_model, chain_rows, lines: list[str]
) -> None:
    recover = {"stages": ["end_to_end"], "end_to_end": {"steps": 7}}
    settings = Settings(batch_size=4, learn={"steps": 6}, recover=recover)
    data = split_text(list(chain_rows(12, 32, seed=1)), 4, 0.1, 0)
    prune(tiny_model("llama"), data, settings)
    said = "\n".join(lines)
    plan = said.index("2:4 in 14 linears")
    changed = said.index("batch_size: 4; learn.steps: 6; recover.stages")
    steps = [line for line in lines if line.startswith("About ")]
    assert plan < changed < said.index(steps[0])
    assert "for learning and the recovery end_to_end: 8 steps" in steps[0]
    assert "for the recovery end_to_end: 2 steps" in steps[1]
