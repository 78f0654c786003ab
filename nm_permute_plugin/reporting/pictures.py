# SPDX-License-Identifier: Apache-2.0
"""The pictures of one run: a figure each, or None where the record does not tell it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from nm_permute_plugin.reporting.drawing import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    RED,
    from_zero,
    new_figure,
)
from nm_permute_plugin.reporting.layers import Stack, stacks
from nm_permute_plugin.reporting.run import Entry, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


KEPT = "#1f7fbf"
"""What a mask keeps: a blue that is the same on light and on dark."""


@dataclass(frozen=True)
class Picture:
    """
    A picture that a page may hold.

    :param name: of its PNG
    :param draw: draws it for a run
    """

    name: str
    title: str
    caption: str
    draw: Callable[[Run], "Figure | None"]


def learning(run: Run) -> "Figure | None":
    """Training and validation loss by step, the best step, and the learning rate."""
    return _curve(run.learned, _borders(run), "step of the learning")


def recovery(run: Run) -> "Figure | None":
    """The same of the last recovery that went by steps."""
    stages = [of for of in run.recovered if any(e.step is not None for e in of.history)]
    return _curve(stages[-1].history, [], "step of the recovery") if stages else None


def search(run: Run) -> "Figure | None":
    """The validation loss by round of the search."""
    known = [(e.place, e.validation) for e in run.rounds if e.validation is not None]
    if len(known) < 2:
        return None
    figure = new_figure(2.4)
    axes = figure.subplots()
    axes.plot(*zip(*known, strict=True), color=BLUE, marker="o", label="validation")
    axes.set(xlabel="round of the search", ylabel="loss")
    _whole_numbers(axes)
    from_zero(axes, [loss for _, loss in known])
    return figure


def retained(run: Run) -> "Figure | None":
    """The share of the score kept, and the share of kept weights that are others."""
    found = _largest(run)
    if found is None:
        return None
    changed = any(cell.exchanged for cell in found.cells.values())
    height = 1.5 + 0.4 * len(found.kinds)
    figure = new_figure(height if changed else height / 2)
    panels = figure.subplots(1 + changed, 1, squeeze=False)[:, 0]
    _heat(figure, panels[0], found, "score kept", lambda cell: cell.after)
    if changed:
        title = "kept weights that the plain mask drops"
        _heat(figure, panels[1], found, title, lambda cell: cell.exchanged)
    panels[-1].set_xlabel(_layers(found))
    return figure


def sensitivity(run: Run) -> "Figure | None":
    """The share of the score that every layer loses, and where the cost of it lies."""
    found = _largest(run)
    if found is None or len(found.layers) < 2:
        return None
    cells = list(found.by_layer.values())
    costs = [(c.cost_before, c.cost_after) for c in cells]
    known = [(b, a) for b, a in costs if b is not None and a is not None]
    weighed = len(known) == len(cells) and sum(before for before, _ in known) > 0
    figure = new_figure(3.8 if weighed else 2.2)
    panels = figure.subplots(1 + weighed, 1, sharex=True, squeeze=False)[:, 0]
    moved = any(cell.before != cell.after for cell in cells)
    lost = [[100 - 100 * c.before for c in cells], [100 - 100 * c.after for c in cells]]
    _before_and_after(panels[0], found.layers, lost, moved)
    panels[0].set_ylabel("score lost, %")
    if weighed:
        total = sum(before for before, _ in known)
        parts = [[100 * pair[i] / total for pair in known] for i in (0, 1)]
        _before_and_after(panels[1], found.layers, parts, moved)
        panels[1].set_ylabel("share of the cost, %")
    panels[-1].set_xlabel(_layers(found))
    _whole_numbers(panels[-1])
    if moved:
        panels[0].legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def channels(run: Run) -> "Figure | None":
    """A corner of one mask: the plain one, and the one that was found."""
    crop = run.figures.crop
    if crop is None or not crop.whole:
        return None
    import numpy as np
    from matplotlib.colors import to_rgb

    dropped, kept, new = (to_rgb(colour) for colour in ("#d9dce1", KEPT, ORANGE))
    before, after, was = (_bits(rows) for rows in (crop.before, crop.after, crop.was))
    both = np.where(after[..., None] & was[..., None], kept, dropped)
    both = np.where(after[..., None] & ~was[..., None], new, both)
    figure = new_figure(5.0)
    grid = figure.subplots(4, 1, height_ratios=[1.4, 16, 1.4, 16])
    width, group = len(crop.channels), run.group
    most = max(*crop.channels, width - 1)
    rows = [
        (list(range(width)), np.where(before[..., None], kept, dropped), "before"),
        (list(crop.channels), both, "after"),
    ]
    for strip, axes, (order, cells, when) in zip(
        grid[::2], grid[1::2], rows, strict=True
    ):
        shown = np.array([order])
        strip.imshow(shown, cmap="cividis", vmin=0, vmax=most, aspect="auto")
        strip.set_title(f"{when}: the old place of every channel, and the mask")
        axes.imshow(_enlarged(cells, group), interpolation="none", aspect="auto")
        for each in (strip, axes):
            each.set(xticks=[], yticks=[])
            each.spines[:].set_visible(False)
        axes.set_ylabel(f"{len(cells)} outputs")
    grid[-1].set_xlabel(f"{width} inputs of {crop.name}, in groups")
    from matplotlib.patches import Patch

    colours = [(kept, "kept"), (new, "newly kept"), (dropped, "dropped")]
    handles = [Patch(color=colour, label=label) for colour, label in colours]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def budget(run: Run) -> "Figure | None":
    """The loss by the share of weights that stay dense, and the choice that was made."""
    known = run.budget
    if known is None or len(known.curve) < 2:
        return None
    figure = new_figure(2.6)
    axes = figure.subplots()
    points = [(100 * at.dense_share, at.validation) for at in known.curve]
    line = "before learning" if known.learned else "validation"
    axes.plot(*zip(*points, strict=True), color=BLUE, marker="o", label=line)
    *others, last = known.learned or (known.chosen,)
    for index, other in enumerate(others):
        at, label = (100 * other.dense_share, other.validation), "learned, not kept"
        axes.plot(*at, "*", color=GREY, markersize=9, label=label if not index else "")
    end = "this checkpoint, learned" if known.learned else "this checkpoint"
    chosen = 100 * last.dense_share, last.validation
    axes.plot(*chosen, "*", color=GREEN, markersize=12, label=end)
    axes.axhline(known.dense_loss, color=GREY, linestyle="--", label="dense")
    axes.set(xlabel="share of the weights that stay dense, %", ylabel="loss")
    from_zero(axes, [loss for _, loss in points])
    axes.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


PICTURES = (
    Picture(
        "learning",
        "Learning",
        "The loss on training data, its mean since the validation before, and on "
        "validation data, which chooses the best step.",
        learning,
    ),
    Picture("search", "Search", "The best validation loss after each round.", search),
    Picture(
        "budget",
        "Budget",
        "The loss on validation data, before any recovery, if more or fewer groups of "
        "linears stay dense. Where masks are learned, the line is of the search's masks, "
        "before learning, and stars are after it.",
        budget,
    ),
    Picture(
        "recovery",
        "Recovery",
        "Training of the kept weights under the fixed masks.",
        recovery,
    ),
    Picture(
        "retained",
        "What the masks keep",
        "By layer and kind of linear. Where learning is worth it, a mask keeps other "
        "weights than those of the largest scores: it may keep less score and yet be "
        "the better one.",
        retained,
    ),
    Picture(
        "sensitivity",
        "Where it is lost",
        "The share of its score that each layer loses, and where it was measured what "
        "that costs: weighed by how far an error of the output moves the predictions (the "
        "root of the Fisher diagonal), an estimate, in shares of what plain masks cost.",
        sensitivity,
    ),
    Picture(
        "channels",
        "Where the channels went",
        "The corner of the weight whose mask changed most. The strip says by its "
        "colour where each channel stood before; rows are the same outputs.",
        channels,
    ),
)


def _curve(
    entries: Sequence[Entry], borders: Sequence[int], label: str
) -> "Figure | None":
    """Losses by step with the best one marked, above the rate of the learning."""
    judged = [(e.place, e.validation) for e in entries if e.validation is not None]
    if len(judged) < 2:
        return None
    trained = [(e.place, e.loss) for e in entries if e.loss is not None]
    rates = [(e.place, e.rate) for e in entries if e.rate is not None]
    figure = new_figure(3.4 if rates else 2.6)
    if rates:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        below.plot(*zip(*rates, strict=True), color=GREY, marker="o", markersize=3)
        below.set(xlabel=label, ylabel="rate")
        from_zero(below, [rate for _, rate in rates])
        below.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        _whole_numbers(below)
    else:
        above = figure.subplots()
        above.set_xlabel(label)
        _whole_numbers(above)
    if trained:
        mark = {"color": ORANGE, "marker": "s", "linestyle": "--"}
        above.plot(*zip(*trained, strict=True), label="training", **mark)
    above.plot(*zip(*judged, strict=True), color=BLUE, marker="o", label="validation")
    best = min(judged, key=lambda pair: pair[1])
    above.plot(*best, "*", color=GREEN, markersize=12, label=f"best, step {best[0]}")
    for border in borders:
        above.axvline(border, color=INK, alpha=0.3, linewidth=1)
    above.set_ylabel("loss")
    from_zero(above, [loss for _, loss in (*judged, *trained)])
    above.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def _borders(run: Run) -> list[int]:
    """The steps at which one stage of the learning ends and the next begins."""
    learn = run.setting("learn")
    if not isinstance(learn, dict):
        return []
    steps, stages = learn.get("steps"), learn.get("stages")
    if isinstance(steps, int) and isinstance(stages, list):
        steps = [steps] * len(stages)
    if isinstance(steps, list | tuple) and all(isinstance(s, int) for s in steps):
        return list(accumulate(steps))[:-1]
    return []


def _largest(run: Run) -> Stack | None:
    """The stack with the most linears."""
    found = stacks(run.figures.linears)
    return max(found, key=lambda stack: len(stack.cells), default=None)


def _layers(stack: Stack) -> str:
    """What the numbers of a stack's layers count."""
    return f"layer of {stack.name}" if stack.name else ""


def _heat(
    figure: "Figure",
    axes: "Axes",
    stack: Stack,
    title: str,
    value: Callable[[Any], float],
) -> None:
    """Kinds by layers, coloured by a share."""
    nothing = float("nan")
    table = [
        [
            100 * value(stack.cells[kind, layer])
            if (kind, layer) in stack.cells
            else nothing
            for layer in stack.layers
        ]
        for kind in stack.kinds
    ]
    mesh = axes.pcolormesh(table, cmap="cividis", edgecolors="face", linewidth=0.3)
    axes.set_title(title + ", %")
    axes.set_yticks([i + 0.5 for i in range(len(stack.kinds))], list(stack.kinds))
    axes.invert_yaxis()
    every = -(-len(stack.layers) // 8)
    shown = range(0, len(stack.layers), every)
    axes.set_xticks([i + 0.5 for i in shown], [str(stack.layers[i]) for i in shown])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=12)
    bar.outline.set_visible(False)


def _before_and_after(
    axes: "Axes", layers: Sequence[int], values: Sequence[Sequence[float]], moved: bool
) -> None:
    before, after = values
    if moved:
        axes.plot(layers, after, color=BLUE, marker="s", label="mask of this run")
    drawn = "--" if moved else "o-"  # above a line that it hides
    axes.plot(layers, before, drawn, color=RED, label="plain mask")
    from_zero(axes, [*before, *after])


def _whole_numbers(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def _bits(rows: Sequence[str]) -> Any:
    """Strings of 0 and 1 as a boolean array."""
    import numpy as np

    return np.array([[bit == "1" for bit in row] for row in rows])


def _enlarged(cells: Any, group: int, times: int = 8) -> Any:
    """
    Each cell as a small square, so that no viewer blurs one into the next, with a gap
    between groups.

    :param cells: colours, [rows, channels, 3]
    :return: [rows, pixels, 4]
    """
    import numpy as np

    opaque = np.concatenate([cells, np.ones_like(cells[..., :1])], axis=-1)
    large = opaque.repeat(times, axis=0).repeat(times, axis=1)
    large[times - 1 :: times, :, 3] = 0
    for border in range(group, cells.shape[1], group):
        large[:, border * times - 2 : border * times, 3] = 0
    return large
