# SPDX-License-Identifier: Apache-2.0
"""
How pictures look: colours that colour-blind readers tell apart, on light and on dark.

What is drawn in ``INK`` follows the reader's colour scheme in an SVG, and is dark on white
in a PNG.
"""

import re
from base64 import b64encode
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#2a2e34"
BLUE, ORANGE, GREEN, RED = "#0072b2", "#e69f00", "#009e73", "#d55e00"
PURPLE, GREY = "#cc79a7", "#8a8f98"
"""The palette of Okabe and Ito, and a grey."""

SERIES = (BLUE, RED, GREEN, ORANGE, PURPLE, GREY)
"""Lines of several runs take these in turn."""

MARKS = "osD^vPX"  # one more than colours: the pairs repeat late
"""Marks that tell lines apart without colour."""

WIDTH = 4.2
"""Inches: as wide as a telephone shows at its natural size."""

_STYLE = (
    f"<style>svg{{color:{INK};--blue:{BLUE}}}@media(prefers-color-scheme:dark)"
    "{svg{color:#dfe3e8;--blue:#4aa3df}}</style>"
)


def require_matplotlib() -> None:
    """
    See that pictures can be drawn.

    :raises ModuleNotFoundError: with the command that installs what is missing
    """
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError(
            f"a report needs {error.name}, which is not installed: pip install "
            f"{error.name}"
        ) from error


@contextmanager
def style() -> Iterator[None]:
    """The look of all pictures, whatever a user's own matplotlibrc says."""
    import matplotlib

    look = {
        "text.parse_math": False,  # names of modules and runs are no formulas
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.titlesize": 10,
        "axes.labelsize": 10,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "legend.fontsize": 9,
        "legend.frameon": False,
        "legend.handlelength": 1.6,
        "legend.columnspacing": 1.2,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "grid.color": INK,
        "grid.alpha": 0.15,
        "lines.linewidth": 1.6,
        "lines.markersize": 4.5,
        "svg.hashsalt": "nm_permute",
    }
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **look}):
        yield


def new_figure(height: float) -> "Figure":
    """An empty figure of the width of all, ``height`` inches high."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def from_zero(axes: "Axes", values: Iterable[float]) -> None:
    """Let an axis begin at 0 and end a little above the largest value."""
    largest = max(values, default=0)
    axes.set_ylim(0, 1.08 * largest if largest > 0 else 1)
    axes.grid(axis="y")


def as_svg(figure: "Figure") -> str:
    """A figure as a ``data:`` address of an SVG that follows the colour scheme."""
    file = BytesIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue().decode()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    figure.set_layout_engine("none")  # it has been laid out: a PNG is drawn alike
    text = text[text.index("<svg") :]
    text = text.replace(INK, "currentColor").replace(BLUE, "var(--blue)")
    opening, rest = text.split(">", 1)
    coded = b64encode(f"{opening}>{_STYLE}{rest}".encode()).decode()
    return f"data:image/svg+xml;base64,{coded}"


def as_png(figure: "Figure") -> bytes:
    """A figure as a PNG on white."""
    file = BytesIO()
    figure.savefig(file, format="png", dpi=160, facecolor="white")
    return file.getvalue()
