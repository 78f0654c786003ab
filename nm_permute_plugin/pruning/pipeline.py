# SPDX-License-Identifier: Apache-2.0
"""The whole way in memory: statistics, scores, order, exact fold, N:M mask."""

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float
from loguru import logger
from torch import Tensor, nn

from nm_permute_plugin.maths.masks import nm_mask
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import Permutation
from nm_permute_plugin.maths.scores import ScoreName, score_weight
from nm_permute_plugin.pruning.energy import row_weights
from nm_permute_plugin.pruning.learn.layerwise import Hold, learn_layer_wise
from nm_permute_plugin.pruning.learn.loop import LearnSettings, learn_orders
from nm_permute_plugin.pruning.problem import Learned, Subject
from nm_permute_plugin.pruning.recover.stages import (
    RecoverSettings,
    StageRecord,
    recover,
)
from nm_permute_plugin.pruning.recover.student import KeptWeights
from nm_permute_plugin.pruning.running.decoder_layers import decoder_layers
from nm_permute_plugin.pruning.running.loss import answer, refuse_not_finite
from nm_permute_plugin.pruning.running.masked import linear
from nm_permute_plugin.pruning.running.teacher import Teacher
from nm_permute_plugin.pruning.samples import Samples
from nm_permute_plugin.pruning.search import search_orders
from nm_permute_plugin.pruning.stacking import StackedScore, mask_in_order
from nm_permute_plugin.pruning.statistics import (
    Batch,
    first_sample,
    forward,
    input_norms,
    on_device,
)
from nm_permute_plugin.specs.conv1d import weight_of
from nm_permute_plugin.specs.exactness import random_perms
from nm_permute_plugin.specs.fold import (
    Write,
    fold,
    invert_all,
    moved_along,
    write_in_place,
)
from nm_permute_plugin.specs.spec import ResolvedSpec

Method = Literal["learned", "search", "identity"]
Objective = Literal["end_to_end", "layer_wise"]

FOLD_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest relative change of the outputs that rounding explains, by dtype; 0.05 below."""


@dataclass(frozen=True)
class OrderSettings:
    """
    What to do to a model.

    :param method: ``identity`` keeps the order, ``search`` learns nothing, ``learned``
        starts from the search
    :param families: the kinds of spaces that are reordered
    :param search_rounds: rounds of assignment a space
    :param objective: what is learned from: the whole model's loss, or the output errors of
        decoder layers, one after the other
    :param prune: False folds the order and leaves the weights dense
    :param recover: how the weights that the masks keep are changed; by default not at all
    """

    pattern: NMPattern
    score: ScoreName = "wanda"
    method: Method = "learned"
    families: tuple[str, ...] = ("residual", "hidden", "value")
    search_rounds: int = 12
    learn: LearnSettings = field(default_factory=LearnSettings)
    objective: Objective = "end_to_end"
    prune: bool = True
    recover: RecoverSettings = field(default_factory=RecoverSettings)

    @property
    def layer_wise(self) -> bool:
        """Whether the whole model is too large for its device: scores stay on the CPU."""
        return self.objective == "layer_wise"


@dataclass
class Record:
    """
    What a run did, with its figures.

    :param perms: by space, ``new[j] = old[perm[j]]``
    :param fold_error: relative change of the dense outputs by the fold, on a sample
    :param retained: share of the total score that the masks keep, before and after
    :param seconds: by stage
    :param recovered: what each stage of the recovery did
    """

    perms: dict[str, Permutation]
    fold_error: float
    retained: tuple[float, float]
    seconds: dict[str, float]
    history: list[dict[str, int | float]]
    recovered: list[StageRecord] = field(default_factory=list)


def permute_and_prune(
    model: nn.Module,
    resolved: ResolvedSpec,
    prunable: Sequence[str],
    samples: Samples,
    settings: OrderSettings,
    write: Write = write_in_place,
    hold: Hold = nullcontext,
) -> Record:
    """
    Order the channels, fold the order exactly, zero what the N:M mask drops, and recover.

    Statistics come from the dense model. After the fold the dense model's logits (final
    hidden states of a model without a head) are compared with those before; if they differ
    by more than rounding explains, the fold is undone and refused.

    :param prunable: names of the linears to prune
    :param write: how a parameter's new value is stored
    :param hold: entered for each layer that ``layer_wise`` learns, and for all recovery:
        keeps offloaded weights where they were fetched to
    :raises ValueError: for a model that is sparse already, for bad statistics, for outputs
        that are not finite, and for a recovery that cannot run
    :raises RuntimeError: if the fold changes the function of the model
    """
    refuse_sparse(model, prunable, settings.pattern)
    learns_layers = settings.method == "learned" and settings.layer_wise
    if learns_layers or "blocks" in settings.recover.stages:
        decoder_layers(model, prunable)  # refuse before the order is learned, not after
    clock = _Clock()
    norms = (
        input_norms(model, prunable, samples.train)
        if settings.score != "magnitude"
        else {}
    )
    clock.lap("statistics")
    device = next(model.parameters()).device
    scores = {
        name: score_weight(
            settings.score, weight_of(linear(model, name)), norms.get(name)
        ).to("cpu" if settings.layer_wise else device)
        for name in prunable
    }
    found = _find_orders(model, resolved, scores, samples, settings, clock, hold)
    pattern = settings.pattern
    masks = _masks(resolved, scores, Learned({}), pattern, device)
    before = _retained(scores, masks, device)
    masks = _masks(resolved, scores, found, pattern, device)
    after = _retained(scores, masks, device)
    del scores
    fold_error = _fold_checked(model, resolved, found.perms, samples.train[0], write)
    logger.info(f"folded {len(found.perms)} orders; outputs moved by {fold_error:.1e}")
    clock.lap("fold")
    recovered: list[StageRecord] = []
    if settings.prune:
        masks = moved_along(model, resolved, masks, found.perms)

        def keep(linears: Sequence[str]) -> KeptWeights:
            return KeptWeights(
                model, {name: masks[name].to(device) for name in linears}
            )

        if settings.recover.stages:
            with hold():
                kept = keep(prunable)
                recovered = recover(kept, samples, settings.recover)
                clock.lap("recover")
                kept.write(write)
        else:
            for name in prunable:  # never two copies of the whole model
                keep([name]).write(write)
        clock.lap("prune")
    return Record(
        found.perms,
        fold_error,
        (before, after),
        clock.seconds,
        found.history,
        recovered,
    )


def refuse_inexact(
    model: nn.Module,
    resolved: ResolvedSpec,
    probe: Batch,
    write: Write = write_in_place,
) -> None:
    """
    Try a spec with random orders, before any work; the weights are as they were then.

    :raises RuntimeError: if a fold changes the function of the model
    """
    perms = random_perms(resolved)
    _fold_checked(model, resolved, perms, probe, write)
    fold(model, resolved, invert_all(perms), write)


def refuse_sparse(
    model: nn.Module, prunable: Sequence[str], pattern: NMPattern
) -> None:
    """
    Refuse a model whose weights are zero already where a mask would put zeros.

    :raises ValueError: naming the first linear with as many zeros as the pattern asks for
    """
    for name in prunable:
        weight = weight_of(linear(model, name))
        zeros = float((weight == 0).float().mean())
        if zeros >= 1 - pattern.density:
            raise ValueError(
                f"{name} is sparse already: {zeros:.0%} of its weights are zero. Start "
                "from the dense model, or add the layer to `ignore`."
            )


class _Clock:
    """Seconds by stage, one log line a stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = now - self._last
        self._last = now
        logger.info(f"{stage}: {self.seconds[stage]:.1f} s")


def _find_orders(
    model: nn.Module,
    resolved: ResolvedSpec,
    scores: dict[str, Float[Tensor, "_out _in"]],
    samples: Samples,
    settings: OrderSettings,
    clock: _Clock,
    hold: Hold,
) -> Learned:
    """The orders of the chosen families' spaces, by the chosen method."""
    if settings.method == "identity":
        return Learned({})
    learn = settings.learn
    # One layer at a time, nothing is known of what follows it.
    weights = (
        None
        if settings.layer_wise
        else row_weights(model, list(scores), samples.train, learn.seed)
    )
    stacks: dict[str, StackedScore] = {}
    for name, space in resolved.spaces.items():
        if space.consumers and space.family in settings.families:
            stacks[name] = StackedScore.of(space, scores, weights)
            # The same numbers; both at once would not fit beside a large model.
            scores |= stacks[name].split(stacks[name].score)
    ordered = {consumer.name for s in stacks.values() for consumer in s.space.consumers}
    others = {
        name: nm_mask(score, settings.pattern)
        for name, score in scores.items()
        if name not in ordered
    }

    subject = Subject(model, stacks, others, samples, settings.pattern)
    teacher = Teacher(model, learn.loss)

    def judge(perms: dict[str, Permutation]) -> float:
        return subject.validation_loss(Learned(perms), learn.loss, teacher)

    searched = search_orders(
        stacks,
        settings.pattern,
        settings.search_rounds,
        learn.seed,
        judge,
        subject.device,
    )
    clock.lap("search")
    if settings.method == "search":
        return Learned(searched.perms, history=searched.history)
    learned = (
        learn_layer_wise(subject, searched.perms, learn, hold)
        if settings.layer_wise
        else learn_orders(subject, searched.perms, learn)
    )
    clock.lap("learn")
    return learned


def _masks(
    resolved: ResolvedSpec,
    scores: Mapping[str, Float[Tensor, "_out _in"]],
    found: Learned,
    pattern: NMPattern,
    device: torch.device,
) -> dict[str, Bool[Tensor, "_out _in"]]:
    """The masks of all linears under the orders, in the channels' old places."""
    masks = {
        name: nm_mask(score.to(device), pattern).to(score.device)
        for name, score in scores.items()
    }
    for name, perm in found.perms.items():
        for consumer in resolved.spaces[name].consumers:
            score = consumer.view(scores[consumer.name])
            factors = found.multipliers.get(consumer.name)
            mask = mask_in_order(consumer, score, perm, pattern, factors)
            masks[consumer.name] = consumer.unview(mask)
    return masks


def _retained(
    scores: Mapping[str, Float[Tensor, "_out _in"]],
    masks: Mapping[str, Bool[Tensor, "_out _in"]],
    device: torch.device,
) -> float:
    """The share of the whole score that masks keep, counted on a device."""
    kept = total = 0.0
    for name, stored in scores.items():
        score = stored.to(device)
        kept += float(score.masked_fill(~masks[name].to(device), 0).double().sum())
        total += float(score.double().sum())
    return kept / total


def _fold_checked(
    model: nn.Module,
    resolved: ResolvedSpec,
    perms: Mapping[str, Permutation],
    probe: Batch,
    write: Write,
) -> float:
    """Fold, and return the relative change of the outputs; undo a fold that is wrong."""
    before = _outputs(model, probe)
    refuse_not_finite(before)
    fold(model, resolved, perms, write)
    after = _outputs(model, probe)
    error = float((after - before).norm() / before.norm())
    dtype = next(model.parameters()).dtype
    if not error <= FOLD_TOLERANCE.get(dtype, 0.05):
        fold(model, resolved, invert_all(perms), write)
        raise RuntimeError(
            f"folding changed the model's outputs by {error:.1e} (relative), more than "
            f"rounding in {dtype} explains: the permutation spec does not fit this "
            "model. The weights are as they were; correct `spec:` in the recipe."
        )
    return error


def _outputs(model: nn.Module, probe: Batch) -> Tensor:
    with torch.no_grad():
        batch = on_device(first_sample(probe), model)
        return answer(forward(model, batch)).double()
