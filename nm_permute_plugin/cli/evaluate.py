# SPDX-License-Identifier: Apache-2.0
"""Measure checkpoints on text or on images; what is found comes as lines."""

from collections.abc import Iterator
from pathlib import Path

from nm_permute_plugin.checkpoint.model_card import Evaluation, add_evaluation
from nm_permute_plugin.evaluation.classification import evaluate_images
from nm_permute_plugin.evaluation.loading import refuse_perplexity_of
from nm_permute_plugin.evaluation.perplexity import (
    evaluate_checkpoint,
    gap_closed,
    tokenize,
)


def evaluate_on_text(
    checkpoint: Path,
    text: str,
    sequence_length: int,
    device: str,
    batch_size: int,
    compared: tuple[Path, Path] | None = None,
    card_row: str | None = None,
) -> Iterator[str]:
    """
    Perplexity of a checkpoint, and the gap closed.

    :param sequence_length: tokens of a window
    :param compared: folders of the base and of the dense model, for the gap closed
    :param card_row: what the model card shall call the text; None leaves the card alone
    :raises FileNotFoundError: if a folder holds no checkpoint
    :raises ValueError: for a model that takes no text, or for text that is no use
    """
    folders = (checkpoint, *(compared or ()))
    for folder in folders:
        _check_folder(folder)
        refuse_perplexity_of(folder)
    values = []
    for folder in folders:
        tokens = tokenize(folder, text)
        values.append(
            evaluate_checkpoint(folder, tokens, sequence_length, device, batch_size)
        )
        yield (
            f"{folder}: perplexity {values[-1]:.2f} "
            f"(windows of {sequence_length} tokens, {len(tokens)} tokens)"
        )
    gap = None
    if compared is not None:
        gap = gap_closed(*values)
        yield f"gap closed: {gap:.1%}"
    if card_row is not None:
        used = len(tokenize(checkpoint, text)) // sequence_length
        row = Evaluation(
            card_row, sequence_length, used * sequence_length, values[0], gap
        )
        add_evaluation(checkpoint, row)


def evaluate_on_images(
    checkpoint: Path,
    images: Path,
    device: str,
    batch_size: int,
    dense: Path | None = None,
) -> Iterator[str]:
    """
    Accuracy of a checkpoint on a folder of class folders.

    :param dense: folder of the model before pruning, for the cosine of the features
    :raises FileNotFoundError: if a folder holds no checkpoint, or there are no images
    :raises ValueError: for a model that takes text, or for images that are no use
    """
    for folder in (checkpoint, dense or checkpoint):
        _check_folder(folder)
    result = evaluate_images(checkpoint, images, device, dense, batch_size)
    yield f"{checkpoint}: {result}"
    if result.fidelity is not None:
        yield f"cosine of the features to {dense}: {result.fidelity:.4f}"


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} holds no checkpoint (no config.json)")
