# SPDX-License-Identifier: Apache-2.0
"""``nm-permute evaluate``: measure checkpoints on text or on images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from nm_permute_plugin.cli.common import Device, find_device, one_kind, read_text


def evaluate(
    checkpoint: Annotated[str, Argument(help="Folder of the checkpoint.")],
    text: Annotated[
        list[Path] | None, Option("--text", help="Text to evaluate on; repeatable.")
    ] = None,
    images: Annotated[
        Path | None, Option("--images", help="Folder of CLASS/*.jpg, instead of text.")
    ] = None,
    sequence_length: Annotated[int, Option(min=2, help="Tokens of a window.")] = 2048,
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
    content = read_text(text or [])
    where = find_device(device)
    from nm_permute_plugin.evaluation.pretrained import must_be_model

    folders = [folder for folder in (checkpoint, base, dense) if folder is not None]
    for folder in folders:
        must_be_model(folder)
    if images is not None:
        _print_accuracy(checkpoint, images, where, batch_size or 32, dense)
        return
    values, used = _print_perplexities(
        folders, content, sequence_length, where, batch_size or 1
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
        row = Evaluation(name, sequence_length, used, values[0], gap)
        add_evaluation(Path(checkpoint), row)


def _print_perplexities(
    folders: Sequence[str],
    text: str,
    sequence_length: int,
    device: str,
    batch_size: int,
) -> tuple[list[float], int]:
    """Print and return each perplexity, and how many tokens of the first were used."""
    from nm_permute_plugin.evaluation.perplexity import evaluate_checkpoint, tokenize
    from nm_permute_plugin.evaluation.pretrained import refuse_perplexity_of

    for folder in folders:
        refuse_perplexity_of(folder)
    values, counts = [], []
    for folder in folders:
        tokens = tokenize(folder, text)
        values.append(
            evaluate_checkpoint(folder, tokens, sequence_length, device, batch_size)
        )
        counts.append(len(tokens))
        typer.echo(
            f"{folder}: perplexity {values[-1]:.2f} "
            f"(windows of {sequence_length} tokens, {len(tokens)} tokens)"
        )
    return values, counts[0] // sequence_length * sequence_length


def _print_accuracy(
    checkpoint: str, images: Path, device: str, batch_size: int, dense: str | None
) -> None:
    """Print the accuracy, and beside a dense model the cosine of the features."""
    from nm_permute_plugin.evaluation.classification import evaluate_images

    result = evaluate_images(checkpoint, images, device, dense, batch_size)
    typer.echo(f"{checkpoint}: {result}")
    if result.fidelity is not None:
        typer.echo(f"cosine of the features to {dense}: {result.fidelity:.4f}")
