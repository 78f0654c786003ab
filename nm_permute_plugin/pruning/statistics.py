# SPDX-License-Identifier: Apache-2.0
"""Input norms of linears, from one pass of samples over the DENSE model."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from tqdm import tqdm

Batch = Mapping[str, Tensor]
"""
Keyword arguments of the model's forward, one of

- text: ``input_ids`` and, where rows are padded, ``attention_mask``, each [rows, tokens]
- images: ``pixel_values`` [images, channels, height, width], and nothing else
- one sample of text with images: what the model's processor gives for it
"""


def input_norms(
    model: nn.Module, linears: Iterable[str], batches: Iterable[Batch]
) -> dict[str, Float[Tensor, " in"]]:
    """
    ``||x_j||_2`` of every input channel of every linear, over all tokens of ``batches``.

    Squares are summed in float32; tokens that ``attention_mask`` hides do not count, all
    patches of images do. No layer is pruned meanwhile: the same score on statistics of
    pruned layers is far worse.

    :param linears: module names
    :raises ValueError: if there are no tokens, if an activation is not finite, or if a
        linear never ran
    """
    linears = list(linears)
    squares = _Squares()
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(partial(squares.add, name))
        for name in linears
    ]
    tokens = 0
    try:
        with torch.no_grad():
            for batch in tqdm(batches, desc="Measuring input norms"):
                batch = on_device(batch, model)
                counted = token_mask(batch)
                tokens += int(counted.sum())
                squares.mask = None if bool(counted.all()) else counted
                forward(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if tokens == 0:
        raise ValueError("the calibration data holds no tokens; give the run a dataset")
    sums = squares.sums
    for name in linears:
        if name not in sums:
            raise ValueError(
                f"{name} never ran on the calibration data: add it to `ignore`"
            )
        if not bool(torch.isfinite(sums[name]).all()):
            channel = int((~torch.isfinite(sums[name])).nonzero()[0])
            raise ValueError(
                f"the activations that enter {name} are not finite (channel {channel}); "
                "load the model in bfloat16 or float32 and check its weights"
            )
    return {name: total.sqrt() for name, total in sums.items()}


def on_device(batch: Batch, model: nn.Module) -> dict[str, Tensor]:
    """The batch where the model's embedding lives, its pixels in the model's dtype."""
    parameter = next(model.parameters())
    return {
        name: tensor.to(
            parameter.device,
            parameter.dtype if tensor.is_floating_point() else tensor.dtype,
        )
        for name, tensor in batch.items()
    }


def forward(model: nn.Module, batch: Batch, **options: bool) -> Any:
    """One forward pass; nothing is kept for tokens that would follow."""
    if "input_ids" in batch:
        options["use_cache"] = False
    return model(**batch, **options)


def first_sample(batch: Batch) -> dict[str, Tensor]:
    """The first row or image of a batch; all of one that is a single sample."""
    lengths = {len(tensor) for tensor in batch.values()}
    if len(lengths) > 1:  # patches of images beside tokens
        return dict(batch)
    return {name: tensor[:1] for name, tensor in batch.items()}


def token_mask(batch: Batch) -> Bool[Tensor, "rows tokens"] | Bool[Tensor, " images"]:
    """True for what counts: tokens that are no padding, and whole images."""
    if "attention_mask" in batch:
        return batch["attention_mask"].bool()
    if "input_ids" in batch:
        return torch.ones_like(batch["input_ids"], dtype=torch.bool)
    pixels = batch["pixel_values"]
    return torch.ones(len(pixels), dtype=torch.bool, device=pixels.device)


def counted_rows(
    values: Float[Tensor, "*_any width"],
    mask: Bool[Tensor, "rows tokens"] | Bool[Tensor, " images"],
) -> Float[Tensor, "_counted width"]:
    """
    The vectors that count, one a row.

    All do where the mask is not for them: a tower of images inside of a language model
    has patches, not tokens.
    """
    if values.shape[: mask.dim()] == mask.shape:
        values = values[mask]
    return values.flatten(0, -2)


class _Squares:
    """
    Sums of squares of the inputs of linears, in float32.

    :ivar mask: what counts of the batch at hand; None if all of it does
    """

    def __init__(self) -> None:
        self.sums: dict[str, Float[Tensor, " in"]] = {}
        self.mask: Tensor | None = None

    def add(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].detach()
        if self.mask is not None:
            values = counted_rows(values, self.mask)
        total = values.float().square().flatten(0, -2).sum(dim=0)
        self.sums[name] = self.sums[name] + total if name in self.sums else total
