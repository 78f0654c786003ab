# SPDX-License-Identifier: Apache-2.0
"""The figures of linears by layer and by kind, such as down_proj."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nm_permute_plugin.reporting.places import place_of
from nm_permute_plugin.reporting.run import Linear


@dataclass(frozen=True)
class Cell:
    """
    What the masks of the linears of one layer and one kind keep.

    :param score: the sum of the scores of all their weights
    :param before: the share of it that the plain masks keep
    :param after: the share that the masks that were found keep
    :param exchanged: the share of the weights kept that the plain masks drop
    :param cost_before: the score lost by the plain masks, weighted by what an error of the
        output costs; None where a linear of them does not tell it
    :param cost_after: the same of the masks that were found
    """

    score: float
    before: float
    after: float
    exchanged: float
    cost_before: float | None
    cost_after: float | None

    @classmethod
    def of(cls, linears: Sequence[Linear]) -> "Cell":
        """Put linears together, weighted by their scores and their sizes."""
        score = sum(one.score for one in linears)
        weights = sum(one.weights for one in linears)

        def kept(shares: Iterable[tuple[float, float]]) -> float:
            return sum(s * part for s, part in shares) / score if score else 1.0

        costs = [(one.cost_before, one.cost_after) for one in linears]
        known = [(b, a) for b, a in costs if b is not None and a is not None]
        whole = len(known) == len(costs)
        return cls(
            score,
            kept((one.score, one.before) for one in linears),
            kept((one.score, one.after) for one in linears),
            sum(one.exchanged * one.weights for one in linears) / max(weights, 1),
            sum(before for before, _ in known) if whole else None,
            sum(after for _, after in known) if whole else None,
        )


@dataclass(frozen=True)
class Stack:
    """
    The layers of one stack, a decoder or a vision tower.

    :param name: what stands before the layer's number; empty for what lies outside of
        all layers
    :param kinds: of linears, by the shortest names that tell them apart
    :param layers: their numbers
    :param cells: by kind and layer
    """

    name: str
    kinds: tuple[str, ...]
    layers: tuple[int, ...]
    cells: dict[tuple[str, int], Cell]
    by_layer: dict[int, Cell]
    by_kind: dict[str, Cell]


def stacks(linears: Sequence[Linear]) -> list[Stack]:
    """Sort linears into stacks, layers and kinds, in the order they come in."""
    sorted_: dict[str, list[tuple[int, str, Linear]]] = {}
    for linear in linears:
        layer, kind = place_of(linear.name)
        stack = "" if layer is None else linear.name.split(f".{layer}.", 1)[0]
        sorted_.setdefault(stack, []).append((layer or 0, kind, linear))
    return [_stack(name, places) for name, places in sorted_.items()]


def shortest(names: Sequence[str]) -> dict[str, str]:
    """
    The shortest ends of dotted names that tell them apart.

    >>> shortest(["mlp.down_proj", "attention.dense", "output.dense"])
    {'mlp.down_proj': 'down_proj', 'attention.dense': 'attention.dense', \
'output.dense': 'output.dense'}
    """
    found = {}
    for name in names:
        parts = name.split(".")
        ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        found[name] = next(
            end
            for end in ends
            if end == name
            or not any(
                f".{other}".endswith(f".{end}") for other in names if other != name
            )
        )
    return found


def _stack(name: str, places: Sequence[tuple[int, str, Linear]]) -> Stack:
    short = shortest(list(dict.fromkeys(kind for _, kind, _ in places)))
    cells: dict[tuple[str, int], list[Linear]] = {}
    by_layer: dict[int, list[Linear]] = {}
    by_kind: dict[str, list[Linear]] = {}
    for layer, kind, linear in places:
        cells.setdefault((short[kind], layer), []).append(linear)
        by_layer.setdefault(layer, []).append(linear)
        by_kind.setdefault(short[kind], []).append(linear)
    return Stack(
        name,
        tuple(short.values()),
        tuple(sorted(by_layer)),
        {place: Cell.of(of) for place, of in cells.items()},
        {layer: Cell.of(by_layer[layer]) for layer in sorted(by_layer)},
        {kind: Cell.of(of) for kind, of in by_kind.items()},
    )
