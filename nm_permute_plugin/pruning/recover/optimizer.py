# SPDX-License-Identifier: Apache-2.0
"""AdamW for weights of every scale, with warm-up and linear decay."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from nm_permute_plugin.pruning import ranks


class RelativeAdamW:
    """
    AdamW whose steps are relative to the size of what they change.

    A step moves a weight by about ``rate`` times the root mean square of its parameter's
    kept weights, so that one rate serves models of every scale. The rate rises over the
    first tenth of the steps, because AdamW knows no gradient yet, and then falls to 0, both
    linearly.

    :param masters: float32 parameters, by name
    :param steps: after which the rate has fallen to 0
    """

    def __init__(self, masters: Mapping[str, Tensor], rate: float, steps: int) -> None:
        groups = [
            {"params": [master], "lr": rate * _root_mean_square(master)}
            for master in masters.values()
        ]
        self._in_shards = any(isinstance(m, DTensor) for m in masters.values())
        on_gpu = all(m.is_cuda for m in masters.values()) and not self._in_shards
        # One kernel a group; on CPUs it would only round otherwise.
        self._adamw = torch.optim.AdamW(groups, weight_decay=0.0, fused=on_gpu)
        warm_up = steps // 10
        self._rate = rate
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._adamw,
            lambda step: min(
                (step + 1) / (warm_up + 1), (steps - step) / (steps - warm_up)
            ),
        )

    @property
    def rate(self) -> float:
        """How far the next step moves a weight, relative to the size of its parameter."""
        factor: float = self._schedule.lr_lambdas[0](self._schedule.last_epoch)
        return self._rate * factor

    def step(self) -> None:
        """Take one step along the gradients, and zero them in place."""
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=self._in_shards)
        self._schedule.step()

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` goes on from."""
        adamw, schedule = self._adamw.state_dict(), self._schedule.state_dict()
        return {"adamw": adamw, "schedule": schedule}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the state of an optimizer of the same parameters and steps."""
        self._adamw.load_state_dict(state["adamw"])
        self._schedule.load_state_dict(state["schedule"])


def _root_mean_square(master: Tensor) -> float:
    """The root mean square of the values that are not 0; 0 if there are none."""
    values = master.detach()
    if isinstance(values, DTensor):
        shard: Tensor = values.to_local()
        squares = ranks.total(float(shard.double().square().sum()))
        count = round(ranks.total(float((shard != 0).sum())))
        return float((squares / max(count, 1)) ** 0.5)
    count = int((values != 0).sum())
    return float(values.norm()) / float(max(count, 1) ** 0.5)
