# SPDX-License-Identifier: Apache-2.0
"""The README.md of a checkpoint: what it is, how it was made, how to load it."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loguru import logger

from nm_permute_plugin.checkpoint.config import Format, quantization_format
from nm_permute_plugin.checkpoint.directory import open_checkpoint, read_json
from nm_permute_plugin.checkpoint.plan import experts_of
from nm_permute_plugin.checkpoint.record import Promise
from nm_permute_plugin.checkpoint.task import task_of
from nm_permute_plugin.maths.pattern import NMPattern

CARD = "README.md"
OURS = "<!-- written by nm-permute-plugin -->"
_EVALUATION = ("<!-- evaluation -->", "<!-- end of evaluation -->")
_STORAGE = ("<!-- storage -->", "<!-- end of storage -->")
_TABLE = [
    "| text | window | tokens | perplexity | gap closed |",
    "|---|---|---|---|---|",
]


@dataclass(frozen=True)
class Card:
    """
    What a card tells that the checkpoint's other files do not.

    :param base_model: a hub name, or the name of the folder that the model came from
    :param pruned: the modules that follow the pattern; none where nothing was pruned
    :param fold_error: relative change of the dense outputs by the fold
    :param retained: share of the total score that the masks keep, before and after
    :param history: what the validation rows said while the order was learned
    :param versions: of packages, by name
    :param format: how they are stored
    :param reason: why
    :param transposed: the pruned modules that are stored as [in, out]
    """

    base_model: str
    pattern: NMPattern
    pruned: Sequence[str]
    fold_error: float
    retained: tuple[float, float]
    history: Sequence[Mapping[str, int | float]]
    versions: Mapping[str, str]
    format: Format = "dense"
    reason: str = ""
    transposed: Sequence[str] = ()


@dataclass(frozen=True)
class Evaluation:
    """
    One measurement of the checkpoint, read back from disk.

    :param text: the name of the text
    :param window: tokens of a window
    :param gap: the gap closed, 0 to 1; None where there is no base to compare with
    """

    text: str
    window: int
    tokens: int
    perplexity: float
    gap: float | None = None


def write_card(checkpoint: Path, card: Card) -> None:
    """Write ``README.md`` of a checkpoint whose other files are there already."""
    text = "\n\n".join(
        [
            _front_matter(checkpoint, card),
            OURS,
            f"# {card.base_model.rpartition('/')[2]}, {_title(card)}",
            _what(card),
            "\n".join(_STORAGE),
            "## Evaluation",
            *_evaluation(checkpoint, card),
            "## How it was made",
            _making(checkpoint, card),
        ]
    )
    (checkpoint / CARD).write_text(text + "\n", encoding="utf-8")
    promise = Promise(list(card.pruned), card.pattern, list(card.transposed))
    write_storage(checkpoint, promise, card.format, card.reason)


def write_storage(
    checkpoint: Path, promise: Promise, format: Format, reason: str
) -> None:
    """
    Say in a checkpoint's card how it is stored and loaded, in place of what stood there.

    :param reason: why it is stored so
    :raises ValueError: if the folder has no card of ours
    """
    parts = [
        "## What is sparse, and what is not",
        _sparse(checkpoint, promise, format, reason),
        "## How to load it",
        _loading(checkpoint, format),
    ]
    _, text = _block(checkpoint, _STORAGE)
    _replace(checkpoint, text, _STORAGE, "\n\n" + "\n\n".join(parts) + "\n\n")


def add_evaluation(checkpoint: Path, row: Evaluation) -> None:
    """
    Put a row into the table of a checkpoint's card, in place of one like it.

    :raises ValueError: if the folder has no card of ours
    """
    block, text = _block(checkpoint, _EVALUATION)
    name = row.text.replace("|", "/")
    begin = f"| {name} | {row.window} |"
    gap = "" if row.gap is None else f"{row.gap:.1%}"
    kept = [
        line
        for line in block.strip().splitlines()[len(_TABLE) :]
        if not line.startswith(begin)
    ]
    line = f"{begin} {row.tokens} | {row.perplexity:.2f} | {gap} |"
    table = "\n".join(["", *_TABLE, *kept, line, ""])
    _replace(checkpoint, text, _EVALUATION, table)


def is_ours(checkpoint: Path) -> bool:
    """Whether the folder has a README.md that was written here."""
    path = checkpoint / CARD
    return path.exists() and OURS in path.read_text(encoding="utf-8", errors="replace")


def keep_foreign_card(folder: Path) -> None:
    """Move a README.md that we did not write out of the way, and say so."""
    path = folder / CARD
    if not path.exists() or is_ours(folder):
        return
    number, kept = 2, folder / "README.old.md"
    while kept.exists():
        number, kept = number + 1, folder / f"README.old{number}.md"
    path.rename(kept)
    logger.warning(f"{path} was there before; it is {kept.name} now")


def _front_matter(checkpoint: Path, card: Card) -> str:
    tags = ["nm-permute-plugin", "llm-compressor", "compressed-tensors"]
    if card.pruned:
        tags += ["sparsity", str(card.pattern).replace(":", "of")]
    task = task_of(read_json(checkpoint / "config.json"))
    lines = ["library_name: transformers", f"pipeline_tag: {task.tag}"]
    if "/" in card.base_model:  # a hub would link the name of a folder to a stranger
        lines.append(f"base_model: {json.dumps(card.base_model)}")
    lines += ["tags:", *(f"- {tag}" for tag in tags)]
    return "\n".join(["---", *lines, "---"])


def _title(card: Card) -> str:
    return f"{card.pattern} sparse" if card.pruned else "channels reordered"


def _what(card: Card) -> str:
    made = (
        f"`{card.base_model}`, its channels reordered and the order written into the "
        "weights: nothing is permuted when the model runs. On calibration data the "
        f"dense model's outputs moved by {card.fold_error:.1e} (relative), which is "
        "rounding: the order alone changes nothing."
    )
    if not card.pruned:
        return made + " Nothing is pruned."
    before, after = card.retained
    return made + (
        f" Then the recipe below kept {card.pattern.n} of every {card.pattern.m} "
        f"neighbouring weights. The best masks hold {after:.4f} of the total score that "
        f"the order was made for, {before:.4f} in the order as it was."
    )


def _sparse(checkpoint: Path, promise: Promise, format: Format, reason: str) -> str:
    pruned = promise.modules
    opened = open_checkpoint(checkpoint)
    size = sum(shard.path.stat().st_size for shard in opened.shards) / 1e6
    quantized = quantization_format(opened.config)
    stored = {
        "dense": "dense, zeros included",
        "sparse-24-bitmask": "`sparse-24-bitmask` (values and a bitmask)",
        "sparse-bitmask": "`sparse-bitmask` (values and a bitmask)",
    }[format]
    others = [name for name in opened.matrices() if name not in set(pruned)]
    lines = [
        f"- {promise.pattern}: {len(pruned)} modules: {_families(pruned)}",
        f"- stored {stored}: {reason}",
        f"- not sparse: {_families(others) or 'no other matrix'}; biases and norms",
        f"- quantization: {f'`{quantized}`' if quantized else 'none'}",
        f"- weight files: {size:.1f} MB",
    ]
    if promise.transposed:
        lines.insert(
            1,
            f"- {len(promise.transposed)} of them store their weight as [in, out] "
            "(Conv1D): there the pattern runs down the columns, and no sparse format or "
            "kernel takes it",
        )
    return "\n".join(lines if pruned else lines[3:])


def _families(modules: Sequence[str]) -> str:
    """Names with their layer's number left out, each with how often it is there."""
    counts = Counter(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in modules)
    return ", ".join(
        f"`{name}`" + (f" ({count})" if count > 1 else "")
        for name, count in counts.items()
    )


def _evaluation(checkpoint: Path, card: Card) -> list[str]:
    """The table of perplexities, for a model of text, and what is known already."""
    if task_of(read_json(checkpoint / "config.json")).pictures:
        said = (
            "`nm-permute evaluate FOLDER --images PICTURES --dense DENSE` measures its "
            "accuracy, and how near its features are to the dense model's."
        )
        return [said + _validation(card)]
    said = (
        "Rows are added by `nm-permute evaluate FOLDER --text FILE --card`: perplexity "
        "of the checkpoint as it is read back, one token stream, windows that do not "
        "overlap."
    )
    table = "\n".join([_EVALUATION[0], *_TABLE, _EVALUATION[1]])
    return [table, said + _validation(card)]


def _validation(card: Card) -> str:
    if not card.history:
        return ""
    first = card.history[0]["validation"]
    best = min(entry["validation"] for entry in card.history)
    return (
        " While the order was learned, the loss on validation rows of the calibration "
        f"data went from {first:.4f} to {best:.4f} (before any quantization). That is "
        "the loss of the recipe on data that chose the order: no test result."
    )


def _loading(checkpoint: Path, format: Format) -> str:
    config = read_json(checkpoint / "config.json")
    task = task_of(config)
    python = (
        f"```python\n{{first}}from transformers import {task.auto_class}\n\n"
        f'model = {task.auto_class}.from_pretrained("FOLDER", dtype="auto")\n```'
    )
    if format == "dense":
        needs = (
            " with compressed-tensors installed" if quantization_format(config) else ""
        )
        loads = " loads" if task.pictures else " and vLLM load"
        return (
            f"An ordinary checkpoint: transformers{needs}{loads} it with no "
            "plugin, and run it as a dense model.\n\n" + python.format(first="")
        )
    if task.pictures:
        return (
            "- transformers 5: `pip install nm-permute-plugin[compress]`, then\n\n"
            + python.format(first="import nm_permute_plugin\n")
            + "\n\n- anywhere else: `nm-permute convert FOLDER OUT --format dense` first; "
            "no weight changes a bit. vLLM serves no models of pictures alone."
        )
    text = (
        "- transformers 5: `pip install nm-permute-plugin[compress]`, then\n\n"
        + python.format(first="import nm_permute_plugin\n")
        + "\n\n- vLLM: "
    )
    formats = open_checkpoint(checkpoint).formats
    experts = any(formats[name] != "dense" for name in experts_of(formats))
    if experts:
        text += (
            "not before `nm-permute convert FOLDER OUT --dense-experts`: it serves no "
            "sparse experts"
        )
    else:
        text += "`pip install nm-permute-plugin[vllm]`, then `vllm serve FOLDER`"
    if not experts and format == "sparse-24-bitmask":
        text += (
            "\n- vLLM up to 0.18.1, on Hopper GPUs, without the plugin: "
            "`nm-permute convert FOLDER OUT --legacy` first"
        )
    return text + (
        "\n- anywhere else: `nm-permute convert FOLDER OUT --format dense` first; no "
        "weight changes a bit\n\n"
        "**Without the plugin** this folder is not readable: compressed-tensors 0.15 "
        "and later have no codec for it. transformers 5 raises an AttributeError, or, "
        "where the weights are quantized too, starts from random ones with a warning; "
        "vLLM 0.19 and later refuse it."
    )


def _making(checkpoint: Path, card: Card) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in card.versions.items())
    recipe = checkpoint / "recipe.yaml"
    text = f"Versions: {versions}."
    if recipe.exists():
        text += f"\n\n```yaml\n{recipe.read_text(encoding='utf-8').strip()}\n```"
    return text + (
        "\n\nThe orders, all settings and the figures of the run are in the folder "
        "`nm_permute`; `nm-permute verify FOLDER` checks the files."
    )


def _block(checkpoint: Path, marks: tuple[str, str]) -> tuple[str, str]:
    """What stands between two marks of the card, and the whole card."""
    path = checkpoint / CARD
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    begin, end = text.find(marks[0]), text.find(marks[1])
    if not 0 <= begin < end:
        raise ValueError(
            f"{path} has no place for this, between {marks[0]!r} and {marks[1]!r}; it "
            "was not written by nm-permute-plugin, or changed since"
        )
    return text[begin + len(marks[0]) : end], text


def _replace(checkpoint: Path, text: str, marks: tuple[str, str], new: str) -> None:
    before, after = text.split(marks[0], 1)[0], text.split(marks[1], 1)[1]
    card = f"{before}{marks[0]}{new}{marks[1]}{after}"
    (checkpoint / CARD).write_text(card, encoding="utf-8")
