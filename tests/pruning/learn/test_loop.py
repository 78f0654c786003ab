# SPDX-License-Identifier: Apache-2.0
"""Learning never loses on validation text, repeats itself, and touches no weight."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import get_args

import pytest
import torch
from helpers import same_groups
from torch import Tensor, nn

from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import check_permutation, from_blocks
from nm_permute_plugin.pruning.learn.loop import LearnSettings, frozen, learn_orders
from nm_permute_plugin.pruning.learn.order_shape import OrderShape, Relaxation
from nm_permute_plugin.pruning.learn.orders import LearnableOrders
from nm_permute_plugin.pruning.problem import Learned, Subject, mean_loss
from nm_permute_plugin.pruning.running.loss import LossWeights
from nm_permute_plugin.pruning.samples import Samples
from nm_permute_plugin.pruning.stacking import StackedScore

RELAXATIONS = get_args(Relaxation)
TWO_OF_FOUR = NMPattern(2, 4)
FAST = LearnSettings(
    steps=4, evaluate_every=2, learning_rate=0.1, shape=OrderShape(block_size=16)
)


@dataclass
class Task:
    """A tiny model, the scores of its spaces, an order to start from, and text."""

    model: nn.Module
    stacks: dict[str, StackedScore]
    start: dict[str, Tensor]
    train: list[dict[str, Tensor]]
    validation: list[dict[str, Tensor]]

    def learn(
        self,
        settings: LearnSettings,
        others: dict[str, Tensor] | None = None,
        **changes,
    ) -> Learned:
        samples = replace(Samples(self.train, self.validation), **changes)
        subject = Subject(self.model, self.stacks, others or {}, samples, TWO_OF_FOUR)
        return learn_orders(subject, self.start, settings)

    def loss_of(self, learned: Learned, weights: LossWeights) -> float:
        """The loss on the validation text under the masks that were learned."""
        masks: dict[str, Tensor] = {}
        for name, stack in self.stacks.items():
            masks |= stack.masks(learned.perms[name], TWO_OF_FOUR, learned.multipliers)
        return mean_loss(self.model, masks, self.validation, weights)


def fast(relaxation: Relaxation, **changes) -> LearnSettings:
    """Few steps with the given relaxation."""
    return replace(FAST, shape=replace(FAST.shape, relaxation=relaxation), **changes)


def text(rows: int, seed: int) -> list[dict[str, Tensor]]:
    """Batches of two rows of eight tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(48, (rows, 8), generator=generator)
    return [{"input_ids": part} for part in tokens.split(2)]


def stacks_of(
    model: nn.Module, resolve_model, spaces: list[str]
) -> dict[str, StackedScore]:
    scores = {
        name: module.weight.detach().abs()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    resolved = resolve_model(model)
    return {name: StackedScore.of(resolved.spaces[name], scores) for name in spaces}


@pytest.fixture
def task(tiny_model, resolve_model) -> Task:
    """Every kind of space, with shared key/value heads, in the order as it is."""
    model = tiny_model("llama")
    stacks = stacks_of(model, resolve_model, ["residual", "hidden.0", "value.0"])
    start = {name: torch.arange(stack.space.size) for name, stack in stacks.items()}
    return Task(model, stacks, start, text(8, seed=1), text(4, seed=2))


@pytest.fixture
def planted(tiny_model, resolve_model) -> Callable[[str], Task]:
    """
    A task whose start is scrambled and whose identity order is (nearly) perfect.

    In every row of the consumer, two of every four neighbours are all but zero.
    """

    def make(family: str) -> Task:
        model = tiny_model("llama", num_key_value_heads=4)
        generator = torch.Generator().manual_seed(3)
        part = "mlp.down_proj" if family == "hidden" else "self_attn.o_proj"
        for layer in range(2):
            weight = model.get_submodule(f"model.layers.{layer}.{part}").weight
            keys = torch.rand(*weight.shape, generator=generator)
            ranks = keys.unflatten(1, (-1, 4)).argsort(-1).argsort(-1).flatten(1)
            with torch.no_grad():
                weight.mul_(torch.where(ranks < 2, 1.5, 0.01))
        spaces = [f"{family}.0", f"{family}.1"]
        stacks = stacks_of(model, resolve_model, spaces)
        start = {
            name: from_blocks(
                torch.rand(
                    stack.space.size // stack.space.segment,
                    stack.space.segment,
                    generator=generator,
                ).argsort()
            )
            for name, stack in stacks.items()
        }
        return Task(model, stacks, start, text(16, seed=1), text(8, seed=2))

    return make


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("rows", [None, 16, 1])
def test_multipliers_of_the_scores_are_learned_and_kept_with_their_orders(
    task: Task, rows: int | None
) -> None:
    shape = replace(FAST.shape, multipliers=True, multiplier_rows=rows)
    settings = replace(FAST, steps=30, shape=shape, multiplier_rate=0.1)
    learned = task.learn(settings, train=text(32, seed=1))
    looks = [look["validation"] for look in learned.history]
    kept = task.loss_of(learned, settings.loss)
    assert kept == pytest.approx(min(looks), rel=1e-6)
    assert kept < looks[0]
    for name, factors in learned.multipliers.items():
        linear = task.model.get_submodule(name)
        runs = linear.out_features // (rows or linear.out_features)
        assert factors.shape == (runs, linear.in_features)
        assert bool((factors > 0).all())
    consumers = {r.name for s in task.stacks.values() for r in s.space.consumers}
    assert learned.multipliers.keys() == consumers
    assert any(bool((m != 1).any()) for m in learned.multipliers.values())


@pytest.mark.parametrize(
    ("share", "first", "then"), [(0.0, 0, 8), (0.25, 2, 6), (1.0, 8, 0)]
)
def test_orders_learn_first_then_they_stay_and_multipliers_learn(
    task: Task, share: float, first: int, then: int
) -> None:
    shape = replace(FAST.shape, multipliers=True)
    settings = replace(FAST, steps=8, order_share=share, evaluate_every=1, shape=shape)
    subject = Subject(
        task.model,
        task.stacks,
        {},
        Samples(task.train, task.validation),
        TWO_OF_FOUR,
    )
    perms: list[dict[str, Tensor]] = []
    multipliers: list[dict[str, Tensor]] = []

    def watch(step: int, orders: LearnableOrders) -> None:
        assert step == len(perms)
        perms.append(orders.perms())
        multipliers.append(orders.multipliers())

    learned = learn_orders(subject, task.start, settings, watch)

    def differ(old: dict[str, Tensor], new: dict[str, Tensor]) -> bool:
        return any(not torch.equal(old[name], new[name]) for name in old)

    orders_changed = [differ(*pair) for pair in pairwise(perms[: first + 1])]
    assert orders_changed == [True] * first
    assert not any(differ(*pair) for pair in pairwise(multipliers[: first + 1]))
    assert [differ(*pair) for pair in pairwise(multipliers[first:])] == [True] * then
    losses = [look["validation"] for look in learned.history[: first + 1]]
    best = perms[losses.index(min(losses))]
    assert not any(differ(best, later) for later in perms[first + 1 :])


@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_kept_order_is_the_best_that_was_seen(
    task: Task, relaxation: Relaxation, seed: int
) -> None:
    settings = fast(relaxation, seed=seed, steps=6)
    learned = task.learn(settings)
    looks = [entry["validation"] for entry in learned.history]
    kept = task.loss_of(learned, settings.loss)
    assert kept == pytest.approx(min(looks), rel=1e-6)
    assert looks[0] == pytest.approx(
        task.loss_of(Learned(task.start), settings.loss), rel=1e-6
    )
    assert kept <= looks[0]
    for name, perm in learned.perms.items():
        check_permutation(perm)
        segment = task.stacks[name].space.segment
        assert torch.equal(perm // segment, torch.arange(len(perm)) // segment)


@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_a_step_that_spoils_the_order_is_not_kept(
    task: Task, relaxation: Relaxation
) -> None:
    # A wild first step on one batch: whatever it does, the start is there to return to.
    settings = fast(relaxation, learning_rate=50.0, swaps=1.0, steps=1)
    learned = task.learn(settings, train=text(2, seed=9))
    before = task.loss_of(Learned(task.start), settings.loss)
    assert task.loss_of(learned, settings.loss) <= before * (1 + 1e-6)


@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_the_same_seed_gives_the_same_orders(
    task: Task, relaxation: Relaxation
) -> None:
    settings = fast(relaxation)
    first = task.learn(settings)
    torch.rand(5)  # The caller's own random numbers do not count.
    again = task.learn(settings)
    assert first.history == again.history
    for name, perm in first.perms.items():
        assert torch.equal(perm, again.perms[name])


def test_another_seed_takes_the_batches_in_another_order(task: Task) -> None:
    losses = [
        [entry["loss"] for entry in task.learn(replace(FAST, seed=seed)).history[1:]]
        for seed in range(3)
    ]
    assert losses[0] != losses[1] or losses[0] != losses[2]


@pytest.mark.parametrize("family", ["hidden", "value"])
@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_a_planted_order_is_approached(
    planted: Callable[[str], Task], family: str, relaxation: Relaxation
) -> None:
    task = planted(family)
    settings = LearnSettings(
        steps=150,
        learning_rate=0.03,
        evaluate_every=5,
        shape=OrderShape(block_size=48, relaxation=relaxation),
    )
    best = task.loss_of(
        Learned({name: torch.arange(len(perm)) for name, perm in task.start.items()}),
        settings.loss,
    )
    before = task.loss_of(Learned(task.start), settings.loss)
    after = task.loss_of(task.learn(settings), settings.loss)
    assert best < 0.05 * before
    assert after < (0.4 if relaxation == "insertion" else 0.75) * before


@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_weights_and_their_gradients_are_left_alone(
    task: Task, relaxation: Relaxation
) -> None:
    frozen_before = task.model.model.norm.weight
    frozen_before.requires_grad_(False)
    before = weights_of(task.model)
    task.learn(fast(relaxation))
    after = task.model.state_dict()
    assert [n for n, t in before.items() if not torch.equal(after[n], t)] == []
    for parameter in task.model.parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == (parameter is not frozen_before)
    assert [m for m in task.model.modules() if "forward" in m.__dict__] == []


def test_a_model_learns_offloaded_what_it_learns_in_memory(
    task: Task, offload_to, tmp_path
) -> None:
    expected = task.learn(FAST)
    offload_to(task.model, "disk", tmp_path)
    found = task.learn(FAST)
    assert found.history == expected.history
    for name, perm in expected.perms.items():
        assert torch.equal(found.perms[name], perm)


def test_looks_are_recorded_with_their_step_and_temperature(task: Task) -> None:
    settings = replace(FAST, steps=5, evaluate_every=2, temperature=(2.0, 0.5))
    history = task.learn(settings).history
    assert [entry["step"] for entry in history] == [0, 2, 4, 5]
    assert history[-1]["temperature"] == pytest.approx(0.5)
    assert history[1]["temperature"] == pytest.approx(2.0 * 0.25**0.25)


def test_every_part_of_the_loss_can_be_learned_from(task: Task) -> None:
    weights = LossWeights(divergence=0.5, cross_entropy=0.5, hidden=1.0, cosine=1.0)
    learned = task.learn(replace(FAST, loss=weights))
    before = task.loss_of(Learned(task.start), weights)
    assert task.loss_of(learned, weights) <= before * (1 + 1e-6)


def test_masks_of_other_linears_stay_on(task: Task) -> None:
    other = {"model.layers.1.mlp.down_proj": torch.zeros(32, 48)}
    with_other = task.learn(FAST, others=other).history[0]["validation"]
    without = task.learn(FAST).history[0]["validation"]
    masks = dict(other)
    for name, stack in task.stacks.items():
        masks |= stack.masks(task.start[name], TWO_OF_FOUR)
    expected = mean_loss(task.model, masks, task.validation, FAST.loss)
    assert with_other == pytest.approx(expected, rel=1e-6)
    assert with_other != pytest.approx(without, rel=1e-3)


@pytest.mark.parametrize("missing", ["train", "validation"])
def test_missing_text_is_refused(task: Task, missing: str) -> None:
    with pytest.raises(ValueError, match="text to train on and text held back"):
        task.learn(FAST, **{missing: []})


def of_padding() -> list[dict[str, Tensor]]:
    """A batch without one token that counts: its mean loss is not a number."""
    (batch,) = text(2, seed=4)
    return [batch | {"attention_mask": torch.zeros(2, 8, dtype=torch.int64)}]


def test_a_training_loss_that_is_not_finite_is_refused(task: Task) -> None:
    with pytest.raises(ValueError, match="training loss is nan"):
        task.learn(FAST, train=of_padding())
    assert all(parameter.requires_grad for parameter in task.model.parameters())
    assert [m for m in task.model.modules() if "forward" in m.__dict__] == []


def test_a_validation_loss_that_is_not_finite_is_refused(task: Task) -> None:
    with pytest.raises(ValueError, match="validation loss is nan"):
        task.learn(FAST, validation=of_padding())


def test_a_broken_model_is_refused(task: Task) -> None:
    with torch.no_grad():
        task.model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="loss is nan"):
        task.learn(FAST)


def test_channels_move_inside_their_blocks_only(task: Task) -> None:
    learned = task.learn(
        replace(FAST, steps=20, swaps=0.5, shape=OrderShape(block_size=8))
    )
    for perm in learned.perms.values():
        assert torch.equal(perm // 8, torch.arange(len(perm)) // 8)
    assert any(not same_groups(p, task.start[n], 4) for n, p in learned.perms.items())


def test_frozen_weights_are_freed_after_an_exception(task: Task) -> None:
    with frozen(task.model):
        assert not any(p.requires_grad for p in task.model.parameters())
    with pytest.raises(KeyError), frozen(task.model):
        raise KeyError
    assert all(p.requires_grad for p in task.model.parameters())


def test_the_dense_model_runs_once_a_batch(task: Task) -> None:
    """In the looks and in every epoch it is the pruned model that runs."""
    runs: list[bool] = []
    down = task.model.model.layers[0].mlp.down_proj
    task.model.model.norm.register_forward_hook(
        lambda *rest: runs.append("forward" in down.__dict__)
    )
    settings = replace(FAST, steps=8, evaluate_every=4)
    task.learn(settings)
    batches, looks = len(task.train) + len(task.validation), 3
    pruned = settings.steps + looks * len(task.validation)
    assert runs.count(True) == pruned
    assert runs.count(False) == batches
