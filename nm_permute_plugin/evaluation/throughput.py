# SPDX-License-Identifier: Apache-2.0
"""Show how fast a model is served, sparse beside dense, as a table and as a plot."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nm_permute_plugin._words import install


@dataclass(frozen=True)
class Measurement:
    """
    The time of one phase at one batch size.

    :param phase: ``prefill`` or ``decode``
    :param batch: how many sequences are served at a time
    :param tokens: the tokens of all sequences in all steps
    :param steps: how many steps the engine took
    :param seconds: how long all steps took
    """

    phase: str
    batch: int
    tokens: int
    steps: int
    seconds: float

    @property
    def throughput(self) -> float:
        """Return the tokens a second."""
        return self.tokens / self.seconds

    @property
    def latency(self) -> float:
        """Return the milliseconds a step: to the first token, or from one to the next."""
        return 1e3 * self.seconds / self.steps


def throughput_table(
    sparse: Sequence[Measurement], dense: Sequence[Measurement]
) -> str:
    """
    Write both sides as a Markdown table.

    :param dense: the same phases and batches in the same order

    >>> fast, slow = (Measurement("decode", 2, 20, 10, s) for s in (0.5, 1.0))
    >>> print(throughput_table([fast], [slow]).splitlines()[-1])
    | decode | 2 | 40 | 20 | 50.0 | 100.0 | 2.00 |
    """
    lines = [
        "| phase | batch | sparse tokens/s | dense tokens/s | sparse ms | dense ms "
        "| sparse over dense |",
        "|---|---|---|---|---|---|---|",
    ]
    for left, right in zip(sparse, dense, strict=True):
        lines.append(
            f"| {left.phase} | {left.batch} | {left.throughput:.0f} "
            f"| {right.throughput:.0f} | {left.latency:.1f} | {right.latency:.1f} "
            f"| {left.throughput / right.throughput:.2f} |"
        )
    return "\n".join(lines)


def require_matplotlib() -> None:
    """
    Say early that a plot cannot be made.

    :raises ModuleNotFoundError: with the command that installs what is missing
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError(
            "the plot needs matplotlib, which is not installed: "
            f"{install('eval')}, or leave out --out"
        ) from error


def plot_throughput(
    sparse: Sequence[Measurement], dense: Sequence[Measurement], path: Path
) -> None:
    """
    Plot the tokens a second by batch size, one panel a phase.

    :param path: the image to write; its ending says which kind
    :raises ModuleNotFoundError: without matplotlib
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    phases = list(dict.fromkeys(m.phase for m in sparse))
    figure = Figure(figsize=(4.5 * len(phases), 3.5), layout="constrained")
    panels = figure.subplots(1, len(phases), squeeze=False)[0]
    for panel, phase in zip(panels, phases, strict=True):
        for side, measured in (("2:4", sparse), ("dense", dense)):
            shown = [m for m in measured if m.phase == phase]
            panel.plot(
                [m.batch for m in shown],
                [m.throughput for m in shown],
                marker="o",
                label=side,
            )
        panel.set(title=phase, xlabel="sequences at a time", ylabel="tokens / s")
        panel.set_xscale("log", base=2)
        panel.set_ylim(bottom=0)
        panel.legend()
    figure.savefig(path)
