# SPDX-License-Identifier: Apache-2.0
"""
Multiplies tokens by the packed 2:4 weights of their routed experts, by ``experts24.cu``.

Decoding reads the weights of a few experts once for few tokens: its time is the bytes.
Packed weights are 0.5625 of dense ones, and the sparse tensor cores take them as they are.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nm_permute_plugin.serving.kernels import nvidia
from nm_permute_plugin.serving.kernels.expert_product import (
    KINDS,
    ExpertSettings,
    ProductShape,
    code_of,
    function,
)
from nm_permute_plugin.serving.kernels.kernel import (
    Settings,
    unsupported_card,
    unsupported_dtype,
)
from nm_permute_plugin.serving.kernels.packing import CHANNELS, ROWS, pack

MOST_EXPERTS = 1024
"""``experts.cu`` sorts pairs by at most so many experts."""

MOST_TOKENS = 256
"""More tokens are left to a dense product of expanded weights."""

_MOST_DIRECT = 128
"""Blocks find their pairs themselves among at most so many, which takes a launch less."""

# Of both products: warps side by side in rows, warps along the channels, chunks ahead.
# Each was the fastest on an H100 for some number of tokens, or is for another shape.
_BOTH: list[tuple[Settings, Settings]] = [
    ((2, 4, 1), (2, 4, 1)),
    ((2, 4, 1), (1, 3, 1)),
    ((2, 4, 0), (2, 2, 1)),
    ((2, 4, 0), (1, 3, 0)),
    ((2, 4, 0), (1, 4, 0)),
]


@dataclass(frozen=True)
class PackedExperts:
    """
    A 2:4 weight of all experts, packed in the tensor cores' order.

    :param packed: uint8 [experts, out / 32, in / 128, bytes], each as ``pack`` does it
    :param dtype: the weight's
    """

    packed: Tensor
    dtype: torch.dtype

    @property
    def dense_shape(self) -> tuple[int, int, int]:
        """The shape of the dense weight: [experts, out, in]."""
        experts, tiles, chunks, _ = self.packed.shape
        return experts, ROWS * tiles, CHANNELS * chunks

    def expand(self, out: Tensor) -> Tensor:
        """
        Write the dense weight into ``out``, on a GPU, and return it.

        :param out: contiguous [experts, out, in], of the weight's dtype
        :raises RuntimeError: if the card refuses
        """
        experts, tiles, chunks, _ = self.packed.shape
        total, warps = experts * tiles * chunks, 8
        with torch.cuda.device_of(out):
            function("expand", out, None)(
                (-(-total // warps), 1), 32 * warps, [self.packed, out, total, chunks]
            )
        return out


def pack_experts(weights: Iterable[Tensor]) -> PackedExperts:
    """
    Pack the 2:4 weights of all experts [out, in], one after the other.

    :raises ValueError: if one is not 2:4, or of another shape or dtype
    """
    first, *others = ((pack(weight), weight.dtype) for weight in weights)
    packed = torch.stack([each for each, _ in (first, *others)])
    return PackedExperts(packed, first[1])


def unsupported(shape: tuple[int, int, int], like: Tensor) -> str | None:
    """
    Return why the kernel cannot multiply by a weight of experts; None if it can.

    :param shape: [experts, out, in] of the weight
    :param like: has the weight's dtype and device
    """
    experts, rows, channels = shape
    if reason := unsupported_dtype(like.dtype, KINDS):
        return reason
    if reason := unsupported_card(like):
        return reason
    if rows % ROWS or channels % CHANNELS:
        return f"{rows} x {channels} is no multiple of {ROWS} x {CHANNELS}"
    if experts > MOST_EXPERTS:
        return f"there are {experts} experts, and the kernel sorts {MOST_EXPERTS}"
    return None


def candidates(
    up: PackedExperts, down: PackedExperts, tokens: int, top_k: int
) -> list[Settings]:
    """
    List the settings worth measuring for so many tokens, and compile their kernels.

    :param up: [experts, 2 * inner, hidden], on a CUDA device
    :param down: [experts, hidden, inner]
    :param top_k: experts of a token
    :raises RuntimeError: if a kernel does not compile
    """
    found = settings_for(tokens, top_k, len(up.packed))
    shapes = dict.fromkeys(shape for each in found for shape in each.shapes())
    capability = nvidia.card_of(up.packed.device).capability
    architecture, kind = "sm_{}{}".format(*capability), KINDS[up.dtype]
    with ThreadPoolExecutor() as pool:  # the compiler releases the GIL
        list(pool.map(lambda shape: code_of(architecture, kind, shape), shapes))
    return [each.flat() for each in found]


def settings_for(tokens: int, top_k: int, experts: int) -> list[ExpertSettings]:
    """
    List the settings worth measuring for so many tokens.

    :param top_k: experts of a token
    :param experts: how many there are on this device
    """
    if tokens > MOST_TOKENS:
        return []
    pairs = tokens * top_k
    tiles, direct = (1,) if pairs <= 4 * experts else (1, 2), int(pairs <= _MOST_DIRECT)
    return [ExpertSettings(size, direct, *both) for size in tiles for both in _BOTH]


class Slots(NamedTuple):
    """
    Pairs that share an expert, at most a slot's size each.

    :param pair_of: int32 [slots, size], or -1; not read where ``direct``
    :param expert_of: int32 [slots], or -1; with ``direct`` of each pair
    :param direct: whether there is a slot for each pair, of which the kernel finds out
        which have pairs
    :param pairs: how many there are
    """

    pair_of: Tensor
    expert_of: Tensor
    direct: int
    pairs: int


def run(
    x: Tensor,
    up: PackedExperts,
    down: PackedExperts,
    topk_weights: Tensor,
    topk_ids: Tensor,
    settings: Settings,
    expert_map: Tensor | None = None,
) -> Tensor:
    """
    Compute the weighted sum of each token's experts, ``down(silu(gate(x)) * up(x))``.

    :param x: [tokens, hidden], of the weights' dtype
    :param up: [experts, 2 * inner, hidden]: gates, then ups
    :param down: [experts, hidden, inner]
    :param topk_weights: [tokens, k], what each expert's output is multiplied by
    :param topk_ids: [tokens, k], which experts
    :param settings: one of ``candidates``
    :param expert_map: [all experts], the places of those on this device in the weights, -1
        for others, whose outputs count as zero; None if all are here
    :return: [tokens, hidden]
    :raises RuntimeError: if the card or its driver refuses
    """
    chosen = ExpertSettings.of(settings)
    tokens, top_k = topk_ids.shape
    hidden, inner = down.dense_shape[1:]
    out = x.new_empty(tokens, hidden)
    if not tokens:
        return out
    ids = topk_ids if expert_map is None else expert_map[topk_ids.long()]
    ids = ids.to(torch.int32).contiguous()
    scale = topk_weights.float().contiguous()
    x = x.contiguous()
    pairs, size = tokens * top_k, 8 * chosen.tiles
    of_pairs = x.new_empty(pairs, inner + hidden)
    between, products = of_pairs.view(-1).split((pairs * inner, pairs * hidden))
    first, second = chosen.shapes()
    with torch.cuda.device_of(x):
        overlaps = _kernels_overlap(x.device)
        slots = Slots(ids, ids.flatten(), 1, pairs)
        if not chosen.direct:
            slots = Slots(*align(x, ids, len(up.packed), size), 0, pairs)
        follows = overlaps and not chosen.direct
        _product(first, x, up, between, slots, top_k, follows)
        _product(second, between, down, products, slots, 1, overlaps)
        halves = hidden // 2
        function("combine", x, None)(
            (-(-halves // 128), tokens),
            128,
            [products, scale, ids, out, top_k, halves],
            overlaps,
        )
    return out


def _kernels_overlap(device: torch.device) -> bool:
    """Whether a kernel may start on a card before the one before it has ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _product(
    shape: ProductShape,
    x: Tensor,
    weight: PackedExperts,
    out: Tensor,
    slots: Slots,
    top_k: int,
    overlaps: bool,
) -> None:
    """
    Multiply every pair by its expert's weight, into ``out``.

    :param top_k: so many pairs share a row of x
    :param overlaps: see ``nvidia.Function``
    """
    rows, chunks = weight.dense_shape[1] // (1 + shape.gated), weight.packed.shape[2]
    tensors = [weight.packed, x, out, slots.pair_of, slots.expert_of]
    function("experts24", out, shape)(
        (shape.row_blocks(rows), len(slots.expert_of)),
        shape.threads,
        [*tensors, slots.direct, slots.pairs, top_k, rows, chunks],
        overlaps,
    )


def align(x: Tensor, ids: Tensor, experts: int, size: int) -> tuple[Tensor, Tensor]:
    """
    Sort pairs by expert into slots of which each has one expert.

    Shapes depend on the number of pairs only, as a CUDA graph needs it.

    :param x: has the device, and the dtype that kernels are compiled for
    :param ids: int32 [...], the expert of each pair; negative: none of this device
    :param size: pairs of a slot
    :return: int32 [slots * size], the pairs of each slot, or -1; int32 [slots], the expert
        of each, or -1
    """
    pairs = ids.numel()
    slots = min(pairs, min(pairs, experts) + pairs // size)
    both = ids.new_empty(slots * (size + 1))
    pair_of, expert_of = both.split((slots * size, slots))
    arguments = [ids, pair_of, expert_of, pairs, slots, size, experts]
    function("align", x, None)((1, 1), 1024, arguments)
    return pair_of, expert_of
