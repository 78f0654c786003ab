# SPDX-License-Identifier: Apache-2.0
"""Calls replayed as CUDA graphs: small models' kernels are shorter than their launches."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from loguru import logger
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

EAGER_CALLS = 2
"""Of arguments of one shape before a capture: the first compiles, the second is timed."""

MOST_GRAPHS = 4
"""Each holds the memory of a call; batches have few shapes."""

LAUNCHING = 0.8
"""A call that launches for this share of its time leaves the GPU waiting."""


@dataclass(frozen=True)
class _Graph:
    """A captured call: what it reads, and what it leaves."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    output: Tensor


class Replay:
    """
    Calls one function again and again; on a GPU that waits for launches, as a CUDA graph.

    The function reads its arguments and what stays where it is in memory; it gives back
    one tensor, and changes others in place. Python's part of it runs for the first calls
    only, so it must do the same for all arguments of one shape. What cannot be captured
    (operations that wait for the GPU) is called as ever.

    :param function: of trees of tensors and constants
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._seen: Counter[object] = Counter()
        self._graphs: dict[object, _Graph] = {}
        self._launches = False
        self._fails = False

    def __call__(self, *arguments: Any) -> Tensor:
        """What the function gives back; until the next call, where it was replayed."""
        leaves, tree = tree_flatten(arguments)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if self._fails or not all(tensor.is_cuda for tensor in tensors):
            return self._function(*arguments)
        key = str(tree), *(_kind(leaf) for leaf in leaves)
        if key not in self._graphs:
            self._seen[key] += 1
            if self._seen[key] <= EAGER_CALLS:
                return self._timed(*arguments)
            if not self._launches or len(self._graphs) == MOST_GRAPHS:
                return self._function(*arguments)
            graph = self._captured(leaves, tree)
            if graph is None:
                return self._function(*arguments)
            self._graphs[key] = graph
        graph = self._graphs[key]
        for own, given in zip(graph.inputs, tensors, strict=True):
            own.copy_(given)
        graph.graph.replay()
        return graph.output

    def _timed(self, *arguments: Any) -> Tensor:
        """A plain call, which finds out whether the GPU waits for launches."""
        torch.cuda.synchronize()
        started = time.perf_counter()
        output = self._function(*arguments)
        launched = time.perf_counter()
        torch.cuda.synchronize()
        ended = time.perf_counter()
        self._launches = launched - started > LAUNCHING * (ended - started)
        return output

    def _captured(self, leaves: list[Any], tree: Any) -> _Graph | None:
        """The call as a graph, not run yet; None if it cannot be one."""
        own = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        torch.cuda.empty_cache()  # the graph has memory of its own
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                output = self._function(*tree_unflatten(own, tree))
        except RuntimeError as error:
            self._fails = True
            torch.cuda.synchronize()
            first = (str(error).splitlines() or [""])[0]
            logger.info(f"steps run without a CUDA graph: {first}")
            return None
        return _Graph(graph, [leaf for leaf in own if isinstance(leaf, Tensor)], output)


def _kind(leaf: object) -> object:
    """What a captured graph takes for granted of an argument."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    return leaf
