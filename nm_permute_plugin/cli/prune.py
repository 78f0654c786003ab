# SPDX-License-Identifier: Apache-2.0
"""``nm-permute prune``: run a recipe, and leave a finished checkpoint or nothing."""

import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from typer import Argument, Option

from nm_permute_plugin._words import file_size
from nm_permute_plugin.cli.common import Model, find_device, must_be_device
from nm_permute_plugin.cli.data import DATASET, TextColumn, data_sources
from nm_permute_plugin.cli.logs import HostLog, nothing_misleading
from nm_permute_plugin.cli.torchrun import own_device, refuse_dry_run
from nm_permute_plugin.evaluation.corpus import Corpus, read_corpus, spread
from nm_permute_plugin.evaluation.model_names import must_be_model
from nm_permute_plugin.pruning.findings import together
from nm_permute_plugin.pruning.processes import rank


def prune(
    model: Model,
    recipe: Annotated[
        Path, Argument(help="YAML recipe; `nm-permute fields` explains it.")
    ],
    out: Annotated[Path, Argument(help="Folder of the checkpoint, new or empty.")],
    text: Annotated[
        list[Path] | None,
        Option(
            "--text",
            help="Text to calibrate and train on, or a .jsonl file whose lines have "
            "messages or text; repeatable.",
        ),
    ] = None,
    images: Annotated[
        Path | None, Option("--images", help="Folder of images, instead of text.")
    ] = None,
    dataset: Annotated[
        list[str] | None,
        Option(
            "--dataset",
            metavar="FILE|FOLDER|ORG/NAME[:CONFIG][@SPLIT][=WEIGHT]",
            help=f"Data to calibrate and train on, {DATASET}, with =WEIGHT for the share "
            "of the rows.",
        ),
    ] = None,
    text_column: TextColumn = None,
    answers_only: Annotated[
        bool,
        Option(
            "--answers-only",
            help="Count what the assistant says in conversations alone, in losses and "
            "statistics.",
        ),
    ] = False,
    samples: Annotated[
        int, Option(min=2, help="Rows of calibration text, or images, at most.")
    ] = 512,
    sequence_length: Annotated[
        int | None,
        Option(min=2, help="Tokens of a row (1024, or the model's positions)."),
    ] = None,
    device: Annotated[
        str | None,
        Option(
            help="Where the whole model runs: cpu or cuda; a GPU if there is one. Prune "
            "a model that is larger than the device by llmcompressor.oneshot, which "
            "offloads it, with objective: layer_wise in the recipe."
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        Option(
            "--dry-run",
            help="Say what the run would do, how long it would take and how much memory, "
            "measured with a few of its steps, minutes on a CPU; write nothing.",
        ),
    ] = False,
    fresh: Annotated[
        bool,
        Option(
            "--fresh",
            help="Start anew, where a run into OUT died; without it the run goes on.",
        ),
    ] = False,
) -> None:
    """Prune a model as a recipe says, into a folder that is complete or not there.

    A run that died goes on when the same command is given again.
    """
    what = "give calibration text"
    if dry_run:
        refuse_dry_run()
    if answers_only and images is not None:
        raise ValueError("--answers-only is for conversations, not for --images")
    # Before anything heavy is imported, and all of it at once.
    sources, corpus, *_ = together(
        lambda: data_sources(text, dataset, images, text_column, what),
        lambda: read_corpus(text or []),
        lambda: must_be_model(model),
        lambda: _must_be_recipe(recipe),
        lambda: must_be_device(device),
    )
    where = find_device(device)
    from nm_permute_plugin.checkpoint.report import PAGE
    from nm_permute_plugin.cli import dry_run as plan
    from nm_permute_plugin.evaluation import pretrained
    from nm_permute_plugin.evaluation.images import image_files

    if images is not None:
        pretrained.refuse_images_for(model)
        files = spread(image_files(images), samples)
        if dry_run:
            plan.dry_run(
                model, recipe, out, _image_batches(model, files), len(files), where
            )
            return
        minutes = prune_with_images(model, recipe, out, files, where, fresh)
        amount, test = f"{len(files)} images", ["--images", "CLASS_FOLDERS"]
    else:
        pretrained.refuse_text_for(model)
        length = pretrained.row_length(model, sequence_length, 1024)
        from nm_permute_plugin.evaluation.mixture import Part, mixed_rows, read_parts

        if answers_only:
            from nm_permute_plugin.pruning.reading import refuse_experts

            refuse_experts(pretrained.empty_model(model))
        parts = read_parts(sources, samples, text_column)
        parts = parts or [Part("the calibration text", corpus, samples)]
        rows = mixed_rows(model, parts, length, answers_only)
        if dry_run:
            batches = _text_batches(rows.ids, rows.counted)
            plan.dry_run(model, recipe, out, batches, len(rows.ids), where)
            return
        minutes = prune_checkpoint(
            model, recipe, out, rows.ids, where, fresh, rows.counted
        )
        amount, test = str(rows), ["--text", "TEST.txt"]
    if rank() > 0:
        return
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    following = ["nm-permute", "evaluate", str(out), *test, "--dense", model]
    page = out / PAGE
    told = f"; report: {page}" if page.exists() else ""
    typer.echo(
        f"{out}: calibrated on {amount}, {minutes:.1f} minutes, {file_size(size)}, "
        f"{_outcome(out)}{told}; next: {shlex.join(following)}"
    )


def _must_be_recipe(recipe: Path) -> None:
    if recipe.is_file():
        return
    said = "is a folder" if recipe.is_dir() else "does not exist"
    raise FileNotFoundError(
        f"the recipe {recipe} {said}; `nm-permute recipe new --out FILE` writes one"
    )


def _text_batches(
    rows: Sequence[Sequence[int]], counted: Sequence[Sequence[bool]] | None
) -> Callable[[], list[dict[str, Any]]]:
    import torch

    columns = {"input_ids": rows} | ({} if counted is None else {"loss_mask": counted})

    def batches() -> list[dict[str, Any]]:
        return [
            {name: torch.tensor([[*map(int, of[i])]]) for name, of in columns.items()}
            for i in range(len(rows))
        ]

    return batches


def _image_batches(
    model: str | Path, files: Sequence[Path]
) -> Callable[[], list[dict[str, Any]]]:
    from nm_permute_plugin.evaluation.images import pixels
    from nm_permute_plugin.evaluation.pretrained import image_processor

    def batches() -> list[dict[str, Any]]:
        processor = image_processor(model)
        return [{"pixel_values": p} for p in pixels(processor, files, batch_size=32)]

    return batches


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
    if not losses:
        return said
    unit = _unit_of_loss(report["modifier"].get("loss"), out)
    return f"{said}, validation loss {losses[0]:.3f} -> {min(losses):.3f}{unit}"


def _unit_of_loss(weights: dict[str, float] | None, out: Path) -> str:
    """Say what the loss is where it is the divergence alone, of a model of language."""
    from nm_permute_plugin.evaluation.pretrained import model_class
    from nm_permute_plugin.pruning.settings import LossSettings

    alone = weights == LossSettings().model_dump()
    if not alone or not model_class(out).can_generate():
        return ""
    return " (KL divergence from the dense model, nats a token)"


def prune_checkpoint(
    model: str | Path,
    recipe: Path,
    out: Path,
    rows: Sequence[Sequence[int]],
    device: str | None = None,
    fresh: bool = False,
    counted: Sequence[Sequence[bool]] | None = None,
) -> float:
    """
    Run ``oneshot`` with a recipe, into a folder that appears only when all went well.

    :param rows: calibration text, one list of token ids a row
    :param device: where the model runs; the first CUDA device if there is one
    :param fresh: do not go on from what a run into ``out`` that died has kept
    :param counted: of every row, which tokens count; all of them if None
    :return: minutes from loading to saving
    :raises ValueError: for a run that is certain to fail, ``out`` holding files already
        for example, and for a recipe that llm-compressor would not read completely
    :raises OSError: if ``out`` cannot be written
    """
    from datasets import Dataset

    from nm_permute_plugin.evaluation.pretrained import tokenizer_of

    def data() -> dict[str, Any]:
        columns = {"input_ids": [list(row) for row in rows]}
        if counted is not None:
            columns["loss_mask"] = [[int(mark) for mark in row] for row in counted]
        return {
            "tokenizer": tokenizer_of(model),
            "dataset": Dataset.from_dict(columns),
            "use_loss_mask": counted is not None,
            "max_seq_length": max(map(len, rows)),
            "num_calibration_samples": len(rows),
            "shuffle_calibration_samples": False,
        }

    return _prune(model, recipe, out, data, len(rows), device, fresh)


def prune_with_images(
    model: str | Path,
    recipe: Path,
    out: Path,
    files: Sequence[Path],
    device: str | None = None,
    fresh: bool = False,
) -> float:
    """
    Do as ``prune_checkpoint`` does, for a model of images.

    :param files: the images to calibrate and train on
    :raises ValueError: as well, for an image that cannot be read
    """
    from torch.utils.data import DataLoader, Dataset

    from nm_permute_plugin.evaluation.pretrained import image_processor

    def data() -> dict[str, Any]:
        batches = cast("Dataset[Any]", _image_batches(model, files)())
        loader = DataLoader(batches, batch_size=None)
        return {"processor": image_processor(model), "dataset": loader}

    return _prune(model, recipe, out, data, len(files), device, fresh)


def _prune(
    model: str | Path,
    recipe: Path,
    out: Path,
    data: Callable[[], dict[str, Any]],
    samples: int,
    device: str | None,
    fresh: bool,
) -> float:
    """``oneshot`` into a folder that appears only when all went well; minutes."""
    import torch

    # From its import on, llm-compressor logs to what is stdout then.
    with redirect_stdout(cast("Any", HostLog())):
        from llmcompressor import oneshot, reset_session
    from nm_permute_plugin.checkpoint.transaction import state_beside
    from nm_permute_plugin.evaluation.pretrained import empty_model, load_model
    from nm_permute_plugin.modifiers.preflight import look_before_loading
    from nm_permute_plugin.pruning import ranks
    from nm_permute_plugin.pruning.resuming import resuming

    out = out.resolve()
    default = "cuda" if torch.cuda.is_available() else "cpu"
    where = own_device(device or default)
    ranks.begin(where)
    in_shards = look_before_loading(
        partial(empty_model, model), model, recipe, out, samples
    )
    started = time.perf_counter()
    state = state_beside(out)
    going_on = nullcontext() if state is None else resuming(state, fresh)
    with (
        nothing_misleading(),
        # Where ranks are many, llm-compressor begins its log anew.
        redirect_stdout(cast("Any", HostLog())),
        going_on,
        _unfinished(out) as unfinished,
    ):
        calibration = data()
        loaded = load_model(model)
        reset_session()
        oneshot(
            model=loaded if in_shards else loaded.to(where),
            recipe=str(recipe),
            output_dir=str(unfinished),
            **calibration,
        )
        ranks.wait()  # for all to have written what they write
    return (time.perf_counter() - started) / 60


@contextmanager
def _unfinished(out: Path) -> Iterator[Path]:
    """
    A folder that becomes the checkpoint; a temporary one on all ranks but the first.

    :raises OSError: if it cannot be written
    """
    from nm_permute_plugin.checkpoint.transaction import directory
    from nm_permute_plugin.pruning import ranks

    if ranks.is_first():
        with directory(out, was_empty=True) as unfinished:
            yield unfinished
    else:
        # llm-compressor writes the tokenizer on every rank.
        with tempfile.TemporaryDirectory() as nowhere:
            yield Path(nowhere)


def calibration_rows(
    model: str | Path, corpus: Corpus, samples: int, sequence_length: int
) -> list[list[int]]:
    """
    Cut text into rows that begin as the model's tokenizer does, and spread those taken.

    :param samples: the most rows that are taken
    :param sequence_length: tokens of a row; those of documents may be shorter
    :raises ValueError: if the text is empty or fills not even two rows
    """
    from nm_permute_plugin.evaluation.mixture import Part, mixed_rows

    part = Part("the calibration text", corpus, samples)
    return mixed_rows(model, [part], sequence_length).ids
