# SPDX-License-Identifier: Apache-2.0
"""``nm-permute prune``: run a recipe, and leave a finished checkpoint or nothing."""

import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import typer
from typer import Argument, Option

from nm_permute_plugin.cli.common import Model, find_device, one_kind, read_text
from nm_permute_plugin.cli.logs import HostLog, nothing_misleading

T = TypeVar("T")


def prune(
    model: Model,
    recipe: Annotated[
        Path, Argument(help="YAML recipe; `nm-permute fields` explains it.")
    ],
    out: Annotated[Path, Argument(help="Folder of the checkpoint, new or empty.")],
    text: Annotated[
        list[Path] | None,
        Option("--text", help="Text to calibrate and train on; repeatable."),
    ] = None,
    images: Annotated[
        Path | None, Option("--images", help="Folder of images, instead of text.")
    ] = None,
    samples: Annotated[
        int, Option(min=2, help="Rows of calibration text, or images, at most.")
    ] = 512,
    sequence_length: Annotated[int, Option(min=2, help="Tokens of a row.")] = 1024,
    device: Annotated[
        str | None,
        Option(
            help="Where the whole model runs: cpu or cuda; a GPU if there is one. Prune "
            "a model that is larger than the device by llmcompressor.oneshot, which "
            "offloads it, with objective: layer_wise in the recipe."
        ),
    ] = None,
) -> None:
    """Prune a model as a recipe says, into a folder that is complete or not there."""
    one_kind(text, images, "give calibration text")
    content = read_text(text or [])
    if not recipe.exists():
        raise FileNotFoundError(f"{recipe} does not exist")
    where = find_device(device)
    from nm_permute_plugin.evaluation import pretrained
    from nm_permute_plugin.evaluation.images import image_files

    pretrained.must_be_model(model)
    if images is not None:
        pretrained.refuse_images_for(model)
        files = spread(image_files(images), samples)
        minutes = prune_with_images(model, recipe, out, files, where)
        amount, test = f"{len(files)} images", ["--images", "CLASS_FOLDERS"]
    else:
        pretrained.refuse_text_for(model)
        rows = calibration_rows(model, [content], samples, sequence_length)
        minutes = prune_checkpoint(model, recipe, out, rows, where)
        amount, test = f"{len(rows) * sequence_length} tokens", ["--text", "TEST.txt"]
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / 1e6
    following = ["nm-permute", "evaluate", str(out), *test, "--dense", model]
    typer.echo(
        f"{out}: {amount}, {minutes:.1f} minutes, {size:,.1f} MB, {_outcome(out)}; next: "
        f"{shlex.join(following)}"
    )


def _outcome(out: Path) -> str:
    """Say what the masks keep, and how far the pruned model is from the dense one."""
    from nm_permute_plugin.checkpoint.record import read_record

    report: dict[str, Any] = read_record(out)[1]
    before, after = report["retained"]
    score = report["modifier"]["score"]
    if not report["modifier"]["prune"]:
        return f"a mask by {score} keeps {before:.1%} -> {after:.1%} of the score"
    said = f"{after:.1%} of the {score} score kept"
    if report["modifier"]["method"] != "identity":
        said += f" ({before:.1%} without a permutation)"
    losses = [entry["validation"] for entry in report["history"]]
    for stage in report["recovered"]:
        losses += stage["validation"] if stage["kept"] else stage["validation"][:1]
    return said + (
        f", validation loss {losses[0]:.3f} -> {min(losses):.3f}" if losses else ""
    )


def prune_checkpoint(
    model: str | Path,
    recipe: Path,
    out: Path,
    rows: Sequence[Sequence[int]],
    device: str | None = None,
) -> float:
    """
    Run ``oneshot`` with a recipe, into a folder that appears only when all went well.

    :param rows: calibration text, one list of token ids a row
    :param device: where the model runs; the first CUDA device if there is one
    :return: minutes from loading to saving
    :raises ValueError: for a recipe that llm-compressor would not read completely
    :raises FileExistsError: if ``out`` holds files already
    :raises OSError: if ``out`` cannot be written
    """
    from datasets import Dataset
    from transformers import AutoTokenizer

    def data() -> dict[str, Any]:
        return {
            "tokenizer": AutoTokenizer.from_pretrained(model),
            "dataset": Dataset.from_dict({"input_ids": [list(row) for row in rows]}),
            "max_seq_length": max(map(len, rows)),
            "num_calibration_samples": len(rows),
            "shuffle_calibration_samples": False,
        }

    return _prune(model, recipe, out, data, device)


def prune_with_images(
    model: str | Path,
    recipe: Path,
    out: Path,
    files: Sequence[Path],
    device: str | None = None,
) -> float:
    """
    Do as ``prune_checkpoint`` does, for a model of images.

    :param files: the images to calibrate and train on
    :raises ValueError: as well, for an image that cannot be read
    """
    from torch.utils.data import DataLoader, Dataset

    from nm_permute_plugin.evaluation.images import pixels
    from nm_permute_plugin.evaluation.pretrained import image_processor

    def data() -> dict[str, Any]:
        processor = image_processor(model)
        batches = [{"pixel_values": p} for p in pixels(processor, files, batch_size=32)]
        loader = DataLoader(cast("Dataset[Any]", batches), batch_size=None)
        return {"processor": processor, "dataset": loader}

    return _prune(model, recipe, out, data, device)


def spread(items: Sequence[T], samples: int) -> list[T]:
    """Choose ``samples`` of the items at most, spread evenly."""
    import torch

    if len(items) <= samples:
        return list(items)
    chosen = torch.linspace(0, len(items) - 1, samples).long().tolist()
    return [items[i] for i in chosen]


def _prune(
    model: str | Path,
    recipe: Path,
    out: Path,
    data: Callable[[], dict[str, Any]],
    device: str | None,
) -> float:
    """``oneshot`` into a folder that appears only when all went well; minutes."""
    import torch
    from safetensors import SafetensorError

    # From its import on, llm-compressor logs to what is stdout then.
    with redirect_stdout(cast("Any", HostLog())):
        from llmcompressor import oneshot, reset_session
    from nm_permute_plugin.checkpoint.transaction import directory, refuse_occupied
    from nm_permute_plugin.evaluation.pretrained import model_class
    from nm_permute_plugin.modifiers.recipe import read_recipe

    read_recipe(recipe)
    out = out.resolve()
    refuse_occupied(out)
    started = time.perf_counter()
    try:
        with nothing_misleading(), directory(out) as unfinished:
            calibration = data()
            loaded = model_class(model).from_pretrained(model, dtype="auto")
            default = "cuda" if torch.cuda.is_available() else "cpu"
            reset_session()
            oneshot(
                model=loaded.to(device or default),
                recipe=str(recipe),
                output_dir=str(unfinished),
                **calibration,
            )
    except SafetensorError as error:
        # Weights that cannot be written, to a full disk say, are no OSError there.
        raise OSError(f"cannot write the checkpoint {out}: {error}") from error
    return (time.perf_counter() - started) / 60


def calibration_rows(
    model: str | Path, texts: Sequence[str], samples: int, sequence_length: int
) -> list[list[int]]:
    """
    Cut texts into rows of ``sequence_length`` tokens, and spread those taken evenly.

    :param samples: the most rows that are taken
    :raises ValueError: if the texts are empty or fill not even two rows
    """
    from nm_permute_plugin.evaluation.perplexity import tokenize

    if not any(text.strip() for text in texts):
        raise ValueError("the calibration text is empty")
    tokens = tokenize(model, "\n\n".join(texts))
    count = len(tokens) // sequence_length
    if count < 2:
        raise ValueError(
            f"the calibration text has {len(tokens)} tokens, fewer than two rows of "
            f"{sequence_length}: give more text or a smaller --sequence-length"
        )
    rows = tokens[: count * sequence_length].view(count, sequence_length)
    return spread(cast("list[list[int]]", rows.tolist()), samples)
