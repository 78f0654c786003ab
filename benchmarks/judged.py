# SPDX-License-Identifier: Apache-2.0
"""
How near a run's checkpoint is to the dense model, and how it does on HellaSwag.

A run measures all on one checkpoint that was read back; ``judged_table`` shows the means
over seeds with their standard errors, and the paired difference to the dense model.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from hellaswag import Answers, answer
from nm_permute_plugin.evaluation.card import markdown_table
from nm_permute_plugin.evaluation.fidelity import fidelity
from nm_permute_plugin.evaluation.perplexity import perplexity
from nm_permute_plugin.evaluation.pretrained import load_checkpoint, tokenizer_of
from nm_permute_plugin.evaluation.text import Window
from tasks.hellaswag_file import Item

HEAD = (
    "method",
    "seeds",
    "KL divergence",
    "top-1 agreement",
    "flips",
    "HellaSwag acc",
    "acc_norm",
    "acc_norm - dense",
    "items flipped",
)

FIDELITY = ("divergence", "agreement", "flips")

METRICS = ("acc", "acc_norm")


@dataclass(frozen=True)
class Judge:
    """
    Measures checkpoints as they are read back from disk.

    :param dense: the folder of the dense model
    :param items: of HellaSwag; none where it is not asked
    """

    dense: Path
    windows: Sequence[Window]
    items: Sequence[Item]
    device: str
    batch_size: int

    def of_dense(self) -> dict[str, Any]:
        """What ``of`` measures of a checkpoint, of the dense model itself."""
        model = load_checkpoint(self.dense, self.device)
        value = perplexity(model, self.windows, self.batch_size)
        return {"perplexity": value, **self._answers(model, self.dense)}

    def of(self, folder: str | Path) -> dict[str, Any]:
        """Perplexity, fidelity and answers of a checkpoint; they fit into JSON."""
        model = load_checkpoint(folder, self.device)
        dense = load_checkpoint(self.dense, self.device)
        found = fidelity(model, dense, self.windows, self.batch_size)
        del dense
        shares = {name: getattr(found, name) for name in FIDELITY}
        return {
            "perplexity": found.perplexity,
            **shares,
            **self._answers(model, folder),
        }

    def _answers(self, model: nn.Module, folder: str | Path) -> dict[str, Any]:
        if not self.items:
            return {}
        found = answer(model, tokenizer_of(folder), self.items)
        return {"hellaswag": {name: _digits(found, name) for name in METRICS}}


def judged_table(record: dict[str, Any]) -> str:
    """
    Means over the seeds as a Markdown table; "" where nothing of it was measured.

    Behind ± stand standard errors: over the seeds for what is measured on text, over the
    items for answers, where an item counts as its mean over the seeds.
    """
    dense = record.get("dense_hellaswag")
    rows = []
    for method, results in _by_method(record).items():
        cells = [method, str(len(results))]
        for name, form in zip(FIDELITY, (".4f", ".2%", ".2%"), strict=True):
            cells.append(_over_seeds([result[name] for result in results], form))
        answers = [result["hellaswag"] for result in results if "hellaswag" in result]
        rows.append([*cells, *_answer_cells(answers, dense)])
    if not rows:
        return ""
    if dense is not None:
        cells = [_over_items(_items([dense], name)) for name in METRICS]
        rows.insert(0, ["dense", "", "", "", "", *cells, "", ""])
    return markdown_table(HEAD, rows)


def _answer_cells(
    answers: Sequence[dict[str, str]], dense: dict[str, str] | None
) -> list[str]:
    if not answers:
        return [""] * 4
    ours = {name: _items(answers, name) for name in METRICS}
    cells = [_over_items(ours[name]) for name in METRICS]
    if dense is None:
        return [*cells, "", ""]
    theirs = _items([dense], "acc_norm")
    differences = [a - b for a, b in zip(ours["acc_norm"], theirs, strict=True)]
    flipped = [
        sum(a != b for a, b in zip(of["acc_norm"], dense["acc_norm"], strict=True))
        for of in answers
    ]
    share = statistics.mean(flipped) / len(theirs)
    return [*cells, _over_items(differences, "+.2%"), f"{share:.2%}"]


def _by_method(record: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The runs whose fidelity was measured."""
    found: dict[str, list[dict[str, Any]]] = {}
    for result in record["results"]:
        if "divergence" in result:
            found.setdefault(result["method"], []).append(result)
    return found


def _digits(answers: Answers, name: str) -> str:
    """A digit an item, 1 where it is right."""
    return "".join("01"[right] for right in getattr(answers, name))


def _items(answers: Sequence[dict[str, str]], name: str) -> list[float]:
    """Every item's mean over the seeds."""
    columns = zip(*(of[name] for of in answers), strict=True)
    return [column.count("1") / len(answers) for column in columns]


def _over_seeds(values: Sequence[float], form: str) -> str:
    shown = format(statistics.mean(values), form)
    return shown if len(values) < 2 else f"{shown} ± {_error(values):{form}}"


def _over_items(values: Sequence[float], form: str = ".2%") -> str:
    mean = format(statistics.mean(values), form)
    return mean if len(values) < 2 else f"{mean} ± {_error(values):.2%}"


def _error(values: Sequence[float]) -> float:
    """The standard error of the mean."""
    return statistics.stdev(values) / math.sqrt(len(values))
