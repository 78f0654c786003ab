# SPDX-License-Identifier: Apache-2.0
"""A linear layer's 2:4 weight, multiplied by whichever kernel is fastest."""

import logging
import os
from importlib.resources import files
from typing import Literal

import torch
from torch import Tensor

from nm_permute_plugin.checkpoint.codec import clear_negative_zeros, compress
from nm_permute_plugin.serving import kernel_table as plans
from nm_permute_plugin.serving.kernel_table import Bucket, Plan, Way
from nm_permute_plugin.serving.kernels.kernel import WIDE
from nm_permute_plugin.serving.kernels.scaling import scaled
from nm_permute_plugin.serving.ops import KERNELS, PLANS, sparse24_linear
from nm_permute_plugin.serving.probe import survives
from nm_permute_plugin.serving.tune import tune, warm_up

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM shows what is under its name

Mode = Literal["auto", "memory", "dense"]
"""
``auto``: the fastest kernel for every number of tokens, dense ones too.
``memory``: one sparse copy of the weight and no dense one, fastest or not.
``dense``: nothing of ours.
"""

FORCED = "NM_PERMUTE_KERNEL"
"""The environment variable that names the kernels allowed, separated by commas."""


class SparseLinear:
    """
    One layer's weight in the forms that its plan asks for.

    Make it with ``prepare``; the dense weight may be freed afterwards.
    """

    def __init__(self, weight: Tensor, plan: Plan, plan_name: str) -> None:
        self.plan_name = plan_name
        self.forms = [KERNELS[name].prepare(weight) for name in plan.kernels]

    @classmethod
    def prepare(cls, name: str, weight: Tensor, mode: Mode) -> "SparseLinear | None":
        """
        The layer ready to multiply, or None where it should stay dense.

        The first weight of each shape and dtype is measured, seconds on a card, and the
        choice is logged and kept on disk.

        :param name: the layer's, for messages
        :param weight: [out, in], dense values that are 2:4, on its final device;
            bfloat16, float16, float8_e4m3fn or int8
        """
        reason = _refusal(weight, mode)
        if reason is None:
            allowed = _allowed(weight, mode)
            key = f"{tuple(weight.shape)} {weight.dtype} {' '.join(allowed)}"
            is_first = key not in PLANS
            plan = PLANS[key] = PLANS.get(key) or _plan(weight, allowed)
            if plan.kernels == ["dense"]:
                reason = (
                    f"no sparse kernel is faster for its shape, {tuple(weight.shape)}"
                )
        if reason is not None:
            _log(name, reason)
            return None
        layer = cls(weight, plan, key)
        if is_first:
            warm_up(weight, layer)
        return layer

    @property
    def signature(self) -> str:
        """What a graph compiled with the layer depends on: plan, kernels and our source."""
        kernels = " ".join(PLANS[self.plan_name].kernels)
        return f"{self.plan_name}: {kernels}, {plans.digest(files(__package__))}"

    def __call__(self, x: Tensor) -> Tensor:
        """
        ``x @ weight.T``.

        :param x: [tokens, in], of the weight's dtype
        :return: [tokens, out], of ``sums_dtype``
        """
        out: Tensor = sparse24_linear(x, self.forms, self.plan_name)
        return out

    def scaled_mm(
        self,
        x_q: Tensor,
        scale_x: Tensor,
        scale_w: Tensor,
        bias: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """
        ``(x_q @ weight.T) * scale_x * scale_w + bias`` for an 8-bit weight.

        :param x_q: [tokens, in], of the weight's dtype
        :param scale_x: float32, one number or [tokens, 1]
        :param scale_w: float32 or bfloat16, one number or [out, 1]
        :param bias: [out]
        :param out_dtype: bfloat16 or float16
        :return: [tokens, out]
        """
        return scaled(self(x_q), scale_x, scale_w, bias, out_dtype)


def _refusal(weight: Tensor, mode: Mode) -> str | None:
    """Why a weight stays dense whatever is faster, or None."""
    if mode == "dense":
        return "the mode is dense"
    if not weight.is_cuda:
        return f"it is on {weight.device}; the sparse kernels need a CUDA device"
    names = _allowed(weight, mode)
    if not set(names) - {"dense"}:
        refusals = {name: k.refusal(weight) for name, k in KERNELS.items()}
        told = [f"{name}: {reason}" for name, reason in refusals.items() if reason]
        return "; ".join(told) or f"{FORCED} allows no sparse kernel"
    try:
        compress(clear_negative_zeros(weight))
    except ValueError as error:
        return str(error)
    return None


def _allowed(weight: Tensor, mode: Mode) -> list[str]:
    """
    The kernels to choose from.

    :raises ValueError: if the environment names one that there is not
    """
    names = [name for name, k in KERNELS.items() if k.refusal(weight) is None]
    if forced := os.environ.get(FORCED):
        wanted = [word.strip() for word in forced.split(",")]
        if unknown := set(wanted) - set(KERNELS):
            raise ValueError(
                f"{FORCED}={forced} names {', '.join(sorted(unknown))}; known are "
                f"{', '.join(KERNELS)}"
            )
        names = [name for name in names if name in wanted]
    elif "mma_sp" in names and "triton" in names:
        names.remove("triton")  # never the faster of the two
    if mode == "memory":  # one copy: the kernel for any number of tokens
        names = [name for name in names if name == "cusparselt"]
    return names


def _plan(weight: Tensor, allowed: list[str]) -> Plan:
    """The plan from disk, or measured now and put there."""
    path = plans.key_of(weight, allowed).path
    plan = plans.load(path)
    if plan is None or not set(plan.kernels) <= set(allowed):
        usable = []
        for name in allowed:
            reason = None if name == "dense" else survives(name, weight)
            if reason is None:
                usable.append(name)
            else:
                logger.warning(
                    "%s is not used for weights of shape %s, %s: %s",
                    *(name, tuple(weight.shape), weight.dtype, reason),
                )
        try:
            plan = tune(weight, {name: KERNELS[name] for name in usable})
        except RuntimeError as error:
            logger.warning("no sparse kernels for this shape: %s", error)
            return Plan(len(weight), [Bucket(1, Way("dense", (), 0.0), [])])
        plans.save(plan, path)
    logger.info(
        "kernels for weights of shape %s, %s, by tokens (microseconds):\n%s\n%s",
        tuple(weight.shape),
        weight.dtype,
        plan.table(),
        _memory(weight, plan),
    )
    return plan


def _memory(weight: Tensor, plan: Plan) -> str:
    """What the plan's copies of a weight cost, in words."""
    kept = 9 / 16 if weight.dtype in WIDE else 5 / 8
    shares = [1.0 if name == "dense" else kept for name in plan.kernels]
    text = (
        f"copies kept: {', '.join(plan.kernels)}; together {sum(shares):.2f} of the "
        "dense weight's memory"
    )
    if "dense" in plan.kernels and len(plan.kernels) > 1:
        text += (
            f", {weight.nbytes / 1e6:.0f} MB a layer of it dense (forbid: memory mode)"
        )
    return text


_TOLD: set[str] = set()


def _log(name: str, reason: str) -> None:
    """Warn of each reason once, with the first layer that it holds for."""
    level = logging.DEBUG if reason in _TOLD else logging.WARNING
    _TOLD.add(reason)
    logger.log(level, "%s stays dense, as will any layer alike: %s", name, reason)
