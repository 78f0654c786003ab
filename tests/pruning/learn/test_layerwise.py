# SPDX-License-Identifier: Apache-2.0
"""Orders learned layer by layer: found where planted, never worse, one layer in memory."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from nm_permute_plugin.maths.masks import nm_mask
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import check_permutation
from nm_permute_plugin.pruning.learn.layerwise import Hold, learn_layer_wise, part_of
from nm_permute_plugin.pruning.learn.loop import LearnSettings
from nm_permute_plugin.pruning.learn.order_shape import OrderShape
from nm_permute_plugin.pruning.pipeline import OrderSettings, permute_and_prune
from nm_permute_plugin.pruning.problem import Learned, Subject
from nm_permute_plugin.pruning.samples import Samples
from nm_permute_plugin.pruning.stacking import StackedScore
from nm_permute_plugin.pruning.text import split_text

TWO_OF_FOUR = NMPattern(2, 4)
FAST = LearnSettings(
    steps=8,
    evaluate_every=2,
    order_share=0.5,
    learning_rate=0.1,
    shape=OrderShape(block_size=16, multipliers=True),
)


@pytest.fixture
def text(chain_rows) -> Samples:
    return split_text(list(chain_rows(20, 24, seed=1)), 4, validation=0.2, seed=0)


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


def stacks_of(model: nn.Module, resolve_model) -> dict[str, StackedScore]:
    scores = {n: model.get_submodule(n).weight.detach().abs() for n in linears(model)}
    spaces = resolve_model(model).spaces
    return {name: StackedScore.of(space, scores) for name, space in spaces.items()}


def as_they_are(stacks: dict[str, StackedScore]) -> dict[str, Tensor]:
    return {name: torch.arange(stack.space.size) for name, stack in stacks.items()}


def learn(
    model: nn.Module,
    stacks: dict[str, StackedScore],
    text: Samples,
    settings: LearnSettings = FAST,
    start: dict[str, Tensor] | None = None,
    others: dict[str, Tensor] | None = None,
    hold: Hold = nullcontext,
) -> Learned:
    subject = Subject(model, stacks, others or {}, text, TWO_OF_FOUR)
    return learn_layer_wise(subject, start or as_they_are(stacks), settings, hold)


def loss_of(
    model: nn.Module,
    stacks: dict[str, StackedScore],
    learned: Learned,
    text: Samples,
    others: dict[str, Tensor] | None = None,
) -> float:
    subject = Subject(model, stacks, others or {}, text, TWO_OF_FOUR)
    return subject.validation_loss(learned, FAST.loss)


def test_a_planted_order_is_approached(
    tiny_model, resolve_model, chain_rows, generator: torch.Generator
) -> None:
    model = tiny_model("llama")
    text = split_text(list(chain_rows(60, 32, seed=1)), 4, validation=0.2, seed=0)
    down = model.model.layers[1].mlp.down_proj.weight
    ranks = torch.rand(*down.shape, generator=generator).unflatten(1, (-1, 4))
    kept = (ranks.argsort(-1).argsort(-1) < 2).flatten(1)
    with torch.no_grad():
        down.mul_(torch.where(kept, 1.5, 0.01))
    stacks = {"hidden.1": stacks_of(model, resolve_model)["hidden.1"]}
    scrambled = {"hidden.1": torch.randperm(48, generator=generator)}
    settings = LearnSettings(steps=150, evaluate_every=5, shape=OrderShape(48))
    learned = learn(model, stacks, text, settings, start=scrambled)
    best = loss_of(model, stacks, Learned(as_they_are(stacks)), text)
    before = loss_of(model, stacks, Learned(scrambled), text)
    after = loss_of(model, stacks, learned, text)
    assert best < 0.05 * before
    assert after < 0.75 * before


@pytest.mark.parametrize("relaxation", ["insertion", "straight_through", "soft"])
def test_a_trained_model_loses_less_than_at_the_start(
    trained, resolve_model, text: Samples, relaxation: str
) -> None:
    stacks = stacks_of(trained, resolve_model)
    multipliers = relaxation == "insertion"
    shape = replace(FAST.shape, relaxation=relaxation, multipliers=multipliers)
    learned = learn(trained, stacks, text, replace(FAST, steps=20, shape=shape))
    before = loss_of(trained, stacks, Learned(as_they_are(stacks)), text)
    after = loss_of(trained, stacks, learned, text)
    assert [look["validation"] for look in learned.history] == [
        pytest.approx(before, rel=1e-5),
        pytest.approx(after, rel=1e-5),
    ]
    assert after < before
    for name, perm in learned.perms.items():
        check_permutation(perm)
        segment = stacks[name].space.segment
        assert torch.equal(perm // segment, torch.arange(len(perm)) // segment)
    assert learned.multipliers.keys() == set(linears(trained))
    moved = [n for n, f in learned.multipliers.items() if bool((f != 1).any())]
    assert bool(moved) == multipliers


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["multipliers", "orders"])
def test_steps_that_spoil_everything_leave_the_start(
    trained, resolve_model, text: Samples, share: float
) -> None:
    stacks = stacks_of(trained, resolve_model)
    wild = replace(FAST, steps=1, order_share=share, swaps=1.0, multiplier_rate=50.0)
    learned = learn(trained, stacks, text, wild)
    before = loss_of(trained, stacks, Learned(as_they_are(stacks)), text)
    assert loss_of(trained, stacks, learned, text) <= before * (1 + 1e-6)


def test_a_better_layer_that_worsens_the_whole_is_not_kept(
    trained, resolve_model, text: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The errors of layers are a proxy: the loss of the whole has the last word."""
    stacks = stacks_of(trained, resolve_model)
    losses = iter([1.0, 2.0])
    monkeypatch.setattr(
        "nm_permute_plugin.pruning.problem.mean_loss", lambda *rest: next(losses)
    )
    learned = learn(trained, stacks, text)
    assert [look["validation"] for look in learned.history] == [1.0, 2.0]
    assert learned.multipliers == {}
    for name, perm in as_they_are(stacks).items():
        assert torch.equal(learned.perms[name], perm)


def test_an_order_that_layers_share_stays_and_its_readers_choose(
    trained, resolve_model, text: Samples, legal_perms
) -> None:
    stacks = stacks_of(trained, resolve_model)
    start = legal_perms(resolve_model(trained))
    learned = learn(trained, stacks, text, start=start)
    assert torch.equal(learned.perms["residual"], start["residual"])
    changed = {n for n in start if not torch.equal(learned.perms[n], start[n])}
    assert changed == set(start) - {"residual"}
    consumers = [consumer.name for consumer in stacks["residual"].space.consumers]
    assert all(bool((learned.multipliers[name] != 1).any()) for name in consumers)


def test_the_same_seed_gives_the_same_orders(
    trained, resolve_model, text: Samples
) -> None:
    stacks = stacks_of(trained, resolve_model)
    first, again = (learn(trained, stacks, text) for _ in range(2))
    assert first.history == again.history
    for name, perm in first.perms.items():
        assert torch.equal(perm, again.perms[name])
    for name, factors in first.multipliers.items():
        assert torch.equal(factors, again.multipliers[name])


def test_masks_of_other_linears_stay_on_and_weights_are_left_alone(
    trained, resolve_model, text: Samples
) -> None:
    stacks = stacks_of(trained, resolve_model)
    value = stacks.pop("value.0").space.consumers[0].name
    others = {value: nm_mask(trained.get_submodule(value).weight.abs(), TWO_OF_FOUR)}
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    learned = learn(trained, stacks, text, others=others)
    assert learned.history[-1]["validation"] == pytest.approx(
        loss_of(trained, stacks, learned, text, others), rel=1e-5
    )
    after = trained.state_dict()
    assert [n for n, t in before.items() if not torch.equal(after[n], t)] == []
    assert all(p.requires_grad and p.grad is None for p in trained.parameters())
    assert [m for m in trained.modules() if "forward" in m.__dict__] == []


def test_only_one_layer_runs_with_gradients(
    trained, resolve_model, text: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacks = stacks_of(trained, resolve_model)
    runs: list[int] = []
    for index, layer in enumerate(trained.model.layers):
        layer.register_forward_hook(
            lambda module, inputs, out, index=index: (
                runs.append(index) if out.requires_grad else None
            )
        )
    learn(trained, stacks, text)
    assert runs == [0] * FAST.steps + [1] * FAST.steps


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_a_layer_at_a_time_is_held_and_the_orders_are_the_same(
    trained, resolve_model, text: Samples, offload_to, tmp_path: Path, place: str
) -> None:
    offload = pytest.importorskip("compressed_tensors.offload")
    stacks = stacks_of(trained, resolve_model)
    expected = learn(trained, stacks, text)
    sizes = [size_of(trained.model.embed_tokens) + size_of(trained.model.layers[0])] * 2
    offload_to(trained, place, tmp_path)
    held: list[int] = []

    @contextmanager
    def hold() -> Iterator[None]:
        with offload.disable_offloading():
            yield
            kept = offload.OffloadCache.keep_onloaded_values
            held.append(sum(weight.numel() for weight in kept.values()))

    found = learn(trained, stacks, text, hold=hold)
    assert held == sizes
    assert found.history == expected.history
    for name, perm in expected.perms.items():
        assert torch.equal(found.perms[name], perm)
    for name, factors in expected.multipliers.items():
        assert torch.equal(found.multipliers[name], factors)


def test_a_part_of_a_space_holds_the_rows_of_its_readers(
    trained, resolve_model
) -> None:
    stacks = stacks_of(trained, resolve_model)
    part = part_of(stacks["residual"], "model.layers.1.")
    names = [consumer.name for consumer in part.space.consumers]
    assert names == [
        n
        for n in linears(trained)
        if "layers.1" in n and n[-6:] not in ("o_proj", "n_proj")
    ]
    expected = torch.cat([trained.get_submodule(n).weight.abs() for n in names])
    assert torch.equal(part.score, expected)
    assert part_of(stacks["hidden.0"], "model.layers.1.") is None
    assert part_of(stacks["hidden.0"], "model.layers.0.") is stacks["hidden.0"]


def test_the_whole_way_goes_layer_by_layer(
    trained, resolve_model, text: Samples, assert_exactly
) -> None:
    settings = OrderSettings(TWO_OF_FOUR, learn=FAST, objective="layer_wise")
    resolved = resolve_model(trained)
    record = permute_and_prune(trained, resolved, linears(trained), text, settings)
    assert_exactly(trained)
    assert record.fold_error < 1e-5
    assert [look["step"] for look in record.history] == [0, FAST.steps]


def test_a_model_without_layers_is_refused_before_the_search(
    trained, resolve_model, text: Samples
) -> None:
    settings = OrderSettings(TWO_OF_FOUR, learn=FAST, objective="layer_wise")
    names = [*linears(trained), "lm_head"]
    resolved = resolve_model(trained, names)
    with pytest.raises(ValueError, match="lm_head stands outside of model.layers: add"):
        permute_and_prune(trained, resolved, names, text, settings)
