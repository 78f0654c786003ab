# SPDX-License-Identifier: Apache-2.0
"""Learning layer by layer: never worse, and one layer in memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from learning import as_it_is
from torch import nn
from transformers import AutoModelForCausalLM

from nm_permute_plugin.maths.permutation import check_permutation
from nm_permute_plugin.pruning.data import Data, split_text
from nm_permute_plugin.pruning.learn.layerwise import learn_layerwise
from nm_permute_plugin.pruning.pipeline import permute_and_prune
from nm_permute_plugin.pruning.problem import Problem, Solution
from nm_permute_plugin.pruning.settings import LearnStage, Settings

STEPS = 4
"""Of each stage."""


def fast(*stages: str, steps: int = STEPS) -> Settings:
    """Few steps of the stages, at high rates."""
    groups: dict[str, dict[str, object]] = {
        "multipliers": {"multipliers": {"rate": 0.05}},
        "swaps": {"swaps": {"block_size": 16}},
        "soft": {"published": {"block_size": 16, "rate": 0.1}},
        "straight_through": {"published": {"block_size": 16, "rate": 0.1}},
    }
    learn: dict[str, object] = {"stages": stages, "steps": steps}
    for stage in stages:
        learn |= groups[stage]
    return Settings(objective="layer_wise", learn=learn, validation={"every": 2})


BOTH = fast("swaps", "multipliers")


@pytest.fixture
def text(chain_rows) -> Data:
    return split_text(list(chain_rows(20, 24, seed=1)), 4, 0.2, seed=0)


@pytest.fixture
def trained(trained_checkpoint) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(trained_checkpoint)


def linears(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]


def size_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture
def problem(trained, make_problem, text: Data) -> Problem:
    return make_problem(trained, text)


def test_a_planted_permutation_is_approached(
    tiny_model, make_problem, chain_rows, generator: torch.Generator
) -> None:
    model = tiny_model("llama")
    text = split_text(list(chain_rows(60, 32, seed=1)), 4, 0.2, seed=0)
    down = model.model.layers[1].mlp.down_proj.weight
    ranks = torch.rand(*down.shape, generator=generator).unflatten(1, (-1, 4))
    kept = (ranks.argsort(-1).argsort(-1) < 2).flatten(1)
    with torch.no_grad():
        down.mul_(torch.where(kept, 1.5, 0.01))
    problem = make_problem(model, text, ["hidden.1"])
    scrambled = Solution({"hidden.1": torch.randperm(48, generator=generator)})
    swaps = {"stages": ["swaps"], "steps": 150, "swaps": {"block_size": 48}}
    settings = Settings(objective="layer_wise", learn=swaps, validation={"every": 5})
    found, _ = learn_layerwise(problem, scrambled, settings)
    before = problem.validate(scrambled)
    assert problem.validate(as_it_is(problem)) < 0.05 * before
    assert problem.validate(found) < 0.75 * before


@pytest.mark.parametrize("stage", ["swaps", "straight_through", "soft"])
def test_a_trained_model_loses_less_than_at_the_start(
    problem: Problem, stage: LearnStage
) -> None:
    start = as_it_is(problem)
    stages = ("swaps", "multipliers") if stage == "swaps" else (stage,)
    settings = fast(*stages, steps=20 // len(stages))
    found, history = learn_layerwise(problem, start, settings)
    before, after = problem.validate(start), problem.validate(found)
    assert history == [
        {"step": 0, "validation": pytest.approx(before, rel=1e-5)},
        {"step": 20, "validation": pytest.approx(after, rel=1e-5)},
    ]
    assert after < before
    for name, perm in found.perms.items():
        check_permutation(perm)
        segment = problem.spaces[name].space.segment
        assert torch.equal(perm // segment, torch.arange(len(perm)) // segment)
    moved = [n for n, f in found.multipliers.items() if bool((f != 1).any())]
    assert set(found.multipliers) <= set(problem.linears)
    assert bool(moved) == ("multipliers" in stages)


def test_a_better_layer_that_worsens_the_whole_is_not_kept(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The errors of layers are a proxy: the loss of the whole has the last word."""
    losses = iter([1.0, 2.0])
    monkeypatch.setattr(Problem, "validate", lambda *rest: next(losses))
    start = as_it_is(problem)
    found, history = learn_layerwise(problem, start, BOTH)
    assert [entry["validation"] for entry in history] == [1.0, 2.0]
    assert found is start


@pytest.mark.parametrize("stage", ["swaps", "multipliers", "soft", "straight_through"])
def test_the_stages_of_a_layer_are_learned_inside_of_it(
    problem: Problem, resolve_model, legal_perms, stage: LearnStage, newest_is_best
) -> None:
    """A permutation that layers share stays; what reads it may choose its channels."""
    start = Solution(legal_perms(resolve_model(problem.model)))
    found, _ = learn_layerwise(problem, start, fast(stage, steps=8))
    assert torch.equal(found.perms["residual"], start.perms["residual"])
    changed = {n for n, p in start.perms.items() if not torch.equal(found.perms[n], p)}
    moves = stage != "multipliers"
    assert changed <= set(start.perms) - {"residual"}
    assert bool(changed) == moves
    assert bool(found.multipliers) != moves


def test_a_permutation_that_layers_share_stays_and_its_consumers_choose(
    problem: Problem, resolve_model, legal_perms
) -> None:
    start = Solution(legal_perms(resolve_model(problem.model)))
    found, _ = learn_layerwise(problem, start, BOTH)
    changed = {n for n, p in start.perms.items() if not torch.equal(found.perms[n], p)}
    assert changed == set(start.perms) - {"residual"}
    consumers = problem.spaces["residual"].space.consumers
    factors = [found.multipliers[consumer.name] for consumer in consumers]
    assert all(bool((of != 1).any()) for of in factors)


def test_a_layer_with_shared_permutations_alone_has_nothing_to_swap(
    trained, make_problem, text: Data
) -> None:
    problem = make_problem(trained, text, ["residual"])
    start = as_it_is(problem)
    found, history = learn_layerwise(problem, start, fast("swaps"))
    assert torch.equal(found.perms["residual"], start.perms["residual"])
    assert history[0]["validation"] == history[1]["validation"]
    found, history = learn_layerwise(problem, start, BOTH)
    assert history[1]["validation"] < history[0]["validation"]


def test_the_same_seed_gives_the_same_solution(problem: Problem) -> None:
    (first, history), (again, same_history) = (
        learn_layerwise(problem, as_it_is(problem), BOTH) for _ in range(2)
    )
    assert history == same_history
    assert_same(first, again)


def assert_same(first: Solution, second: Solution) -> None:
    assert first.multipliers.keys() == second.multipliers.keys()
    for name, perm in first.perms.items():
        assert torch.equal(perm, second.perms[name])
    for name, factors in first.multipliers.items():
        assert torch.equal(factors, second.multipliers[name])


def test_masks_of_other_linears_stay_on_and_weights_are_left_alone(
    trained, problem: Problem, make_problem, text: Data
) -> None:
    (consumer,) = problem.spaces["value.0"].space.consumers
    fixed = {consumer.name: trained.get_submodule(consumer.name).weight.detach().abs()}
    names = set(problem.spaces) - {"value.0"}
    with_fixed = replace(make_problem(trained, text, names), fixed=fixed)
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    found, history = learn_layerwise(with_fixed, as_it_is(with_fixed), BOTH)
    last = history[-1]["validation"]
    assert last == pytest.approx(with_fixed.validate(found), rel=1e-5)
    assert last != pytest.approx(make_problem(trained, text, names).validate(found))
    after = trained.state_dict()
    assert [n for n, t in before.items() if not torch.equal(after[n], t)] == []
    assert all(p.requires_grad and p.grad is None for p in trained.parameters())
    assert [m for m in trained.modules() if "forward" in m.__dict__] == []


def test_only_one_layer_runs_with_gradients(trained, problem: Problem) -> None:
    runs: list[int] = []
    for index, layer in enumerate(trained.model.layers):
        layer.register_forward_hook(
            lambda module, inputs, out, index=index: (
                runs.append(index) if out.requires_grad else None
            )
        )
    learn_layerwise(problem, as_it_is(problem), BOTH)
    assert runs == [0] * 2 * STEPS + [1] * 2 * STEPS


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_a_layer_at_a_time_is_held_and_the_solution_is_the_same(
    trained, problem: Problem, offload_to, tmp_path: Path, place: str
) -> None:
    offload = pytest.importorskip("compressed_tensors.offload")
    start = as_it_is(problem)
    expected, history = learn_layerwise(problem, start, BOTH)
    sizes = [size_of(trained.model.embed_tokens) + size_of(trained.model.layers[0])] * 2
    offload_to(trained, place, tmp_path)
    held: list[int] = []

    @contextmanager
    def hold() -> Iterator[None]:
        with offload.disable_offloading():
            yield
            kept = offload.OffloadCache.keep_onloaded_values
            held.append(sum(weight.numel() for weight in kept.values()))

    found, same_history = learn_layerwise(problem, start, BOTH, hold)
    assert held == sizes
    assert history == same_history
    assert_same(found, expected)


def test_the_whole_way_goes_layer_by_layer(
    trained, resolve_model, text: Data, assert_exactly
) -> None:
    resolved = resolve_model(trained)
    record = permute_and_prune(trained, resolved, linears(trained), text, BOTH)
    assert_exactly(trained)
    assert record.fold_error < 1e-5
    assert [entry["step"] for entry in record.history] == [0, 2 * STEPS]


def test_a_model_without_layers_is_refused_before_the_search(
    trained, resolve_model, text: Data
) -> None:
    names = [*linears(trained), "lm_head"]
    resolved = resolve_model(trained, names)
    with pytest.raises(ValueError, match="lm_head stands outside of model.layers: add"):
        permute_and_prune(trained, resolved, names, text, BOTH)
