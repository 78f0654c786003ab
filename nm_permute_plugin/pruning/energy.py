# SPDX-License-Identifier: Apache-2.0
"""How much each output of a linear matters: the energy of its gradient."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nm_permute_plugin.pruning.learn.loop import frozen
from nm_permute_plugin.pruning.running.backward import parts
from nm_permute_plugin.pruning.running.loss import LossWeights, refuse_not_finite, run
from nm_permute_plugin.pruning.running.masked import linear
from nm_permute_plugin.pruning.statistics import (
    Batch,
    counted_rows,
    on_device,
    token_mask,
)
from nm_permute_plugin.specs.conv1d import weight_of

MOST_SAMPLES = 32
MOST_TOKENS = 1 << 13
"""What a mean square needs: as much as a step of learning has."""

LEAST = 1e-6
"""Of the mean: outputs without a gradient, as those of experts that no token reached."""


def row_weights(
    model: nn.Module, linears: Sequence[str], batches: Iterable[Batch], seed: int
) -> dict[str, Float[Tensor, " _out"]]:
    """
    What an error of every output of the linears costs: the root of its gradient's energy.

    The gradients are those whose squares say how far a small change moves the model's
    predictions (the diagonal of the Fisher information, as in K-FAC, Martens and Grosse,
    ICML 2015): of the likelihood of tokens, or classes, that the model itself draws; of a
    random projection of the relative hidden states where there is no head. The first
    ``MOST_SAMPLES`` samples are used, up to ``MOST_TOKENS`` tokens, one at a time.

    :param linears: module names
    :param seed: of what is drawn
    :raises ValueError: if the model's outputs are not finite
    :return: by linear, on the CPU; 1 is the root mean square of all outputs
    """
    energies: dict[str, Float[Tensor, " _out"]] = {}
    device = next(model.parameters()).device
    dice = torch.Generator(device).manual_seed(seed)
    with frozen(model), torch.enable_grad(), _summed(model, linears, energies):
        for sample in _first(batches):
            out = run(model, on_device(sample, model), LossWeights())
            refuse_not_finite(out.logits.detach())
            mask = token_mask(sample).to(device)
            # Those of a row of tokens are one where a row has one class.
            places = mask.any(-1) if mask.dim() == out.logits.dim() else mask
            said = counted_rows(out.logits, places).float()
            _drawn(said, out.is_hidden, dice).backward()
    for name in linears:
        rows = len(weight_of(linear(model, name)))
        energies[name] = energies.get(name, torch.zeros(rows)).cpu()
    mean = torch.cat(list(energies.values())).mean()
    return {name: (e / mean).clamp_min(LEAST).sqrt() for name, e in energies.items()}


def _first(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The first samples, one at a time."""
    tokens = 0
    samples = (sample for batch in batches for sample, _ in parts(batch, 1))
    for sample in islice(samples, MOST_SAMPLES):
        yield sample
        tokens += token_mask(sample).numel()
        if tokens >= MOST_TOKENS:
            return


def _drawn(
    said: Float[Tensor, "places values"], is_hidden: bool, dice: torch.Generator
) -> Float[Tensor, ""]:
    """What is differentiated: a sum over the places, each with its own draw."""
    if is_hidden:
        signs = (
            torch.rand(said.shape, generator=dice, device=said.device).round() * 2 - 1
        )
        total: Tensor = (signs * said / said.detach().norm(dim=-1, keepdim=True)).sum()
    else:
        chances = said.detach().softmax(-1)
        drawn = torch.multinomial(chances, 1, generator=dice)[:, 0]
        total = F.cross_entropy(said, drawn, reduction="sum")
    return total


@contextmanager
def _summed(
    model: nn.Module,
    linears: Sequence[str],
    energies: dict[str, Float[Tensor, " _out"]],
) -> Iterator[None]:
    """Add up the squared gradients of the linears' outputs in every backward pass."""

    def add(name: str, gradient: Float[Tensor, "*_places _out"]) -> None:
        energy = gradient.float().square().flatten(0, -2).sum(0)
        energies[name] = energies[name] + energy if name in energies else energy

    def watch(name: str, module: nn.Module, inputs: object, out: Tensor) -> Tensor:
        # Weights are frozen: nothing before the first of the linears has a gradient.
        watched = out if out.requires_grad else out.detach().requires_grad_()
        watched.register_hook(partial(add, name))
        return watched

    hooks = [
        linear(model, name).register_forward_hook(partial(watch, name))
        for name in linears
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
