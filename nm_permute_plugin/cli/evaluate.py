# SPDX-License-Identifier: Apache-2.0
"""``nm-permute evaluate``: measure checkpoints on text or on images."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from nm_permute_plugin.cli.common import Device, find_device, must_be_device
from nm_permute_plugin.cli.data import DATASET, TextColumn, data_sources
from nm_permute_plugin.evaluation.corpus import Corpus, read_corpus
from nm_permute_plugin.evaluation.model_names import must_be_model
from nm_permute_plugin.pruning.findings import together

if TYPE_CHECKING:
    from nm_permute_plugin.evaluation.text import Windows


def evaluate(
    checkpoint: Annotated[str, Argument(help="Folder of the checkpoint.")],
    text: Annotated[
        list[Path] | None,
        Option(
            "--text",
            help="Text to evaluate on, or a .jsonl file whose lines have messages or "
            "text; repeatable.",
        ),
    ] = None,
    images: Annotated[
        Path | None, Option("--images", help="Folder of CLASS/*.jpg, instead of text.")
    ] = None,
    dataset: Annotated[
        list[str] | None,
        Option(
            "--dataset",
            metavar="FILE|FOLDER|ORG/NAME[:CONFIG][@SPLIT]",
            help=f"Data to evaluate on, {DATASET}.",
        ),
    ] = None,
    text_column: TextColumn = None,
    samples: Annotated[
        int,
        Option(min=1, help="Records of each --dataset at most, spread over all of it."),
    ] = 512,
    sequence_length: Annotated[
        int | None,
        Option(min=2, help="Tokens of a window (2048, or the model's positions)."),
    ] = None,
    stream: Annotated[
        bool,
        Option(
            "--stream",
            help="Cut one stream of tokens, as published tables of perplexity do: what "
            "the tokenizer puts before a text stands before the first window alone.",
        ),
    ] = False,
    base: Annotated[
        str | None,
        Option(
            help="Checkpoint that was pruned without a permutation; needs --dense, and "
            "prints the share of the gap between the two that is closed."
        ),
    ] = None,
    dense: Annotated[
        str | None,
        Option(
            help="Model before pruning, to compare perplexity and predictions, or features."
        ),
    ] = None,
    batch_size: Annotated[
        int | None, Option(min=1, help="Windows or images at a time (1 or 32).")
    ] = None,
    card: Annotated[
        bool, Option("--card", help="Put the result into the model card.")
    ] = False,
    device: Device = None,
) -> None:
    """Measure the perplexity of a checkpoint on text, or its accuracy on images.

    With --dense, the predictions are compared with the dense model's, token by token: the
    mean KL divergence, the share of tokens whose most likely next token is the same, and
    the share of flips, where exactly one of the two puts the text's next token first. With
    --base as well, the share of the gap between the two that is closed is printed.

    What was measured on text is kept in nm_permute/evaluations.json of a checkpoint that
    nm-permute made.

    Of a model of images, the classifier is measured, or the nearest neighbours of its
    features where it has none.
    """
    what = "give text to evaluate on"
    if images is not None and (base is not None or card):
        raise ValueError("--base and --card are for --text, not for --images")
    if base is not None and dense is None:
        raise ValueError("--base needs --dense: the gap closed lies between the two")
    if base is not None and Path(base).resolve() == Path(checkpoint).resolve():
        raise ValueError(
            f"--base {base} is the checkpoint itself; give the one that was pruned by the "
            "same score without a permutation"
        )
    if images is not None and stream:
        raise ValueError("--stream is for --text, not for --images")
    folders = [folder for folder in (checkpoint, base, dense) if folder is not None]
    # Before anything heavy is imported, and all of it at once.
    sources, corpus, *_ = together(
        lambda: data_sources(text, dataset, images, text_column, what),
        lambda: read_corpus(text or []),
        *(partial(must_be_model, folder) for folder in folders),
        lambda: must_be_device(device),
    )
    where = find_device(device)
    if images is not None:
        _print_accuracy(checkpoint, images, where, batch_size or 32, dense)
        return
    from nm_permute_plugin.checkpoint.card_file import CARD
    from nm_permute_plugin.evaluation.card import check_keeping, keep
    from nm_permute_plugin.evaluation.results import TextResult

    check_keeping(checkpoint, card)
    if sources:
        from nm_permute_plugin.evaluation.data_sets import read_data_sets

        corpus = read_data_sets(sources, samples, text_column)
    cut = _windows(folders, corpus, sequence_length, stream)
    measured = _print_perplexities(checkpoint, base, dense, cut, where, batch_size or 1)
    names = [file.name for file in text or []]
    name = " + ".join(names + [source.title for source in sources])
    result = TextResult(text=name, form=cut.form, **measured)
    if result.dense is not None and result.base is not None:
        from nm_permute_plugin.evaluation.report import gap_closed

        gap = gap_closed(result.perplexity, result.base, result.dense)
        typer.echo(f"gap closed: {gap:.1%}")
    elif result.dense is not None:
        ratio = result.perplexity / result.dense
        typer.echo(f"{ratio:.3f} times the dense model's perplexity")
    keep(checkpoint, texts=[result], card=card)
    if card:
        typer.echo(f"added to {Path(checkpoint) / CARD}")


def _windows(
    folders: Sequence[str], corpus: Corpus, sequence_length: int | None, stream: bool
) -> "Windows":
    """Cut the text for the first checkpoint, and see that it is the same for the others."""
    from nm_permute_plugin.evaluation.fidelity import refuse_other_tokens
    from nm_permute_plugin.evaluation.pretrained import refuse_perplexity_of, row_length
    from nm_permute_plugin.evaluation.text import TextTokenizer

    for folder in folders:
        refuse_perplexity_of(folder)
    length = min(row_length(folder, sequence_length, 2048) for folder in folders)
    cut, *others = (
        TextTokenizer(folder).windows(corpus, length, stream) for folder in folders
    )
    for folder, other in zip(folders[1:], others, strict=True):
        refuse_other_tokens(cut.windows, other.windows, folders[0], folder)
    return cut


def _print_perplexities(
    checkpoint: str,
    base: str | None,
    dense: str | None,
    cut: "Windows",
    device: str,
    batch_size: int,
) -> dict[str, Any]:
    """Print each perplexity, and beside a dense model how near the predictions are."""
    from nm_permute_plugin.evaluation.fidelity import compare_checkpoints
    from nm_permute_plugin.evaluation.perplexity import (
        count_predicted,
        evaluate_checkpoint,
    )

    predicted = count_predicted(cut.windows)

    def say(folder: str, value: float) -> None:
        typer.echo(
            f"{folder}: perplexity {value:.2f} ({cut.form}, {predicted} tokens predicted)"
        )

    if dense is None:
        value = evaluate_checkpoint(checkpoint, cut.windows, device, batch_size)
        say(checkpoint, value)
        return {"perplexity": value, "tokens": predicted}
    found = compare_checkpoints(checkpoint, dense, cut.windows, device, batch_size)
    say(checkpoint, found.perplexity)
    measured = asdict(found)
    if base is not None:
        measured["base"] = evaluate_checkpoint(base, cut.windows, device, batch_size)
        say(base, measured["base"])
    say(dense, found.dense)
    typer.echo(f"beside the dense model: {found}")
    return measured


def _print_accuracy(
    checkpoint: str, images: Path, device: str, batch_size: int, dense: str | None
) -> None:
    """Print the accuracy, and beside a dense model the cosine of the features."""
    from nm_permute_plugin.evaluation.classification import evaluate_images

    result = evaluate_images(checkpoint, images, device, dense, batch_size)
    typer.echo(f"{checkpoint}: {result}")
    if result.fidelity is not None:
        typer.echo(f"cosine of the features to {dense}: {result.fidelity:.4f}")
