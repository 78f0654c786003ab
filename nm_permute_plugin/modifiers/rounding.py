# SPDX-License-Identifier: Apache-2.0
"""How the quantization modifiers that follow ours will round the weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization.calibration import initialize_observer
from torch import Tensor, nn

from nm_permute_plugin.modifiers.neighbours import after, is_kind, weight_groups
from nm_permute_plugin.pruning.recover.rounding import Rounding


def roundings_of(
    ours: Modifier, modifiers: Sequence[Modifier], model: nn.Module
) -> dict[str, Rounding]:
    """
    How each linear's weights will be rounded to the nearest; none for those that will not.

    A modifier that changes weights before they are rounded (SmoothQuant, AWQ), or that
    finds their rounding by data (GPTQ, AutoRound), ends it: what it does is not known yet.
    """
    found: dict[str, Rounding] = {}
    for other in after(ours, modifiers):
        if not is_kind(other, "QuantizationModifier"):
            break
        for weights, modules in weight_groups(other, model):
            rounding = _ToNearest(QuantizationScheme(targets=[], weights=weights))
            found |= dict.fromkeys(modules, rounding)
    return found


@dataclass(frozen=True)
class _ToNearest:
    """
    Rounds as ``QuantizationModifier`` does, with scales of its observer.

    The global scale of NVFP4 is each linear's own; those of fused linears will share one.
    """

    scheme: QuantizationScheme

    def __call__(self, weight: Tensor) -> Tensor:
        holder: Any = nn.Module()
        holder.quantization_scheme = self.scheme
        initialize_observer(holder, "weight")
        found = holder.weight_observer(weight).get_qparams()
        served: Tensor = fake_quantize(
            weight,
            found["scale"],
            found["zero_point"],
            self.scheme.weights,
            found["global_scale"],
        )
        return served
