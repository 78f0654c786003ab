# SPDX-License-Identifier: Apache-2.0
"""The product of activations with a 2:4 weight."""

from __future__ import annotations

from typing import Literal

import torch
from loguru import logger
from torch import Tensor

Mode = Literal["auto", "memory", "dense"]


class SparseLinear:
    """A 2:4 weight, made ready for its products."""

    @classmethod
    def prepare(cls, name: str, weight: Tensor, mode: Mode) -> SparseLinear | None:
        """
        The weight for sparse products; None where there are none, with a log line.

        :param name: the layer, for messages
        :param weight: [out, in], dense values that are 2:4
        """
        logger.warning(f"{name} stays dense: no sparse kernel for {weight.device}")
        return None

    def __call__(self, x: Tensor) -> Tensor:
        """x [tokens, in] -> [tokens, out]."""
        raise NotImplementedError

    def scaled_mm(
        self,
        x: Tensor,
        scale_x: Tensor,
        scale_weight: Tensor,
        bias: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """The product of 8-bit x with an 8-bit weight, scaled, plus the bias."""
        raise NotImplementedError
