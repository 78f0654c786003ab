# SPDX-License-Identifier: Apache-2.0
"""Write the README.md of a checkpoint: what it is, how it was made, how to load it."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nm_permute_plugin._words import file_size
from nm_permute_plugin.checkpoint.card_file import (
    CARD,
    EVALUATION,
    MARK,
    block,
    replace,
)
from nm_permute_plugin.checkpoint.config import Format, quantization_format
from nm_permute_plugin.checkpoint.directory import Checkpoint, open_checkpoint
from nm_permute_plugin.checkpoint.plan import experts_of
from nm_permute_plugin.checkpoint.record import Promise
from nm_permute_plugin.maths.pattern import NMPattern

_STORAGE = ("<!-- storage -->", "<!-- end of storage -->")
_TASKS = {
    "ForCausalLM": ("text-generation", "CausalLM"),
    "LMHeadModel": ("text-generation", "CausalLM"),
    "ForConditionalGeneration": ("image-text-to-text", "ImageTextToText"),
    "ForImageClassification": ("image-classification", "ImageClassification"),
    "ForSequenceClassification": ("text-classification", "SequenceClassification"),
    "ForTokenClassification": ("token-classification", "TokenClassification"),
}
"""Maps a part of a class's name to the hub's word for the task, and to its loader."""

_ADAPTERS = (
    "\n\nIts channels have other places, so that nothing that was made for the channels of "
    "`{base}` fits: LoRA adapters, draft models that read hidden states, probes and "
    "steering vectors give wrong results, without an error. "
    "`nm-permute adapt ADAPTER FOLDER OUT` carries a LoRA adapter over."
)
_INSTALL = (
    "No index of packages has the plugin yet: `pip install '.[...]'` is run in the folder "
    "of nm-permute-plugin's repository.\n\n"
)


@dataclass(frozen=True)
class Card:
    """
    Holds what a card tells and the checkpoint's other files do not.

    :param base_model: a hub name, or the name of the folder that the model came from
    :param pruned: the modules that follow the pattern; none where nothing was pruned
    :param fold_error: the relative change of the dense outputs by the fold
    :param retained: the share of the total score that the best masks keep, before and
        after the permutation
    :param history: the validation losses while the masks were learned
    :param versions: the versions of packages, by name
    :param format: how the pruned modules are stored
    :param reason: why they are stored so
    :param transposed: the pruned modules that are stored as [in, out]
    :param base: what holds of the base model's front matter too
    :param moved: whether channels have other places than in the base model
    :param stays_dense: how many of the linears stay dense by a budget
    :param changed_later: whether the kept weights changed in a later session
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
    base: Mapping[str, object] = field(default_factory=dict)
    moved: bool = False
    stays_dense: int = 0
    changed_later: bool = False


def write_card(checkpoint: Checkpoint, card: Card) -> None:
    """Writes the ``README.md`` of a checkpoint whose other files are there already."""
    text = "\n\n".join(
        [
            _front_matter(checkpoint, card),
            MARK,
            f"# {card.base_model.rpartition('/')[2]}, {_title(card)}",
            _what(card),
            "\n".join(_STORAGE),
            "## Evaluation",
            *_evaluation(checkpoint, card),
            "## How it was made",
            _making(checkpoint, card),
        ]
    )
    (checkpoint.path / CARD).write_text(text + "\n", encoding="utf-8")
    promise = Promise(list(card.pruned), card.pattern, list(card.transposed))
    _write_storage(checkpoint, promise, card.format, card.reason)


def write_storage(folder: Path, promise: Promise, format: Format, reason: str) -> None:
    """
    Says anew in a checkpoint's card how it is stored and loaded.

    :param reason: why it is stored so
    :raises ValueError: if the folder has no card of ours
    """
    _write_storage(open_checkpoint(folder), promise, format, reason)


def _write_storage(
    checkpoint: Checkpoint, promise: Promise, format: Format, reason: str
) -> None:
    parts = [
        "## What is sparse, and what is not",
        _sparse(checkpoint, promise, format, reason),
        "## How to load it",
        _loading(checkpoint, format),
    ]
    _, text = block(checkpoint.path, _STORAGE)
    replace(checkpoint.path, text, _STORAGE, "\n\n" + "\n\n".join(parts) + "\n\n")


def _task_of(config: Mapping[str, Any]) -> tuple[str, str, bool]:
    """
    Finds out what a model does: the hub's word for it, the class that loads it, and
    whether it takes images alone, which no text measures and vLLM does not serve.

    >>> _task_of({"architectures": ["Dinov2Model"], "patch_size": 14})
    ('image-feature-extraction', 'AutoModel', True)
    """
    images = "patch_size" in config
    name = (config.get("architectures") or ["" if images else "ForCausalLM"])[0]
    for part, (tag, loader) in _TASKS.items():
        if part in name:
            return tag, f"AutoModelFor{loader}", tag == "image-classification"
    return "image-" * images + "feature-extraction", "AutoModel", images


def _front_matter(checkpoint: Checkpoint, card: Card) -> str:
    import yaml

    tags = ["nm-permute-plugin", "llm-compressor", "compressed-tensors"]
    if card.pruned:
        tags += ["sparsity", str(card.pattern).replace(":", "of")]
    tag, _, _ = _task_of(checkpoint.config)
    theirs = card.base.get("tags", ())
    before = theirs if isinstance(theirs, list) else []
    matter = {"library_name": "transformers", "pipeline_tag": tag, **card.base}
    # the hub would take a folder's name for a model of its own
    if "/" in card.base_model:
        matter["base_model"] = card.base_model
    matter["tags"] = list(dict.fromkeys([*before, *tags]))
    text = yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)
    return f"---\n{text}---"


def _title(card: Card) -> str:
    return f"{card.pattern} sparse" if card.pruned else "channels permuted"


def _what(card: Card) -> str:
    made = f"`{card.base_model}`, whose channels stay where they are."
    adapters, then = "", "The"
    if card.moved:
        made = (
            f"`{card.base_model}`, its channels permuted within the weights: "
            "nothing is permuted when the model runs. On calibration data the "
            f"dense model's outputs moved by {card.fold_error:.1e} (relative), which is "
            "rounding: the permutation alone changes nothing."
        )
        adapters, then = _ADAPTERS.format(base=card.base_model), "Then the"
    if not card.pruned:
        return made + " Nothing is pruned." + adapters
    before, after = card.retained
    if card.changed_later:
        later = (
            " In a later session the kept weights were trained further, or quantized"
        )
        pruned = "Then it was pruned" if card.moved else "It was pruned"
        return f"{made} {pruned} {card.pattern}.{later}; the zeros stayed.{adapters}"
    kept = (
        f" {then} recipe below kept {card.pattern.n} of every {card.pattern.m} "
        f"neighbouring weights, which hold {after:.4f} of the total score"
    )
    if card.moved:
        kept += (
            f" that the permutation was made for; the best masks without it hold "
            f"{before:.4f}"
        )
    if card.stays_dense:
        kept += (
            f". By the recipe's budget {card.stays_dense} of the "
            f"{card.stays_dense + len(card.pruned)} linears stay dense: those whose masks "
            "cost most"
        )
    return f"{made}{kept}.{adapters}"


def _quantization(format: str | None) -> str:
    """Says what is quantized, by the name of its format."""
    if format == "dense":
        return "of keys and values alone"
    return f"`{format}`" if format else "none"


def _sparse(
    checkpoint: Checkpoint, promise: Promise, format: Format, reason: str
) -> str:
    pruned = promise.modules
    size = sum(shard.path.stat().st_size for shard in checkpoint.shards)
    quantized = quantization_format(checkpoint.config)
    sparse = f"`{format}` (values and a bitmask)"
    stored = "dense, zeros included" if format == "dense" else sparse
    others = [name for name in checkpoint.matrices() if name not in set(pruned)]
    lines = [
        f"- {promise.pattern}: {len(pruned)} modules: {_families(pruned)}",
        f"- stored {stored}: {reason}",
        f"- not sparse: {_families(others) or 'no other matrix'}; biases and norms",
        f"- quantization: {_quantization(quantized)}",
        f"- weight files: {file_size(size)}",
    ]
    if promise.transposed:
        lines[0] += (
            f"\n- {len(promise.transposed)} of them store their weight as [in, out] "
            "(Conv1D): there the pattern runs down the columns, and no sparse format or "
            "kernel takes it"
        )
    lines.append(
        "- to train it further: `nm_permute_plugin.keep_masks(model)` keeps the zeros, and "
        "`nm_permute_plugin.save(model, FOLDER)` writes a checkpoint that is "
        f"{promise.pattern} again. Without it the model turns dense at the first step"
    )
    return "\n".join(lines if pruned else lines[3:-1])


def _families(modules: Sequence[str]) -> str:
    """Lists names without their layers' numbers, each with how often it is there."""
    counts = Counter(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in modules)
    return ", ".join(
        f"`{name}`" + (f" ({count})" if count > 1 else "")
        for name, count in counts.items()
    )


def _evaluation(checkpoint: Checkpoint, card: Card) -> list[str]:
    """Writes the table of perplexities of a text model, and what is known already."""
    _, _, images = _task_of(checkpoint.config)
    if images:
        said = (
            "`nm-permute evaluate FOLDER --images IMAGES --dense DENSE` measures its "
        )
        said += "accuracy, and how near its features are to the dense model's."
        return [said + _validation(card)]
    said = (
        "Rows are added by `nm-permute evaluate FOLDER --text FILE --dense DENSE --card` "
        "(windows do not overlap; gap closed: from the perplexity in brackets, without a "
        "permutation, to the dense model's, on a logarithmic scale; "
        "against the dense model: the mean KL divergence in nats "
        "a token, the share of tokens whose most likely next token is the same, and, as "
        "flips, of those where exactly one of the two predicts the text) and by "
        "`nm-permute lm-eval FOLDER --tasks TASK --dense DENSE --card` (flips: the share "
        "of the items that exactly one of the two answers rightly). All measure the "
        "checkpoint as it is read back."
    )
    table = "\n".join(EVALUATION)
    return [table, said + _validation(card)]


def _validation(card: Card) -> str:
    if not card.history:
        return ""
    first = card.history[0]["validation"]
    best = min(entry["validation"] for entry in card.history)
    return (
        " While it was learned, the loss on the validation rows of the calibration "
        f"data went from {first:.4f} to {best:.4f} (before any quantization). That is "
        "the recipe's loss on data that chose the best step: no test result."
    )


def _loading(checkpoint: Checkpoint, format: Format) -> str:
    _, loader, images = _task_of(checkpoint.config)
    python = (
        f"```python\n{{first}}from transformers import {loader}\n\n"
        f'model = {loader}.from_pretrained("FOLDER", dtype="auto")\n```'
    )
    if format == "dense":
        quantized = quantization_format(checkpoint.config) is not None
        needs = " with compressed-tensors installed" * quantized
        loads = " loads" if images else " and vLLM load"
        return (
            f"An ordinary checkpoint: transformers{needs}{loads} it with no "
            "plugin, and run it as a dense model.\n\n" + python.format(first="")
        )
    text = (
        f"{_INSTALL}- transformers 5: `pip install '.[transformers]'`, then\n\n"
        + python.format(first="import nm_permute_plugin\n")
        + "\n\n- "
    )
    elsewhere = (
        "anywhere else: `nm-permute convert FOLDER OUT --format dense` first; no weight "
        "changes a bit"
    )
    if images:
        return f"{text}{elsewhere}. vLLM serves no models of images alone."
    if format != "sparse-24-bitmask":
        text += "vLLM: dense only, as below"  # its plugin reads no other sparse format
    else:
        text += "vLLM: `pip install '.[vllm]'`, then `vllm serve FOLDER`"
        formats = checkpoint.formats
        if any(formats[name] != "dense" for name in experts_of(formats)):
            text += "; experts are served sparse where a GPU is faster with them"
        else:
            text += "\n- vLLM up to 0.18.1, on Hopper GPUs, without the plugin: "
            text += "`nm-permute convert FOLDER OUT --legacy` first"
    return text + (
        f"\n- {elsewhere}\n\n"
        "**Without the plugin** this folder is not readable: compressed-tensors 0.15 "
        "and later have no codec for it. transformers 5 raises an AttributeError, or, "
        "where the weights are quantized too, starts from random ones with a warning; "
        "vLLM 0.19 and later refuse it."
    )


def _making(checkpoint: Checkpoint, card: Card) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in card.versions.items())
    recipe = checkpoint.path / "recipe.yaml"
    text = f"Versions: {versions}."
    if recipe.exists():
        text += f"\n\n```yaml\n{recipe.read_text(encoding='utf-8').strip()}\n```"
    return text + (
        "\n\nThe permutations, all settings and the figures of the run are in the folder "
        "`nm_permute`; `nm-permute report FOLDER` draws them as a page, and `nm-permute "
        "verify FOLDER` checks the files."
    )
