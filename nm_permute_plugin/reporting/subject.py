# SPDX-License-Identifier: Apache-2.0
"""What a page tells of one checkpoint, and the words that it tells it in."""

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nm_permute_plugin._words import file_size, memory_size
from nm_permute_plugin.reporting.measured import Measured, Text
from nm_permute_plugin.reporting.run import Run
from nm_permute_plugin.reporting.table import Table, words

DEEPEST = 4
"""Settings lie no deeper; what does is shown as it is."""


@dataclass(frozen=True)
class Subject:
    """
    One checkpoint with all that is known of it.

    :param name: what the page calls it
    :param stored: bytes that its weights take on disk, and that they would take without
        sparse storage; None where it was not looked at
    """

    name: str
    run: Run
    measured: Measured = Measured()
    stored: tuple[int, int] | None = None

    @property
    def verdict(self) -> str:
        """What was lost, what was regained, and what it costs to serve: one sentence."""
        return f"{self._quality()}; {self._serving()}."

    def _quality(self) -> str:
        run, known = self.run, self.measured.telling
        if known is not None:
            return _on_text(known, run)
        kept = run.retained
        by = f"{run.score} " if run.score else ""
        lost = "" if kept is None else f"{_percent(1 - kept[0])} of the {by}score"
        if run.setting("prune") is False:
            said = "This run moved channels and pruned nothing"
            return f"{said} (a {run.pattern} mask would lose {lost})" if lost else said
        first = f"{run.pattern} by the plain {by}mask"
        losses = run.losses
        if run.method == "identity" or losses is None:
            told = f"{first} loses {lost}" if lost else f"The weights are {first}"
            if run.method == "identity" and not run.recovered:
                told += ", and nothing was searched or learned to regain it"
            return told
        before, after = losses
        told = f"{first} loses {lost}" if lost else first
        if before is None:
            return f"{told}; this run has a validation loss of {after:.3f}"
        told += f" and has a validation loss of {before:.3f}"
        gained = f"this run brought it to {after:.3f}"
        if run.setting("loss") and _starts_at_zero(run) and before > 0:
            gained += f", which regains {_percent(1 - after / before)} of what was lost"
        return f"{told}; {gained}"

    def _serving(self) -> str:
        free = "serving it costs nothing at run time"
        if self.run.permuted:
            free += ", because the permutation is folded into the weights"
        if self.stored is None:
            return free
        ours, dense = self.stored
        size = f"{free}, and the weights take {file_size(ours)} on disk"
        return (
            f"{size} where dense ones take {file_size(dense)}" if ours < dense else size
        )

    @property
    def results(self) -> list[Table]:
        """What was measured, on texts and on tasks; what nobody measured is left out."""
        texts, tasks = self.measured.texts, self.measured.tasks
        tables = []
        if texts:
            columns = {
                "text": [text.title for text in texts],
                "tokens": [words(t.tokens, "{:,}".format) for t in texts],
                "perplexity": [f"{text.perplexity:.2f}" for text in texts],
                "dense": [words(t.dense, "{:.2f}".format) for t in texts],
                "without permutation": [words(t.base, "{:.2f}".format) for t in texts],
                "gap closed": [words(t.gap, "{:.1%}".format) for t in texts],
                "KL, nats a token": [
                    words(t.divergence, "{:.4f}".format) for t in texts
                ],
                "same next token": [words(t.agreement, "{:.1%}".format) for t in texts],
                "flips": [words(t.flips, "{:.1%}".format) for t in texts],
            }
            tables.append(Table.of(columns))
        if tasks:
            columns = {
                "task": [task.title for task in tasks],
                "items": [words(t.items, "{:,}".format) for t in tasks],
                "value": [f"{task.value:.4f}" for task in tasks],
                "±": [words(t.error, "{:.4f}".format) for t in tasks],
                "dense": [words(t.dense, "{:.4f}".format) for t in tasks],
                "recovery": [words(t.recovery, "{:.1%}".format) for t in tasks],
                "flips": [words(t.flips, "{:.1%}".format) for t in tasks],
            }
            tables.append(Table.of(columns))
        return tables

    @property
    def fold(self) -> str:
        """How exact the fold was."""
        error = self.run.fold_error
        if error is None:
            return ""
        if not self.run.permuted:
            return "No channel moved, and so there was nothing to fold."
        dtype = self.run.environment.get("dtype")
        where = f" in {dtype}" if dtype else ""
        if error == 0:
            return f"The fold changed no output of the model{where}, not by one bit."
        return (
            f"Permuting the channels moved the dense model's outputs by {error:.1e} of "
            f"their size{where}: rounding, because sums are added in another order. A "
            "fold that rounding does not explain is undone and refused."
        )

    @property
    def stages(self) -> list[dict[str, Any]]:
        """The stages with their seconds, share of the time, and bytes."""
        seconds, memory = self.run.seconds, self.run.memory
        total = sum(seconds.values())
        return [
            {
                "name": name,
                "seconds": of,
                "share": of / total if total > 0 else 0,
                "memory": memory_size(memory[name]) if name in memory else "",
            }
            for name, of in seconds.items()
        ]

    @property
    def surroundings(self) -> list[tuple[str, str]]:
        """The machine and the versions, in words."""
        said = {
            key: memory_size(int(value)) if key.endswith("memory") else str(value)
            for key, value in self.run.environment.items()
        }
        told = [(key.replace("_", " "), value) for key, value in said.items()]
        return [*told, *self.run.versions.items()]

    @property
    def settings(self) -> list[str]:
        """The effective settings, one line each."""
        return list(_lines("", self.run.modifier))

    @property
    def commands(self) -> list[str]:
        """What may be done next, from the folder that holds the checkpoint."""
        name = shlex.quote(self.name)
        return [
            f"nm-permute verify {name}",
            f"nm-permute evaluate {name} --text TEST.txt --dense DENSE_MODEL",
            f"nm-permute report {name}   # makes this page anew",
            f"vllm serve {name}   # where vLLM is, with this plugin",
        ]


def _on_text(result: Text, run: Run) -> str:
    ours, dense, base, gap = result.perplexity, result.dense, result.base, result.gap
    if not dense:
        return f"On {result.text} the perplexity is {ours:.2f}"
    told = f"On {result.text} the dense model's perplexity is {dense:.2f}"
    if gap is None or base is None:
        times = f"{ours / dense:.2f} times as much"
        return f"{told} and this checkpoint's {ours:.2f}, {times}"
    return (
        f"{told}; pruned {run.pattern} without a permutation it is {base:.2f}, and this "
        f"run's {ours:.2f} regains {_percent(gap)} of the gap"
    )


def _starts_at_zero(run: Run) -> bool:
    """Whether the dense model's loss would be 0."""
    loss = run.setting("loss")
    return isinstance(loss, Mapping) and not loss.get("cross_entropy")


def _lines(above: str, settings: Mapping[str, Any]) -> Iterator[str]:
    for name, value in settings.items():
        if isinstance(value, Mapping) and value and above.count(".") < DEEPEST:
            yield from _lines(f"{above}{name}.", value)
        else:
            yield f"{above}{name}: {json.dumps(value, ensure_ascii=False)}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
