# SPDX-License-Identifier: Apache-2.0
"""Every question of the diagnosis, on a tiny trained model."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import diagnosis
from methods import Change, prunable, settings_of
from nm_permute_plugin.pruning.data import Data, split_text
from nm_permute_plugin.pruning.pipeline import permute_and_prune
from nm_permute_plugin.specs.architectures import head_dim_of, spec_of
from nm_permute_plugin.specs.spec import resolve
from subject import Started, load
from swaps import Swaps

SHARE = 0.2


@pytest.fixture
def ask(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    """A factory: the cells of the table that answers a question."""

    def answer(question: str, *options: str) -> list[list[str]]:
        sizes = [
            "--validation-share",
            str(SHARE),
            "--every",
            "2",
            "--search-rounds",
            "3",
        ]
        diagnosis.main([question, *arguments, *sizes, *options])
        lines = capsys.readouterr().out.strip().splitlines()
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
        assert set(map(len, rows)) == {len(rows[0])}
        return [rows[0], *rows[2:]]

    return answer


@pytest.fixture
def data(chain_rows) -> Data:
    return split_text(list(chain_rows(24, 32, seed=999)), 4, SHARE, 0)


@pytest.fixture
def subject(trained_checkpoint: Path, data: Data) -> Started:
    settings = settings_of("multipliers")  # no search
    return load(trained_checkpoint, data, settings, "cpu", torch.float32)


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


def test_noise_of_soft_places_is_refused(ask) -> None:
    with pytest.raises(ValueError, match="learn.stages names soft"):
        ask("noise", "--batches", "2", "--set", "learned.learn.stages=soft")


def test_hardening_shows_both_permutations(ask) -> None:
    temperature = "amd.learn.published.temperature=[1.0, 0.01]"
    options = ["--steps", "4", "--search-rounds", "0"]
    head, *rows = ask("hardening", *options, "--set", temperature)
    assert head == ["step", "temperature", "soft", "hardened"]
    assert [row[1] for row in rows] == ["1.000", "0.215", "0.010"]
    soft, hard = (float(cell) for cell in rows[-1][2:])
    assert abs(soft - hard) < abs(float(rows[0][2]) - float(rows[0][3]))


def test_transfer_shows_every_text(ask, text_file) -> None:
    other = text_file("other", 1001)
    head, *rows = ask("transfer", "--steps", "4", "--other", other)
    assert head[1:4] == ["trained on", "validation", "other"]
    assert rows[0][4:] == ["0.0%"] * 3


def test_swaps_change_the_loss_as_the_masks_do(subject: Started) -> None:
    first, second = subject.problem.data.train[:2]
    swaps = Swaps(subject, "hidden.0", (first, second))
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


def test_swaps_stay_inside_their_segments(subject: Started) -> None:
    first, second = subject.problem.data.train[:2]
    swaps = Swaps(subject, "value.0", (first, second))
    segment = subject.problem.spaces["value.0"].space.segment
    for pairs in swaps.random(8, 2, torch.Generator().manual_seed(0)):
        assert all(first // segment == second // segment for first, second in pairs)


def test_diagnosis_starts_where_learning_does(
    trained_checkpoint: Path, data: Data
) -> None:
    changes = [Change.parse(f"all.validation.share={SHARE}")]
    settings = settings_of("search", changes)
    started = load(trained_checkpoint, data, settings, "cpu", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        trained_checkpoint, dtype=torch.float32
    )
    linears = prunable(model)
    resolved = resolve(
        model, spec_of(model), settings.pattern, linears, head_dim_of(model.config)
    )
    record = permute_and_prune(model.eval(), resolved, linears, data, settings)
    assert record.perms.keys() == started.start.perms.keys()
    for name, perm in record.perms.items():
        assert torch.equal(perm, started.start.perms[name])
    loss = started.loss(started.start, data.validation)
    assert loss == record.history[-1]["validation"]
    assert loss < record.history[0]["validation"]
    sensitivity = started.problem.spaces["residual"].sensitivity
    assert sensitivity is not None
    assert sensitivity.std() > 0


def test_every_validation_is_shown_with_its_temperature(ask) -> None:
    options = ["--steps", "10", "--every", "4", "--search-rounds", "0"]
    _, *rows = ask("hardening", *options)
    assert [row[0] for row in rows] == ["0", "4", "8", "10"]
    tenth = 0.1 ** (1 / 9)
    expected = [1, tenth**3, tenth**7, 0.1]
    assert [float(row[1]) for row in rows] == pytest.approx(expected, abs=1e-3)
