# SPDX-License-Identifier: Apache-2.0
"""The linears that serving fuses: they are sparse together, or dense together."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from nm_permute_plugin.specs.conv1d import weight_of
from nm_permute_plugin.specs.spec import ResolvedSpec

_EXPERT = re.compile(r"(?P<block>.*\.experts)\.\d+\.")


@dataclass(frozen=True)
class FusedLinears:
    """
    Linears that an engine for serving multiplies by as one.

    :param linears: the names of their modules
    :param shape: of the weight that they make together, [out, in]; None of experts, whose
        tokens differ
    :param weights: how many weights they have
    """

    linears: tuple[str, ...]
    shape: tuple[int, int] | None
    weights: int

    def __str__(self) -> str:
        """Their names, shortened where they have an owner in common.

        >>> str(FusedLinears(("0.attn.q_proj", "0.attn.k_proj"), (8, 4), 32))
        '0.attn.{q_proj,k_proj}'
        """
        first = self.linears[0]
        if self.shape is None:
            return first.partition(".experts.")[0] + ".experts"
        if len(self.linears) == 1:
            return first
        owner, _, _ = first.rpartition(".")
        leaves = [name.rpartition(".")[2] for name in self.linears]
        return f"{owner}.{{{','.join(leaves)}}}"


def fused_linears(
    model: nn.Module, resolved: ResolvedSpec, prunable: Sequence[str]
) -> list[FusedLinears]:
    """
    Sort linears into those that serving fuses, in the order of the model.

    Engines fuse linears of one module that read the same channels: queries, keys and
    values; gate and up. All routed experts of a layer are one block. Where an engine fuses
    fewer of them, to keep them together costs a little freedom and is served all the same.

    :param prunable: the names of the linears
    """
    space_of = {
        consumer.name: name
        for name, space in resolved.spaces.items()
        for consumer in space.consumers
    }
    together: dict[tuple[object, ...], list[str]] = {}
    for name in prunable:
        expert = _EXPERT.match(name)
        if expert is not None:
            key: tuple[object, ...] = (expert["block"],)
        else:
            module, (owner, _, _) = model.get_submodule(name), name.rpartition(".")
            width = weight_of(module).shape[1]
            key = owner, space_of.get(name, ""), width
        together.setdefault(key, []).append(name)
    return [_made(model, names) for names in together.values()]


def _made(model: nn.Module, names: Sequence[str]) -> FusedLinears:
    shapes = [weight_of(model.get_submodule(name)).shape for name in names]
    weights = sum(shape.numel() for shape in shapes)
    whole = sum(shape[0] for shape in shapes), int(shapes[0][1])
    return FusedLinears(
        tuple(names), None if _EXPERT.match(names[0]) else whole, weights
    )
