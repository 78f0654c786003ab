# SPDX-License-Identifier: Apache-2.0
"""What the benchmark compares: every method by its name, and how one is run."""

import time
from ast import literal_eval
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from torch import nn

from host import sparsegpt
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.scores import ScoreName, score_weight
from nm_permute_plugin.pruning.learn.loop import LearnSettings
from nm_permute_plugin.pruning.learn.order_shape import OrderShape
from nm_permute_plugin.pruning.pipeline import (
    Method,
    Objective,
    OrderSettings,
    permute_and_prune,
)
from nm_permute_plugin.pruning.recover.stages import RecoverSettings, Stage
from nm_permute_plugin.pruning.recover.student import KeptWeights
from nm_permute_plugin.pruning.running.loss import LossWeights
from nm_permute_plugin.pruning.running.masked import linear
from nm_permute_plugin.pruning.samples import Samples
from nm_permute_plugin.pruning.statistics import input_norms
from nm_permute_plugin.specs.architectures import head_dim_of, spec_of
from nm_permute_plugin.specs.conv1d import weight_of
from nm_permute_plugin.specs.fold import write_in_place
from nm_permute_plugin.specs.spec import resolve
from unfolded import Unfolded, learn_masks, order_alone

SPARSEGPT = "sparsegpt"
RECOVERIES: dict[str, tuple[Stage, ...]] = {
    "rescale": ("rescale",),
    "blocks": ("blocks",),
    "end_to_end": ("end_to_end",),
    "recover": ("blocks", "end_to_end"),
}

AMD = LearnSettings(
    learning_rate=0.1,
    weight_decay=0.01,
    shape=OrderShape(groups=4, relaxation="soft", start_logit=0.1),
    loss=LossWeights(divergence=0.0, cross_entropy=1.0, hidden=1e-5),
)
"""https://arxiv.org/abs/2601.22980: soft places, annealed, hard at the end. It gives no
start and no temperatures, and its rate is for many more steps. Here places start nearly
uniform and learn fast enough to leave home: at 0.01 from 1.0 none does."""

PERMLLM = LearnSettings(
    learning_rate=0.01,
    weight_decay=0.1,
    shape=OrderShape(
        block_size=64, relaxation="straight_through", sinkhorn_iterations=5
    ),
    loss=LossWeights(divergence=0.0, cosine=1.0),
)
"""https://arxiv.org/abs/2510.10136: hard places with the soft ones' gradient. A published
step of 1e-3 moves a logit by 8e-3, because its logits are parameters times 8. Its
temperature falls linearly over the same range, ours geometrically."""


@dataclass(frozen=True)
class Way:
    """
    How a method finds its masks.

    :param method: ``mask`` learns the masks themselves
    :param folded: False: every linear has an order of its own, and nothing is folded
    :param rounds: of the search; 0 starts learning in the order as it is
    """

    score: ScoreName = "wanda"
    method: Method | Literal["mask"] = "identity"
    folded: bool = True
    rounds: int = 12
    learn: LearnSettings = field(default_factory=LearnSettings)
    objective: Objective = "end_to_end"


@dataclass(frozen=True)
class Budget:
    """
    What all methods share.

    :param steps: of every method that learns
    :param ours: settings of our own learned order
    :param changes: of a method's settings, by the method's name and the field's
    """

    pattern: NMPattern
    steps: int
    seed: int
    ours: LearnSettings = field(default_factory=LearnSettings)
    recover: RecoverSettings = field(default_factory=RecoverSettings)
    changes: Mapping[str, Mapping[str, object]] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """
    What a method did to a model, with its cost.

    :param batches: of text that were trained on
    """

    seconds: float
    batches: int
    settings: dict[str, object]
    stages: dict[str, float] = field(default_factory=dict)
    fold_error: float | None = None
    retained: tuple[float, float] | None = None
    recovered: list[dict[str, object]] = field(default_factory=list)
    history: list[dict[str, int | float]] = field(default_factory=list)


def ways(ours: LearnSettings) -> dict[str, Way]:
    """
    Every method that leaves the kept weights as they are, by its name.

    ``learned-order`` learns orders alone, ``multipliers`` those of the scores alone, in the
    order as it is: what orders are worth.
    """
    order_only = replace(ours, shape=replace(ours.shape, multipliers=False))
    scores_only = replace(
        ours, order_share=0.0, shape=replace(ours.shape, multipliers=True)
    )
    amd = Way(method="learned", rounds=0, learn=AMD)
    permllm = replace(amd, learn=PERMLLM)
    return {
        "magnitude": Way(score="magnitude"),
        "wanda": Way(),
        "ria": Way(score="ria"),
        "search": Way(method="search"),
        "search-free": Way(method="search", folded=False),
        "learned": Way(method="learned", learn=ours),
        "learned-order": Way(method="learned", learn=order_only),
        "multipliers": Way(method="learned", rounds=0, learn=scores_only),
        "layer-wise": Way(method="learned", learn=ours, objective="layer_wise"),
        "learned-free": Way(method="learned", folded=False, learn=ours),
        "amd": amd,
        "amd-free": replace(amd, folded=False),
        "permllm": permllm,
        "permllm-free": replace(permllm, folded=False),
        "free-mask": Way(method="mask", folded=False, learn=ours),
    }


METHODS = [
    *ways(LearnSettings()),
    *(
        f"{order}+{stages}"
        for order in ("wanda", "search", "learned")
        for stages in RECOVERIES
    ),
    SPARSEGPT,
    f"search+{SPARSEGPT}",
    f"learned+{SPARSEGPT}",
]
DEFAULT = ["magnitude", "wanda", "ria", "search", "learned"]


def is_random(method: str) -> bool:
    """Whether a method's outcome depends on the seed."""
    return method not in ("magnitude", "wanda", "ria")


def parse_changes(texts: Iterable[str]) -> dict[str, dict[str, object]]:
    """
    Changes of settings, as they are written on the command line.

    :raises ValueError: for a method or a field that there is not

    >>> parse_changes(["amd.learning_rate=0.1", "amd.temperature=(1.0, 0.05)"])
    {'amd': {'learning_rate': 0.1, 'temperature': (1.0, 0.05)}}
    """
    known = ways(LearnSettings())
    names = {x.name for cls in (LearnSettings, OrderShape, Way) for x in fields(cls)}
    names -= {
        "steps",
        "seed",
        "shape",
        "loss",
        "learn",
        "method",
        "folded",
        "objective",
    }
    changes: dict[str, dict[str, object]] = {}
    for text in texts:
        target, _, value = text.partition("=")
        method, _, name = target.partition(".")
        if method not in known or name not in names:
            raise ValueError(
                f"{text!r} changes no setting; write METHOD.FIELD=VALUE, METHOD one of "
                f"{', '.join(known)} and FIELD one of {', '.join(sorted(names))}"
            )
        changes.setdefault(method, {})[name] = _value(value)
    return changes


def _value(text: str) -> object:
    """A number, a tuple or None as Python writes it; else the word itself."""
    try:
        return literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def changed(way: Way, changes: Mapping[str, object]) -> Way:
    """The way with some of its settings changed, wherever they stand."""

    def of(cls: type) -> dict[str, object]:
        return {x.name: changes[x.name] for x in fields(cls) if x.name in changes}

    shape = replace(way.learn.shape, **of(OrderShape))
    learn = replace(way.learn, shape=shape, **of(LearnSettings))
    return replace(way, learn=learn, **of(Way))


def prune(
    model: nn.Module, folder: Path, name: str, text: Samples, budget: Budget
) -> Outcome:
    """
    Run a method: the model is pruned in place.

    :param folder: where the model was loaded from
    """
    started = time.perf_counter()
    order, _, then = name.partition("+")
    if name == SPARSEGPT:
        sparsegpt(model, folder, text.train, budget.pattern)
        return Outcome(time.perf_counter() - started, 0, {})
    if then == SPARSEGPT and order == "learned":
        order = "learned-order"  # SparseGPT scores the weights itself
    way = changed(ways(budget.ours)[order], budget.changes.get(order, {}))
    learn = replace(way.learn, steps=budget.steps, seed=budget.seed)
    way = replace(way, learn=learn)
    learns = way.method in ("learned", "mask")
    used: dict[str, object] = asdict(way) if learns else {"rounds": way.rounds}
    batches = budget.steps if learns else 0
    if not way.folded:
        found = _unfolded(model, way, text, budget)
        seconds = time.perf_counter() - started
        return Outcome(seconds, batches, used, history=found.history)
    linears = prunable(model)
    resolved = resolve(
        model, spec_of(model), budget.pattern, linears, head_dim_of(model.config)
    )
    stages = RECOVERIES.get(then, ())
    settings = OrderSettings(
        budget.pattern,
        score=way.score,
        method=way.method,
        search_rounds=way.rounds,
        learn=learn,
        objective=way.objective,
        prune=then != SPARSEGPT,
        recover=replace(budget.recover, stages=stages),
    )
    record = permute_and_prune(model, resolved, linears, text, settings)
    if then == SPARSEGPT:
        sparsegpt(model, folder, text.train, budget.pattern)
    if "blocks" in stages:
        batches += budget.recover.blocks.epochs * len(text.train)
    if "end_to_end" in stages:
        batches += budget.recover.distill.steps
    return Outcome(
        time.perf_counter() - started,
        batches,
        used,
        record.seconds,
        record.fold_error,
        record.retained,
        [asdict(stage) for stage in record.recovered],
        record.history,
    )


def prunable(model: nn.Module) -> list[str]:
    """The linears that are pruned: all but the head."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]


def _unfolded(model: nn.Module, way: Way, text: Samples, budget: Budget) -> Unfolded:
    linears = prunable(model)
    norms = input_norms(model, linears, text.train)
    scores = {
        name: score_weight(way.score, weight_of(linear(model, name)), norms[name])
        for name in linears
    }
    if way.method == "mask":
        found = learn_masks(model, scores, text, budget.pattern, way.learn)
    else:
        search_only = way.method == "search"
        found = order_alone(
            model, scores, text, budget.pattern, way.rounds, way.learn, search_only
        )
    KeptWeights(model, found.masks).write(write_in_place)
    return found
