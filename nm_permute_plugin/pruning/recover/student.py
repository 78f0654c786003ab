# SPDX-License-Identifier: Apache-2.0
"""The weights that masks keep, changed beside a dense model that stays as it is."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from nm_permute_plugin.pruning.running.loss import LossWeights, check_finite, loss, run
from nm_permute_plugin.pruning.running.masked import Mask, linear, masked
from nm_permute_plugin.pruning.statistics import Batch, on_device
from nm_permute_plugin.specs.conv1d import as_stored, bias_of, weight_of
from nm_permute_plugin.specs.fold import Write

Values = dict[str, Tensor]
"""Weights [out, in] and biases of linears, by the name of the parameter."""


class KeptWeights:
    """
    New values of what N:M masks keep, and of biases, for the linears of a dense model.

    The model's own parameters stay dense until ``write``: run plainly it is the teacher,
    inside ``running`` the pruned model.

    :param masks: by linear, True where a weight is kept
    :ivar values: in the model's dtype; exactly 0 where a mask drops
    """

    def __init__(
        self, model: nn.Module, masks: Mapping[str, Bool[Tensor, "_out _in"]]
    ) -> None:
        self.model = model
        self._dropped = {name: ~mask for name, mask in masks.items()}
        self.values: Values = {}
        for name, dropped in self._dropped.items():
            module = linear(model, name)
            self.values[f"{name}.weight"] = weight_of(module).masked_fill(dropped, 0)
            bias = bias_of(module)
            if bias is not None:
                self.values[f"{name}.bias"] = bias.clone()

    @property
    def linears(self) -> tuple[str, ...]:
        """The names of the pruned linears."""
        return tuple(self._dropped)

    def masks(self, instead: Mapping[str, Tensor] | None = None) -> dict[str, Mask]:
        """
        What makes the linears multiply by ``values``, for ``masked``.

        :param instead: values that go before ``values``, of any floating dtype; what a
            mask drops counts as 0 and gets no gradient
        """
        values = {**self.values, **(instead or {})}
        return {
            name: partial(
                _forward, values[f"{name}.weight"], values.get(f"{name}.bias"), dropped
            )
            for name, dropped in self._dropped.items()
        }

    @contextmanager
    def running(self, instead: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Let the model run pruned while the context lasts, as ``masks`` says."""
        with masked(self.model, self.masks(instead)):
            yield

    def masters(self, linears: Iterable[str]) -> Values:
        """Float32 copies of the linears' values, to be trained."""
        return {
            name: self.values[name].float().clone().requires_grad_(True)
            for owner in linears
            for name in (f"{owner}.weight", f"{owner}.bias")
            if name in self.values
        }

    def rounded(self, masters: Mapping[str, Tensor]) -> Values:
        """Trained values as they are stored: in the model's dtype, 0 where dropped."""
        rounded = {}
        for name, master in masters.items():
            value = master.detach().to(self.values[name].dtype)
            owner, _, leaf = name.rpartition(".")
            if leaf == "weight":
                value = value.masked_fill(self._dropped[owner], 0)
            rounded[name] = value
        return rounded

    def mean_loss(
        self,
        batches: Sequence[Batch],
        weights: LossWeights,
        instead: Mapping[str, Tensor] | None = None,
    ) -> float:
        """
        The loss of the pruned model against the dense one, the mean over the batches.

        :param instead: values that go before ``values``
        :raises ValueError: if it is not finite
        """
        total = 0.0
        with torch.no_grad():
            for batch in batches:
                batch = on_device(batch, self.model)
                dense = run(self.model, batch, weights)
                with self.running(instead):
                    ours = run(self.model, batch, weights)
                total += float(loss(ours, dense, batch, weights))
        return check_finite(total / len(batches), "validation loss of the recovery")

    @torch.no_grad()
    def write(self, write: Write) -> None:
        """Store the values in the model, which is pruned from then on."""
        for name, value in self.values.items():
            owner, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(owner)
            if leaf == "weight":
                value = as_stored(module, value).contiguous()
            write(module, leaf, value)


class Optimizer:
    """
    AdamW whose steps are relative to the size of what they change.

    A step moves a weight by about ``rate`` times the root mean square of its parameter's
    kept weights, so that one rate serves models of every scale. The rate rises over the
    first tenth of the steps, because AdamW knows no gradient yet, and then falls to 0,
    both linearly.
    """

    def __init__(self, masters: Mapping[str, Tensor], rate: float, steps: int) -> None:
        groups = [
            {"params": [master], "lr": rate * _size(master)}
            for master in masters.values()
        ]
        on_gpu = all(master.is_cuda for master in masters.values())
        # One kernel a group; on CPUs it would only round otherwise.
        self._adamw = torch.optim.AdamW(groups, weight_decay=0.0, fused=on_gpu)
        rise = steps // 10
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._adamw,
            lambda step: min((step + 1) / (rise + 1), (steps - step) / (steps - rise)),
        )

    def step(self) -> None:
        """One step along the gradients, which are cleared."""
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=False)
        self._schedule.step()


def endless(count: int, seed: int) -> Iterator[int]:
    """Every number below ``count`` once an epoch, in a new order each time."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def _size(master: Tensor) -> float:
    """The root mean square of the values that are not 0; 0 if there are none."""
    values = master.detach()
    count = int((values != 0).sum())
    return float(values.norm()) / float(max(count, 1) ** 0.5)


def _forward(
    weight: Float[Tensor, "_out _in"],
    bias: Float[Tensor, " _out"] | None,
    dropped: Bool[Tensor, "_out _in"],
    x: Tensor,
    *of_dense: Tensor | None,
) -> Tensor:
    kept = weight.masked_fill(dropped, 0).to(x.dtype)
    return F.linear(x, kept, None if bias is None else bias.to(x.dtype))
