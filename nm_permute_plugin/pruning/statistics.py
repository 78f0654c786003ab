# SPDX-License-Identifier: Apache-2.0
"""
Statistics of the DENSE model: norms of inputs, and how much each output matters.

No layer is pruned while they are taken: the same score on statistics of pruned layers
is far worse.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from nm_permute_plugin.pruning import ranks
from nm_permute_plugin.pruning.data import (
    Batch,
    counted_rows,
    forward,
    micro_batches,
    on_device,
    token_mask,
    without_padding,
)
from nm_permute_plugin.pruning.running.loss import refuse_not_finite, run
from nm_permute_plugin.pruning.running.masked import frozen, linear
from nm_permute_plugin.pruning.settings import LossSettings
from nm_permute_plugin.specs.conv1d import weight_of

MOST_SAMPLES = 32
"""Samples that measure the sensitivity of outputs; more do not change it much."""

MOST_TOKENS = 1 << 13
"""Tokens that measure it at most: as many as a step of learning has."""

ENOUGH_TOKENS = 1 << 21
"""Tokens that measure the norms of inputs at most; more do not change their proportions."""

FLOOR = 1e-6
"""Least squared sensitivity relative to the mean, for outputs without a gradient, such as
those of experts that no token reached."""


def input_norms(
    model: nn.Module, linears: Iterable[str], batches: Iterable[Batch]
) -> dict[str, Float[Tensor, " in"]]:
    """
    ``||x_j||_2`` of every input channel of every linear, over the tokens of ``batches``:
    the first ``ENOUGH_TOKENS`` of them, in whole batches.

    Squares are summed in float32. Padding does not count, not even in experts whose router
    flattens the tokens; all patches of images do.

    :param linears: module names
    :raises ValueError: if there are no tokens, if an activation is not finite, or its
        square is not, or if a linear never ran
    """
    linears, batches = list(linears), list(_enough(batches))
    device = next(model.parameters()).device
    sums: dict[str, Float[Tensor, " in"]] = {}

    def add(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not counts:
            return
        values = inputs[0].detach()
        _add(sums, name, values if mask is None else counted_rows(values, mask))

    tokens = 0
    bar = ranks.bar(ranks.dealt(batches), desc="Measuring input norms")
    with (
        torch.no_grad(),
        _hooked(
            linear(model, name).register_forward_pre_hook(partial(add, name))
            for name in linears
        ),
    ):
        for _, batch, counts in bar:
            for part in without_padding(batch):
                # Only a sample with images can hold padding still: it is not cut.
                counted: Tensor = token_mask(part)
                mask = None if bool(counted.all()) else counted.to(device)
                tokens += int(counted.sum()) * counts
                forward(model, on_device(part, model))
    tokens = round(ranks.total(tokens))
    if tokens == 0:
        raise ValueError("the calibration data holds no tokens; give the run a dataset")
    sums = _of_all_ranks(model, linears, sums)
    for name in linears:
        if name not in sums:
            raise ValueError(
                f"{name} never ran on the calibration data: add it to `ignore`"
            )
        if not bool(torch.isfinite(sums[name]).all()):
            channel = int((~torch.isfinite(sums[name])).nonzero()[0])
            largest = _largest(model, name, channel, batches)
            if math.isfinite(largest):
                raise ValueError(
                    f"the activations that enter {name} reach {largest:.1e} (channel "
                    f"{channel}), and their squares are beyond float32: check the weights "
                    "of the layers before it"
                )
            raise ValueError(
                f"the activations that enter {name} are not finite (channel {channel}); "
                "load the model in bfloat16 or float32 and check its weights"
            )
    return {name: total.sqrt() for name, total in sums.items()}


def output_sensitivity(
    model: nn.Module, linears: Sequence[str], batches: Iterable[Batch], seed: int
) -> dict[str, Float[Tensor, " _out"]]:
    """
    What an error of every output of the linears costs: the root of its Fisher diagonal.

    The squared gradients say how far a small change of an output moves the model's
    predictions (as in K-FAC, Martens and Grosse, ICML 2015). They are gradients of the
    likelihood of tokens, or classes, that the model itself draws; of a random projection of
    the relative hidden states where there is no head. The first ``MOST_SAMPLES`` samples
    are used, up to ``MOST_TOKENS`` tokens, one at a time.

    :param linears: module names
    :param seed: of what is drawn
    :raises ValueError: if the model's outputs are not finite
    :return: by linear, on the CPU; 1 is the root mean square of all outputs
    """
    squares: dict[str, Float[Tensor, " _out"]] = {}

    def watch(name: str, module: nn.Module, inputs: object, out: Tensor) -> Tensor:
        # Weights are frozen: nothing before the first of the linears has a gradient.
        watched = out if out.requires_grad else out.detach().requires_grad_()
        watched.register_hook(lambda gradient: _add(squares, name, gradient))
        return watched

    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    samples = list(first_samples(batches))
    with (
        frozen(model),
        torch.enable_grad(),
        _hooked(
            linear(model, name).register_forward_hook(partial(watch, name))
            for name in linears
        ),
    ):
        # On all ranks: they are few, and what is drawn for one hangs on those before it.
        for sample in ranks.bar(samples, "Measuring outputs"):
            out = run(model, on_device(sample, model), LossSettings())
            refuse_not_finite(out.logits.detach())
            mask = token_mask(sample).to(device)
            # A classifier gives one row of logits for a whole row of tokens.
            places = mask.any(-1) if mask.dim() == out.logits.dim() else mask
            logits = counted_rows(out.logits, places).float()
            _likelihood(logits, out.are_values, generator).backward()
    for name in linears:
        rows = len(weight_of(linear(model, name)))
        squares[name] = squares.get(name, torch.zeros(rows)).cpu()
    squares = ranks.of_first(lambda: squares)
    mean = torch.cat(list(squares.values())).mean()
    return {name: (s / mean).clamp_min(FLOOR).sqrt() for name, s in squares.items()}


def _of_all_ranks(
    model: nn.Module, linears: Sequence[str], sums: dict[str, Float[Tensor, " _in"]]
) -> dict[str, Float[Tensor, " _in"]]:
    """The sums over ranks, of the linears that ran on any of them."""
    if ranks.count() == 1:
        return sums
    ran = ranks.totals([torch.tensor([float(name in sums) for name in linears])])[0]
    names = [name for name, times in zip(linears, ran.tolist(), strict=True) if times]
    widths = {name: weight_of(linear(model, name)).shape[1] for name in names}
    own = [sums.get(name, torch.zeros(widths[name])) for name in names]
    device = next(model.parameters()).device
    totals = ranks.totals([values.to(device) for values in own])
    return dict(zip(names, totals, strict=True))


def _enough(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The first batches, up to ``ENOUGH_TOKENS``; images count as one token each."""
    tokens = 0
    for batch in batches:
        yield batch
        tokens += token_mask(batch).numel()
        if tokens >= ENOUGH_TOKENS:
            return


def _largest(
    model: nn.Module, name: str, channel: int, batches: Iterable[Batch]
) -> float:
    """The largest magnitude in an input channel of a linear; NaN if there is one."""
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0][..., channel].abs().max())

    hook = linear(model, name).register_forward_pre_hook(keep)
    with torch.no_grad(), _hooked([hook]):
        for batch in batches:
            for part in without_padding(batch):
                forward(model, on_device(part, model))
    return float(torch.stack(found).max())


def _add(
    sums: dict[str, Float[Tensor, " _width"]],
    name: str,
    values: Float[Tensor, "*_places _width"],
) -> None:
    """Add the squares of the values to the sum of that name, in float32."""
    total = values.float().square().flatten(0, -2).sum(0)
    sums[name] = sums[name] + total if name in sums else total


@contextmanager
def _hooked(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that are removed when the context ends."""
    registered = list(hooks)
    try:
        yield
    finally:
        for hook in registered:
            hook.remove()


def first_samples(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The first samples, one at a time."""
    tokens = 0
    samples = (sample for batch in batches for sample, _ in micro_batches(batch, 1))
    for sample in islice(samples, MOST_SAMPLES):
        yield sample
        tokens += token_mask(sample).numel()
        if tokens >= MOST_TOKENS:
            return


def _likelihood(
    logits: Float[Tensor, "places values"],
    are_values: bool,
    generator: torch.Generator,
) -> Float[Tensor, ""]:
    """A random quantity whose squared gradients are the Fisher diagonal in expectation."""
    if are_values:
        noise = torch.rand(logits.shape, generator=generator, device=logits.device)
        signs = noise.round() * 2 - 1
        is_scalar = logits.shape[-1] == 1
        scale = 1 if is_scalar else logits.detach().norm(dim=-1, keepdim=True)
        return (signs * logits / scale).sum()
    chances = logits.detach().softmax(-1)
    drawn = torch.multinomial(chances, 1, generator=generator)[:, 0]
    return F.cross_entropy(logits, drawn, reduction="sum")
