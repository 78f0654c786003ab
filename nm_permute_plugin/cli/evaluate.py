# SPDX-License-Identifier: Apache-2.0
"""``nm-permute evaluate``: measure checkpoints on text or on images."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from nm_permute_plugin.cli.common import Device, find_device, one_kind
from nm_permute_plugin.evaluation.corpus import Corpus, read_corpus

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
        Option(help="Model before pruning, to compare perplexity or features."),
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

    With --dense, the perplexity is compared with the dense model's; with --base as well,
    the share of the gap between the two that is closed is printed.

    Of a model of images, the classifier is measured, or the nearest neighbours of its
    features where it has none.
    """
    one_kind(text, images, "give text to evaluate on")
    if images is not None and (base is not None or card):
        raise ValueError("--base and --card are for --text, not for --images")
    if base is not None and dense is None:
        raise ValueError("--base needs --dense: the gap closed lies between the two")
    if images is not None and stream:
        raise ValueError("--stream is for --text, not for --images")
    corpus = read_corpus(text or [])
    where = find_device(device)
    from nm_permute_plugin.evaluation.pretrained import must_be_model

    folders = [folder for folder in (checkpoint, base, dense) if folder is not None]
    for folder in folders:
        must_be_model(folder)
    if images is not None:
        _print_accuracy(checkpoint, images, where, batch_size or 32, dense)
        return
    values, cut = _print_perplexities(
        folders, corpus, sequence_length, stream, where, batch_size or 1
    )
    gap = None
    if base is not None:
        from nm_permute_plugin.evaluation.report import gap_closed

        gap = gap_closed(*values)
        typer.echo(f"gap closed: {gap:.1%}")
    elif dense is not None:
        typer.echo(f"{values[0] / values[1]:.3f} times the dense model's perplexity")
    if card:
        from nm_permute_plugin.checkpoint.model_card import Evaluation, add_evaluation

        name = " + ".join(file.name for file in text or [])
        length = max(map(len, cut.windows))
        if cut.form != f"windows of {length} tokens":
            name += f" ({cut.form})"
        row = Evaluation(name, length, cut.used, values[0], gap)
        add_evaluation(Path(checkpoint), row)


def _print_perplexities(
    folders: Sequence[str],
    corpus: Corpus,
    sequence_length: int | None,
    stream: bool,
    device: str,
    batch_size: int,
) -> tuple[list[float], "Windows"]:
    """Print and return each perplexity, with the windows of the first."""
    from nm_permute_plugin.evaluation.perplexity import evaluate_checkpoint
    from nm_permute_plugin.evaluation.pretrained import refuse_perplexity_of, row_length
    from nm_permute_plugin.evaluation.text import TextTokenizer

    for folder in folders:
        refuse_perplexity_of(folder)
    length = min(row_length(folder, sequence_length, 2048) for folder in folders)
    values: list[float] = []
    cuts: list[Windows] = []
    for folder in folders:
        cut = TextTokenizer(folder).windows(corpus, length, stream)
        values.append(evaluate_checkpoint(folder, cut.windows, device, batch_size))
        cuts.append(cut)
        typer.echo(
            f"{folder}: perplexity {values[-1]:.2f} ({cut.form}, {cut.tokens} tokens)"
        )
    return values, cuts[0]


def _print_accuracy(
    checkpoint: str, images: Path, device: str, batch_size: int, dense: str | None
) -> None:
    """Print the accuracy, and beside a dense model the cosine of the features."""
    from nm_permute_plugin.evaluation.classification import evaluate_images

    result = evaluate_images(checkpoint, images, device, dense, batch_size)
    typer.echo(f"{checkpoint}: {result}")
    if result.fidelity is not None:
        typer.echo(f"cosine of the features to {dense}: {result.fidelity:.4f}")
