# SPDX-License-Identifier: Apache-2.0
"""Replay calls as CUDA graphs: kernels of small models are shorter than their launches."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from loguru import logger
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

EAGER_CALLS = 2
"""Eager warm-up calls for arguments of one shape before a capture; the first compiles."""

MOST_GRAPHS = 4
"""Graphs at most: each holds the memory of a call, and batches have few shapes."""

ROOM = 1.5
"""A capture needs this many times the memory that PyTorch holds to be free, because a graph
has memory of its own. Large models, whose kernels outlast their launches, do without."""


@dataclass(frozen=True)
class _Graph:
    """A captured call: what it reads, and what it leaves."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    output: Tensor


class CudaGraphs:
    """
    Calls one function again and again, as a CUDA graph on a GPU that has room for it.

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
        self._fails = False

    def __call__(self, *arguments: Any) -> Tensor:
        """What the function gives back; until the next call, where it was replayed."""
        leaves, tree = tree_flatten(arguments)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not tensors or not all(tensor.is_cuda for tensor in tensors):
            return self._function(*arguments)
        key = str(tree), *(_kind(leaf) for leaf in leaves)
        if key not in self._graphs:
            self._seen[key] += 1
            early = self._seen[key] <= EAGER_CALLS
            if early or self._fails or len(self._graphs) == MOST_GRAPHS:
                return self._function(*arguments)
            graph = self._captured(leaves, tree)
            if graph is None:
                self._fails = True
                return self._function(*arguments)
            self._graphs[key] = graph
        graph = self._graphs[key]
        for own, given in zip(graph.inputs, tensors, strict=True):
            own.copy_(given)
        graph.graph.replay()
        return graph.output

    def _captured(self, leaves: list[Any], tree: Any) -> _Graph | None:
        """The call as a graph, not run yet; None if it cannot be one."""
        held = torch.cuda.memory_reserved()
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info()[0] < ROOM * held:
            return None
        own = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                output = self._function(*tree_unflatten(own, tree))
        except RuntimeError as error:
            graph.reset()
            torch.cuda.empty_cache()
            cause = error.__context__ or error  # the end of a capture fails after it
            logger.info(f"Steps run without a CUDA graph: {cause}")
            return None
        return _Graph(graph, [leaf for leaf in own if isinstance(leaf, Tensor)], output)


def _kind(leaf: object) -> object:
    """What a captured graph takes for granted of an argument."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    return leaf
