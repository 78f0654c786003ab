# SPDX-License-Identifier: Apache-2.0
"""The record tells what the masks of every linear keep and change."""

import json
from dataclasses import asdict

import pytest
import torch
from whole_runs import linears

from nm_permute_plugin.maths.masks import nm_mask
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.scores import score_weight
from nm_permute_plugin.pruning.figures import figures_of
from nm_permute_plugin.pruning.problem import Solution

TWO_OF_FOUR = NMPattern(2, 4)
MULTIPLIERS = {"steps": 3, "multipliers": {"rate": 0.3}}


def magnitudes(model, name: str):
    return score_weight("magnitude", model.get_submodule(name).weight.detach(), None)


def test_the_figures_are_those_of_masks_and_weights(tiny_model, go) -> None:
    model, dense = tiny_model("llama"), tiny_model("llama")
    record = go(model, method="search", score="magnitude")
    assert [linear.name for linear in record.figures.linears] == linears(dense)
    kept = total = 0.0
    for figures in record.figures.linears:
        score = magnitudes(dense, figures.name)
        plain = nm_mask(score, TWO_OF_FOUR)
        assert figures.weights == score.numel()
        assert figures.score == pytest.approx(float(score.sum()), rel=1e-5)
        share = float(score[plain].sum() / score.sum())
        assert figures.before == pytest.approx(share, rel=1e-5)
        # What is left of the pruned weight is what its mask keeps, wherever it moved.
        left = float(magnitudes(model, figures.name).sum())
        assert figures.after == pytest.approx(left / figures.score, rel=1e-5)
        assert 0 <= figures.exchanged < 1
        assert figures.cost_after < figures.score
        kept, total = kept + left, total + float(score.sum())
    assert any(figures.exchanged > 0 for figures in record.figures.linears)
    assert record.retained[1] == pytest.approx(kept / total, rel=1e-5)
    assert record.retained[1] > record.retained[0]
    json.dumps(asdict(record.figures))


def test_the_cost_weighs_every_output(make_problem, tiny_model) -> None:
    """Rows that cost nothing are left out, whatever they lose."""
    from dataclasses import replace

    problem = make_problem(tiny_model("llama"), names=["hidden.0"])
    (name, of), *_ = problem.spaces.items()
    sensitivity = torch.zeros(len(of.score))
    sensitivity[3] = 2.0
    weighed = replace(problem, spaces={name: replace(of, sensitivity=sensitivity)})
    masks = weighed.masks(Solution())
    (found,) = figures_of(weighed, Solution(), masks, weighed.linears).linears
    lost = of.score[3].masked_fill(nm_mask(of.score, TWO_OF_FOUR)[3], 0).sum()
    assert found.cost_before == found.cost_after == pytest.approx(2 * float(lost), 1e-5)
    assert found.exchanged == 0
    (unknown,) = figures_of(problem, Solution(), masks, problem.linears).linears
    assert unknown.cost_before is None


def test_the_crop_is_the_corner_of_a_mask(tiny_model, go) -> None:
    model, dense = tiny_model("llama"), tiny_model("llama")
    record = go(model, method="search", score="magnitude")
    crop = record.figures.crop
    perm = record.perms[crop.space]
    assert crop.channels == perm[: len(crop.channels)].tolist()
    assert crop.channels != list(range(len(crop.channels)))
    for rows in (crop.before, crop.after):
        assert {row[i : i + 4].count("1") for row in rows for i in range(0, 32, 4)} == {
            2
        }
    plain = nm_mask(magnitudes(dense, crop.name), TWO_OF_FOUR)
    bits = ["".join("01"[bit] for bit in row) for row in plain[:32, :64].tolist()]
    if "o_proj" not in crop.name:  # whose heads are put one below the other
        assert crop.before == bits
        moved = plain[:32, perm[:64]].tolist()
        assert crop.was == ["".join("01"[bit] for bit in row) for row in moved]


def test_without_a_permutation_nothing_is_exchanged(tiny_model, go) -> None:
    figures = go(tiny_model("llama"), method="identity").figures
    assert figures.crop is None
    assert {linear.exchanged for linear in figures.linears} == {0}
    assert all(linear.before == linear.after for linear in figures.linears)
    assert all(linear.cost_before is None for linear in figures.linears)


def test_learned_masks_keep_other_weights(tiny_model, go) -> None:
    record = go(tiny_model("llama"), method="learned", learn=MULTIPLIERS)
    assert any(linear.exchanged > 0 for linear in record.figures.linears)
    assert [entry["round"] for entry in record.searched][0] == 0
    assert [entry["step"] for entry in record.history] == [0, 1, 2, 3]
    rates = [entry["rate"] for entry in record.history[1:]]
    assert rates[0] == pytest.approx(0.3)
    assert rates == sorted(rates, reverse=True)


def test_every_stage_has_its_memory(tiny_model, go) -> None:
    record = go(tiny_model("llama"))
    assert record.memory.keys() == record.seconds.keys()
    assert all(2**20 < held < 2**40 for held in record.memory.values())
    assert record.environment["device"] == "cpu"
    assert record.environment["dtype"] == "float32"
    assert record.environment["threads"] == torch.get_num_threads()
