# SPDX-License-Identifier: Apache-2.0
"""Refuse arguments of another kind, and read lists of tokens as tensors."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

OF_TOKENS = ("input_ids", "attention_mask", "position_ids", "loss_mask")
"""What holds a number for every token: [rows, tokens], or [tokens] of a single row."""

EXAMPLE = '[{"input_ids": [[5, 3, 8, ...], ...]}]'


def must_be_model(model: object) -> None:
    """
    See that a model has been loaded.

    :raises TypeError: for its name or path, and for anything else that is no module
    """
    if isinstance(model, nn.Module):
        return
    got = f"{type(model).__name__} {_short(model)}"
    raise TypeError(
        f"model must be a loaded model, got the {got}: load it first, for example by "
        'transformers.AutoModelForCausalLM.from_pretrained("MODEL", dtype="auto")'
    )


def refuse_accelerated(model: nn.Module) -> None:
    """
    Refuse a model whose weights are packed for the sparse kernels.

    :raises ValueError: naming the way back
    """
    if any(getattr(module, "is_accelerated", False) for module in model.modules()):
        raise ValueError(
            f"this {type(model).__name__} is accelerated, so that its weights cannot be "
            "changed: call nmp.accelerate(model, undo=True) first"
        )


def must_be(value: object, kind: type, name: str, wanted: str) -> None:
    """
    See that an argument is of a kind.

    :param wanted: what to give, in words
    :raises TypeError: if it is not
    """
    if not isinstance(value, kind):
        raise TypeError(
            f"{name} must be {wanted}, got {type(value).__name__}; check the order of the "
            "arguments, or give them by name"
        )


def as_tensors(batches: Any) -> Iterator[dict[str, Any]]:
    """
    Read lists and arrays of batches as tensors, and single rows as [1, tokens].

    Rows of different lengths become batches of their own.

    >>> [batch["input_ids"].shape for batch in as_tensors([{"input_ids": [1, 2, 3]}])]
    [torch.Size([1, 3])]

    :raises TypeError: for what are no batches
    :raises ValueError: for a list that is not of numbers
    """
    if isinstance(batches, str | bytes | Mapping | Tensor):
        what = f"a {type(batches).__name__}"
        if isinstance(batches, str):
            what = f"the text {_short(batches)}"
        raise TypeError(
            f"batches must be a list of batches of token ids, {EXAMPLE}, got {what}"
        )
    if not isinstance(batches, Iterable):
        raise TypeError(
            f"batches must be a list of batches of token ids, {EXAMPLE}, got "
            f"{type(batches).__name__}"
        )
    for number, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"calibration batch {number} must be a mapping, {EXAMPLE[1:-1]}, got "
                f"{type(batch).__name__}"
            )
        yield from _read(batch, number)


def _read(batch: Mapping[str, Any], number: int) -> Iterator[dict[str, Any]]:
    """A batch as it is, or its rows where they differ in length."""
    rows = {
        name: _rows(batch[name], f"{name} of calibration batch {number}")
        for name in OF_TOKENS
        if name in batch and not _is_whole(batch[name])
    }
    others = {name: value for name, value in batch.items() if name not in rows}
    if len({len(row) for row in rows.get("input_ids", ())}) > 1:
        counts = {name: len(of) for name, of in rows.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(
                f"calibration batch {number} holds different numbers of rows: {counts}"
            )
        for row in range(counts["input_ids"]):
            yield {name: of[row][None] for name, of in rows.items()}
        return
    for name, of in rows.items():
        if len({len(row) for row in of}) > 1:
            raise ValueError(
                f"{name} of calibration batch {number} has rows of different lengths, and "
                "input_ids does not"
            )
    yield {**others, **{name: torch.stack(of) for name, of in rows.items()}}


def _is_whole(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() != 1


def _rows(value: Any, where: str) -> list[Tensor]:
    """
    The rows of a list of numbers, or of lists of numbers.

    :raises ValueError: if it is none
    """
    try:
        if len(value) == 0:
            raise ValueError("it is empty")
        first = value[0]
        nested = isinstance(first, Sequence) or getattr(first, "ndim", 0) > 0
        rows = [torch.as_tensor(row) for row in (value if nested else [value])]
        if any(row.dim() != 1 or row.is_floating_point() for row in rows):
            raise ValueError("it holds no whole numbers")
    except (TypeError, ValueError, RuntimeError, LookupError) as error:
        raise ValueError(
            f"{where} must be a tensor [rows, tokens] of whole numbers, or a list of them "
            f"or of rows, got {type(value).__name__} {_short(value)}: {error}"
        ) from error
    return rows


def _short(value: object, most: int = 40) -> str:
    shown = repr(value if not isinstance(value, list | tuple) else value[:4])
    return shown if len(shown) <= most else f"{shown[:most]}..."
