# SPDX-License-Identifier: Apache-2.0
"""Measures the kernels of routed experts, and says which runs for how many tokens."""

import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from nm_permute_plugin.serving import kernel_table
from nm_permute_plugin.serving.kernel_table import BUCKETS, Bucket, Choice, KernelTable
from nm_permute_plugin.serving.kernels import experts
from nm_permute_plugin.serving.kernels.experts import PackedExperts
from nm_permute_plugin.serving.probe import crash_of
from nm_permute_plugin.serving.tune import TOLERANCE, choose, error_of, microseconds

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM shows what is under its name

SPARSE, DENSE = "experts", "dense"
"""The kernels' names in tables: ours on packed weights; vLLM's on expanded ones."""

DenseProduct = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Maps x, both dense weights, routing weights and ids [tokens, k] to [tokens, hidden]."""

_ROUTINGS = 4
"""So many routings are timed in turn, so that weights are not read from the L2 cache."""

_REFERENCE = 8
"""So many tokens of a result are compared with float32."""

_TABLES: dict[str, KernelTable] = {}
"""The tables of this process by the weights' shapes, dtype and experts of a token."""

_FAULTS: dict[str, str] = {}
"""Why this process measures experts no more, by the same names."""

_SCRATCH: dict[tuple[object, ...], Tensor] = {}
"""Room for the dense weights of one layer, which all layers of a shape share."""


def dense_weights(up: PackedExperts, down: PackedExperts) -> tuple[Tensor, Tensor]:
    """Expand both weights of a layer into room that all such layers share."""
    return up.expand(_room(up, "up")), down.expand(_room(down, "down"))


def table_of(
    up: PackedExperts, down: PackedExperts, top_k: int, dense: DenseProduct
) -> KernelTable:
    """
    Return the kernel table for experts of a shape, measured once and kept on disk.

    :param up: [experts, 2 * inner, hidden], on a CUDA device
    :param down: [experts, hidden, inner]
    :param top_k: experts of a token
    :param dense: vLLM's product
    :raises RuntimeError: if no kernel is left for some bucket
    """
    sizes = f"{up.dense_shape} {down.dense_shape} top {top_k}"
    name = f"{sizes} {up.dtype}"
    if name in _FAULTS:
        raise RuntimeError(_FAULTS[name])
    if name not in _TABLES:
        try:
            _TABLES[name] = _table(up, down, top_k, dense, sizes)
        except RuntimeError as error:
            _FAULTS[name] = str(error)
            _SCRATCH.clear()
            raise
        logger.info(
            "kernels for experts %s, by tokens (microseconds):\n%s",
            name,
            _TABLES[name].as_text(),
        )
        if DENSE not in _TABLES[name].kernels:
            _SCRATCH.clear()
    return _TABLES[name]


def _table(
    up: PackedExperts, down: PackedExperts, top_k: int, dense: DenseProduct, sizes: str
) -> KernelTable:
    """
    Read the kernel table from disk, or measure it now and keep it there.

    :param sizes: all that it depends on beside the card and the dtype
    :raises RuntimeError: if our kernel crashes, or none is left for some bucket
    """
    rows, allowed = up.dense_shape[1], [SPARSE, DENSE]
    path = kernel_table.path_of(up.packed, [sizes, str(up.dtype), *allowed])
    table = kernel_table.load(path, rows, allowed)
    if table is not None and (fault := _fault_of(table, top_k, len(up.packed))):
        logger.warning("ignored the kernel table in %s: %s", path, fault)
        table = None
    if table is None:
        count, hidden, inner = down.dense_shape
        dtype = str(up.dtype).removeprefix("torch.")
        words = (count, inner, hidden, top_k, dtype, up.packed.device)
        if reason := crash_of("nm_permute_plugin.serving.expert_probe", *words):
            raise RuntimeError(reason)
        buckets = [_bucket(up, down, tokens, top_k, dense) for tokens in BUCKETS]
        table = KernelTable(rows, buckets)
        kernel_table.save(table, path)
    return table


def _fault_of(table: KernelTable, top_k: int, count: int) -> str | None:
    """Return why a table that was kept is for other kernels or tokens, or None."""
    sizes = tuple(bucket.tokens for bucket in table.buckets)
    if sizes != BUCKETS:
        return f"it is for {sizes} tokens"
    for tokens, (kernel, settings, _), _ in table.buckets:
        known = experts.settings_for(tokens, top_k, count)
        if kernel == SPARSE and settings not in [each.flat() for each in known]:
            return f"{kernel} with {settings} for {tokens} tokens does not exist"
    return None


def _bucket(
    up: PackedExperts,
    down: PackedExperts,
    tokens: int,
    top_k: int,
    dense: DenseProduct,
) -> Bucket:
    """Measure every setting of both kernels at one number of tokens."""
    routings = [routing_of(up, tokens, top_k, seed) for seed in range(_ROUTINGS)]
    weights = dense_weights(up, down)
    expected = _reference(*weights, *routings[0])

    def expanded(x: Tensor, scales: Tensor, ids: Tensor) -> Tensor:
        return dense(x, *dense_weights(up, down), scales, ids)

    def packed(
        settings: tuple[int, ...], x: Tensor, scales: Tensor, ids: Tensor
    ) -> Tensor:
        return experts.run(x, up, down, scales, ids, settings)

    ways: list[tuple[str, tuple[int, ...], Callable[..., Tensor]]] = [
        (SPARSE, settings, partial(packed, settings))
        for settings in experts.candidates(up, down, tokens, top_k)
    ]
    best: dict[str, Choice] = {}
    for kernel, settings, call in [*ways, (DENSE, (), expanded)]:
        try:
            wrong = error_of(call(*routings[0]), expected)
            if not wrong <= TOLERANCE:
                raise RuntimeError(f"results are off by {wrong:.3g} of the largest")
            taken = microseconds([partial(call, *routing) for routing in routings])
        except RuntimeError as error:
            said = (kernel, settings, tokens, error)
            logger.warning("%s with %s is not used for %s tokens: %s", *said)
            continue
        if kernel not in best or taken < best[kernel].microseconds:
            best[kernel] = Choice(kernel, settings, taken)
    if not best:
        raise RuntimeError(f"no kernel multiplies {tokens} tokens by these experts")
    fastest = list(best.values())
    return Bucket(tokens, choose(fastest), fastest)


def routing_of(
    up: PackedExperts, tokens: int, top_k: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw tokens [tokens, hidden], and for each so many experts with their weights."""
    device, (count, _, hidden) = up.packed.device, up.dense_shape
    generator = torch.Generator(device).manual_seed(seed)
    # float32 by name: while vLLM loads a model, the default dtype is another.
    both = torch.empty(tokens, hidden + count, dtype=torch.float32, device=device)
    x, scores = both.normal_(generator=generator).split((hidden, count), -1)
    weights, ids = scores.softmax(-1).topk(min(top_k, count))
    return x.to(up.dtype), weights, ids.to(torch.int32)


def _reference(
    up: Tensor, down: Tensor, x: Tensor, weights: Tensor, ids: Tensor
) -> Tensor:
    """Compute the outputs of the first tokens in float32 [tokens, hidden]."""
    out = torch.zeros_like(x[:_REFERENCE], dtype=torch.float32)
    for token in range(len(out)):
        for weight, expert in zip(weights[token], ids[token].tolist(), strict=True):
            gate, value = (up[expert].float() @ x[token].float()).chunk(2)
            inner = torch.nn.functional.silu(gate) * value
            out[token] += weight * (down[expert].float() @ inner)
    return out


def _room(weight: PackedExperts, part: str) -> Tensor:
    """Return room for a dense weight, made once for each shape, dtype and device."""
    key = (part, weight.dense_shape, weight.dtype, weight.packed.device)
    if key not in _SCRATCH:
        _SCRATCH[key] = weight.packed.new_empty(weight.dense_shape, dtype=weight.dtype)
    return _SCRATCH[key]
