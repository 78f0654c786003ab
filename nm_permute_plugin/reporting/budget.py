# SPDX-License-Identifier: Apache-2.0
"""What a budget left dense: see ``pruning.budget.record``."""

from dataclasses import dataclass, field

from nm_permute_plugin.reporting.places import place_of
from nm_permute_plugin.reporting.reading import Count, Read
from nm_permute_plugin.reporting.table import Table


class Group(Read):
    """One group of linears that serving fuses."""

    linears: tuple[str, ...]
    weights: Count
    share: float
    stays_dense: bool


class Point(Read):
    """A choice that was measured."""

    dense_share: float
    validation: float
    speedup: float | None = None


class Budget(Read):
    """
    What stays dense, and what other choices would have been worth.

    :ivar learned: choices whose masks were learned, the last of them kept; ``chosen`` and
        ``curve`` are under the search's masks where there are any
    """

    dense_loss: float
    chosen: Point
    groups: tuple[Group, ...] = ()
    curve: tuple[Point, ...] = ()
    learned: tuple[Point, ...] = ()
    goal: str | None = None
    asked: float | None = None

    @property
    def reached(self) -> float:
        """The loss under the final masks, before any recovery."""
        return (self.learned or (self.chosen,))[-1].validation

    @property
    def words(self) -> str:
        """What stays dense, and what it is worth, in a sentence."""
        dense = sum(group.stays_dense for group in self.groups)
        said = (
            f"{dense} of {len(self.groups)} groups of linears stay dense, "
            f"{self.chosen.dense_share:.1%} of the weights that could be pruned"
        )
        if self.goal is not None and self.asked is not None:
            said += f" (asked for: {self.goal} {self.asked:g})"
        if self.curve:
            where = ". Before learning, by the search's masks," if self.learned else ":"
            said += (
                f"{where} the loss on validation rows is {self.chosen.validation:.4f} "
                f"where it is {self.curve[0].validation:.4f} with all of them sparse"
            )
        if self.learned:
            said += (
                f". After the masks of what stays sparse were learned it is "
                f"{self.reached:.4f}"
            )
        if self.goal == "max_loss_increase":
            said += (
                f". Before any recovery the loss of this checkpoint is {self.reached:.4f}, "
                f"{self.reached - self.dense_loss:.4f} above the dense model's"
            )
        if self.chosen.speedup is not None:
            said += (
                f". By the kernel tables all products together are "
                f"{self.chosen.speedup:.2f} times as fast as dense"
            )
        return f"{said}."

    @property
    def table(self) -> Table:
        """By kind of linear: which layers stay dense, and the share of the loss."""
        total = sum(group.share for group in self.groups)
        rows: dict[str, _Row] = {}
        for group in self.groups:
            places = [place_of(name) for name in group.linears]
            kinds = list(dict.fromkeys(kind.rpartition(".")[2] for _, kind in places))
            row = rows.setdefault(", ".join(kinds), _Row())
            row.share += group.share
            if group.stays_dense:
                row.dense.append(places[0][0])
        return Table.of(
            {
                "linears": list(rows),
                "layers that stay dense": [_ranges(row.dense) for row in rows.values()],
                "share of the loss by masks": [
                    f"{row.share / total:.1%}" if total else "" for row in rows.values()
                ],
            }
        )


@dataclass
class _Row:
    share: float = 0.0
    dense: list[int | None] = field(default_factory=list)


def _ranges(layers: list[int | None]) -> str:
    """
    Numbers with neighbours together; what lies in no layer stands first.

    >>> _ranges([0, 1, 2, 5, 7, 8])
    '0-2, 5, 7, 8'
    """
    found = ["outside"] if None in layers else []
    numbers = sorted({layer for layer in layers if layer is not None})
    while numbers:
        last = next(n for n in numbers if n + 1 not in numbers)
        run = [n for n in numbers if n <= last]
        numbers = numbers[len(run) :]
        found += [f"{run[0]}-{last}"] if len(run) > 2 else map(str, run)
    return ", ".join(found) or "none"
