# SPDX-License-Identifier: Apache-2.0
"""The recovery end to end of a model in shards: weights, gradients and AdamW's state."""

import time
from collections.abc import Callable, Iterable
from functools import partial
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nm_permute_plugin.pruning import ranks
from nm_permute_plugin.pruning.data import Data
from nm_permute_plugin.pruning.recover.optimizer import RelativeAdamW
from nm_permute_plugin.pruning.recover.stages import StageRecord
from nm_permute_plugin.pruning.running.backward import Backward
from nm_permute_plugin.pruning.running.forecast import Forecast
from nm_permute_plugin.pruning.running.masked import Mask, linear
from nm_permute_plugin.pruning.running.sharded import (
    gathered_rows,
    learned_of,
    own_shard,
    sharded_twin,
)
from nm_permute_plugin.pruning.running.teacher import Teacher
from nm_permute_plugin.pruning.search import History
from nm_permute_plugin.pruning.settings import Settings
from nm_permute_plugin.specs.conv1d import bias_of, weight_of


def distill_in_shards(
    model: nn.Module,
    linears: Iterable[str],
    kept: Callable[[str], Tensor],
    write: Callable[[str, Tensor], None],
    data: Data,
    settings: Settings,
) -> StageRecord:
    """
    Train all kept weights against the dense model's predictions, as ``distill`` does.

    What is 0 at the start stays 0. Biases stay as they are.

    :param model: dense and folded, whole on the CPU of the first rank
    :param kept: the weight of a linear that masks keep, asked for on the first rank
    :param write: stores the new weight of a linear, on the first rank
    """
    started, names = time.perf_counter(), list(linears)
    like = {
        name: weight_of(linear(model, name)).to("meta", torch.float32) for name in names
    }
    twin = sharded_twin(model, names, like, kept)
    masters = {name: learned_of(twin, name) for name in names}
    masks: dict[str, Mask] = {name: partial(_forward, twin, name) for name in names}
    teacher = Teacher(twin, settings.loss, keep=False)
    steps = settings.recover.end_to_end.steps
    every = settings.validation.interval(steps)
    optimizer = RelativeAdamW(masters, settings.recover.end_to_end.rate, steps)
    backward = Backward(
        teacher, lambda: masks, (), data.train, settings.memory, use_graph=False
    )
    stored = next(model.parameters()).dtype

    def validate() -> float:
        return teacher.validate(masks, data.validation)

    def shards() -> dict[str, Tensor]:
        """A copy of this rank's part, rounded as it is stored."""
        return {n: own_shard(m).to(stored, copy=True) for n, m in masters.items()}

    before = time.perf_counter()
    first = least = validate()
    seconds = time.perf_counter() - before
    forecast = Forecast("the recovery end_to_end", steps, -(-steps // every), seconds)
    best, losses = shards(), list[float]()
    history: History = [{"step": 0, "validation": least}]
    batches = data.batches(settings.seed)
    with torch.enable_grad():
        for step in ranks.bar(range(1, steps + 1), "Distilling the kept weights"):
            rate = optimizer.rate
            losses.append(backward(next(batches)))
            optimizer.step()
            forecast.step()
            if step % every and step != steps:
                continue
            loss = validate()
            if loss < least:
                least, best = loss, shards()
            entry = {"validation": loss, "loss": fmean(losses), "rate": rate}
            history.append({"step": step, **entry})
            losses.clear()
    for name, shard in best.items():
        value = gathered_rows(shard, like[name].shape[0])
        if ranks.is_first():
            write(name, value)
    took = time.perf_counter() - started
    return StageRecord("end_to_end", (first, least), least < first, took, history)


class _KeptLinear(torch.autograd.Function):
    """``x W^T + b``, whose weight gets gradients where it is not 0."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "*places in"],
        master: Float[Tensor, "out in"],
        bias: Float[Tensor, " out"] | None,
    ) -> Float[Tensor, "*places out"]:
        ctx.save_for_backward(x, master)
        return F.linear(x, master.to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, master = ctx.saved_tensors
        grad_x = grad @ master.to(grad.dtype) if ctx.needs_input_grad[0] else None
        of_weight = (grad.flatten(0, -2).T @ x.flatten(0, -2)).float()
        return grad_x, of_weight.mul_(master != 0), None


def _forward(twin: nn.Module, name: str, x: Tensor) -> Tensor:
    module = linear(twin, name)
    out: Tensor = _KeptLinear.apply(x, learned_of(twin, name), bias_of(module))
    return out
