# SPDX-License-Identifier: Apache-2.0
"""
Which modifiers of llm-compressor may stand before and after ours in a recipe.

| modifier | before | after |
|---|---|---|
| SmoothQuant, LogarithmicEqualization, ConstantPruning | yes | yes |
| AWQ | yes, if its quantization comes after ours | yes |
| Quantization, GPTQ, AutoRound | no: quantized weights are not permuted | yes |
| Wanda, SparseGPT | no: the model would be sparse already | of the same pattern |
| MagnitudePruning | no | no: it zeroes weights as soon as it is initialised |
| SpinQuant, QuIP | no: the fold is not exact, or the result loads wrong | no: no zeros |
| REAP | no: experts would be gone that were to be pruned | no |

Nothing is said of modifiers that are not named here; each save is checked in any case.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from compressed_tensors.quantization import ActivationOrdering, QuantizationStrategy
from compressed_tensors.utils import match_named_modules
from llmcompressor.modifiers import Modifier
from torch import nn

from nm_permute_plugin.pruning.settings import Settings
from nm_permute_plugin.specs.conv1d import is_linear, is_transposed, weight_of

_ROTATIONS = ("SpinQuantModifier", "QuIPModifier")
_GROUPED = (QuantizationStrategy.GROUP, QuantizationStrategy.TENSOR_GROUP)
_QUANTIZES = "QuantizationMixin"
_STATIC = ("static", "weight")
"""The orders of channels in which GPTQ rounds, and leaves them where they are."""


def is_kind(modifier: Modifier, *names: str) -> bool:
    """Whether one of the names is that of a modifier's class, or of a base of it."""
    return any(kind.__name__ in names for kind in type(modifier).__mro__)


def after(ours: Modifier, modifiers: Sequence[Modifier]) -> list[Modifier]:
    """The modifiers that stand after ours in a recipe."""
    places = [i for i, other in enumerate(modifiers) if other is ours]
    return list(modifiers[places[0] + 1 :]) if places else []


def is_pruned_later(ours: Modifier, modifiers: Sequence[Modifier]) -> bool:
    """Whether a modifier after ours prunes."""
    return any(hasattr(other, "mask_structure") for other in after(ours, modifiers))


def unfit_neighbours(
    ours: Modifier, modifiers: Sequence[Modifier], settings: Settings
) -> Iterator[str]:
    """Yield what cannot be where it stands in the recipe, and why."""
    name = type(ours).__name__
    later = after(ours, modifiers)
    same = [other for other in modifiers if type(other) is type(ours)]
    if len(same) > 1 and ours is same[0]:
        yield (
            f"the recipe names {name} {len(same)} times, and the second would find a "
            "model that is permuted and sparse already: keep one of them"
        )
    for other in modifiers:
        if type(other) is type(ours):
            continue
        is_later = any(other is each for each in later)
        reason = _after(other, settings) if is_later else _before(other)
        if reason is None:
            reason = _anywhere(other)
        if reason is not None:
            where = "after" if is_later else "before"
            yield f"{type(other).__name__} {where} {name} {reason}"


def _anywhere(other: Modifier) -> str | None:
    if is_kind(other, *_ROTATIONS):
        return (
            "mixes the channels that are permuted and pruned, and the checkpoint would "
            "not compute what it should: leave it out"
        )
    if is_kind(other, "MagnitudePruningModifier"):
        return (
            "zeroes weights before the channels are permuted, wherever it stands: leave "
            "it out; score: magnitude does what it does"
        )
    if is_kind(other, "REAPPruningModifier"):
        return (
            "removes experts that are to be pruned: run it alone, and prune the "
            "checkpoint that it leaves in a second run"
        )
    return None


def _before(other: Modifier) -> str | None:
    if is_kind(other, "SparsityModifierBase"):
        return (
            "leaves a model that is sparse already, whose channels come too late: put it "
            "after, with prune: false, or leave it out"
        )
    if is_kind(other, _QUANTIZES) and any(True for _ in weight_groups(other)):
        return "quantizes weights before they are permuted and pruned: put it after"
    return None


def _after(other: Modifier, settings: Settings) -> str | None:
    if is_kind(other, "GPTQModifier"):
        orders = {weights.actorder for weights, _ in weight_groups(other)}
        for order in (order for order in orders - {None} if order not in _STATIC):
            return (
                f"sorts channels by actorder: {ActivationOrdering(order).value}, which "
                "llm-compressor does not support any more: write actorder: static"
            )
    found = getattr(other, "mask_structure", None)
    if settings.prune or found in (None, settings.mask_structure):
        return None
    if is_kind(other, "MagnitudePruningModifier"):
        return None  # which is refused with any pattern
    return (
        f"prunes {found!r}, and the permutation is made for mask_structure "
        f"{settings.mask_structure!r}: give both the same"
    )


def unfit_groups(
    ours: Modifier, modifiers: Iterable[Modifier], model: nn.Module
) -> Iterator[str]:
    """Yield quantization that means no linear, or groups that do not divide a width."""
    for other in modifiers:
        if other is ours or not is_kind(other, _QUANTIZES):
            continue
        for weights, modules in weight_groups(other, model):
            if not modules:
                yield _means_nothing(other, model)
            size = weights.group_size
            if QuantizationStrategy(weights.strategy) not in _GROUPED or not size:
                continue
            widths = {n: weight_of(m).shape[1] for n, m in modules.items()}
            names = [name for name, width in widths.items() if width % size]
            if names:
                more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
                yield (
                    f"{type(other).__name__} quantizes groups of {size} weights, which "
                    f"the {widths[names[0]]} input channels of {names[0]}{more} are no "
                    "multiple of: give `config_groups` a group_size that divides them, "
                    "take a scheme without groups (W8A8, FP8_DYNAMIC), or add them to "
                    "its `ignore`"
                )


def _means_nothing(other: Any, model: nn.Module) -> str:
    kinds = {type(module).__name__ for module in model.modules() if is_linear(module)}
    schemes = other.resolved_config.config_groups.values()
    targets = sorted({target for scheme in schemes for target in scheme.targets})
    named = match_named_modules(model, targets, other.ignore)
    if any(is_linear(module) for _, module in named):
        return (
            f"{type(other).__name__} with targets {', '.join(targets)} would quantize "
            "nothing: those linears are of class Conv1D, which llm-compressor does not "
            "quantize; leave it out"
        )
    return (
        f"{type(other).__name__} with targets {', '.join(targets)} means no linear of "
        f"this model and would quantize nothing: its linears are of class "
        f"{', '.join(sorted(kinds))}; name that class in its `targets`"
    )


def weight_bits(
    ours: Modifier, modifiers: Sequence[Modifier], model: nn.Module
) -> dict[str, int]:
    """The bits of a weight of each linear that a modifier after ours quantizes."""
    return {
        name: int(weights.num_bits)
        for other in after(ours, modifiers)
        if is_kind(other, _QUANTIZES)
        for weights, modules in weight_groups(other, model)
        for name in modules
    }


def weight_groups(
    modifier: Any, model: nn.Module | None = None
) -> Iterator[tuple[Any, dict[str, nn.Module]]]:
    """
    Yield how a modifier quantizes weights, each with the linears that it means.

    compressed-tensors quantizes no Conv1D.
    """
    for scheme in modifier.resolved_config.config_groups.values():
        if scheme.weights is not None:
            found = (
                match_named_modules(model, scheme.targets, modifier.ignore)
                if model is not None
                else ()
            )
            linears = {name: m for name, m in found if is_linear(m)}
            yield (
                scheme.weights,
                {n: m for n, m in linears.items() if not is_transposed(m)},
            )
