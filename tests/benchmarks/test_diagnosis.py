# SPDX-License-Identifier: Apache-2.0
"""Every question of the diagnosis, on a tiny trained model."""

from pathlib import Path

import pytest
import torch

import diagnosis
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.pruning.learn.loop import LearnSettings
from nm_permute_plugin.pruning.learn.order_shape import OrderShape
from nm_permute_plugin.pruning.learn.orders import LearnableOrders
from nm_permute_plugin.pruning.running.loss import LossWeights
from nm_permute_plugin.pruning.text import split_text
from subject import Started, learn, load
from swaps import Swaps

SETTINGS = LearnSettings(steps=10, shape=OrderShape(block_size=16), evaluate_every=4)


@pytest.fixture
def ask(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    """A factory: the cells of the table that answers a question."""

    def answer(question: str, *options: str) -> list[list[str]]:
        sizes = ["--validation", "0.2", "--every", "2", "--search-rounds", "3"]
        diagnosis.main([question, *arguments, *sizes, *options])
        lines = capsys.readouterr().out.strip().splitlines()
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
        assert set(map(len, rows)) == {len(rows[0])}
        return [rows[0], *rows[2:]]

    return answer


@pytest.fixture
def subject(trained_checkpoint: Path, chain_rows) -> Started:
    text = split_text(list(chain_rows(24, 32, seed=999)), 4, 0.2, 0)
    return load(trained_checkpoint, text, NMPattern(2, 4), 0, 0, "cpu", torch.float32)


def test_noise_falls_with_the_batches_averaged(ask) -> None:
    head, *rows = ask("noise", "--batches", "4", "--dtype", "float32")
    families = ["residual", "hidden", "value"]
    assert set(head[2:]) == {*families, *(f"{x} multipliers" for x in families)}
    assert [row[:2] for row in rows] == [["1", "128"], ["2", "256"]]
    one, two = ([float(cell) for cell in row[2:]] for row in rows)
    assert sum(two) > sum(one) > 0


def test_linearisation_compares_foretold_with_true(ask) -> None:
    options = ["--together", "1", "2", "--tries", "6"]
    head, *rows = ask("linearisation", *options)
    assert len(rows) == 3 * 2 * 2
    assert [row[1] for row in rows[:4]] == ["1 random", "1 best", "2 random", "2 best"]
    assert {row[2] for row in rows} == {"6"}
    foretold = {row[1]: float(row[3]) for row in rows if row[0] == "residual"}
    assert foretold["2 best"] < foretold["1 best"] < 0


def test_hardening_shows_both_orders(ask) -> None:
    head, *rows = ask(
        "hardening", "--steps", "4", "--set", "amd.temperature=(1.0,0.01)"
    )
    assert head == ["step", "temperature", "soft", "hardened"]
    assert [row[1] for row in rows] == ["1.000", "0.215", "0.010"]
    soft, hard = (float(cell) for cell in rows[-1][2:])
    assert abs(soft - hard) < abs(float(rows[0][2]) - float(rows[0][3]))


def test_transfer_shows_every_text(ask, text_file) -> None:
    other = text_file("other", 1001)
    head, *rows = ask("transfer", "--steps", "4", "--other", other)
    assert head[1:4] == ["trained on", "held back", "other"]
    assert rows[0][4:] == ["0.0%"] * 3


def test_swaps_change_the_loss_as_the_masks_do(subject: Started) -> None:
    batches = (subject.samples.train[0], subject.samples.train[1])
    swaps = Swaps(subject, "hidden.0", batches, LossWeights())
    generator = torch.Generator().manual_seed(0)
    for pairs in (*swaps.random(4, 1, generator), *swaps.best(2, 3)):
        groups = [place // 4 for pair in pairs for place in pair]
        assert len(set(groups)) == len(groups)
        tried = swaps.try_out(pairs)
        assert tried.costs == pytest.approx(
            sum(float(swaps.foretold[pair]) for pair in pairs)
        )
    nothing = swaps.try_out([])
    assert nothing.true == nothing.linear == nothing.elsewhere == 0


def test_swaps_stay_inside_their_walls(subject: Started) -> None:
    batches = (subject.samples.train[0], subject.samples.train[1])
    swaps = Swaps(subject, "value.0", batches, LossWeights())
    segment = subject.stacks["value.0"].space.segment
    for pairs in swaps.random(8, 2, torch.Generator().manual_seed(0)):
        assert all(first // segment == second // segment for first, second in pairs)


def test_every_look_is_watched_with_its_step_and_temperature(subject: Started) -> None:
    seen: list[tuple[int, float, float]] = []

    def watch(step: int, temperature: float, orders: LearnableOrders) -> None:
        validation = subject.samples.validation
        loss = subject.loss(orders, validation, SETTINGS.loss)
        seen.append((step, temperature, loss))

    learned = learn(subject, SETTINGS, watch)
    steps, temperatures, losses = zip(*seen, strict=True)
    looks = learned.history
    assert list(steps) == [look["step"] for look in looks] == [0, 4, 8, 10]
    assert losses == pytest.approx([look["validation"] for look in looks], rel=1e-4)
    assert temperatures[0] == SETTINGS.temperature[0]
    expected = [look["temperature"] for look in looks[1:]]
    assert list(temperatures[1:]) == pytest.approx(expected)
    assert min(losses[1:]) < losses[0]
