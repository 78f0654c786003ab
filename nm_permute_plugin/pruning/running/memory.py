# SPDX-License-Identifier: Apache-2.0
"""Layers whose activations are made anew in backward instead of kept."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nm_permute_plugin.pruning.running.masked import forwards


def repeated_layers(model: nn.Module, linears: Iterable[str]) -> list[nn.Module]:
    """
    The entries of the outermost ``ModuleList``s that hold any of the linears.

    :param linears: module names
    """
    linears = list(linears)
    outermost: list[str] = []
    layers: list[nn.Module] = []
    for name, modules in model.named_modules():
        inside = name.startswith(tuple(f"{one}." for one in outermost))
        if not isinstance(modules, nn.ModuleList) or inside:
            continue
        if any(linear.startswith(f"{name}.") for linear in linears):
            outermost.append(name)
            layers += modules
    return layers


@contextmanager
def checkpointed(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Keep of these layers what enters them only, while the context lasts."""
    with forwards({layer: partial(_rerun, layer.forward) for layer in layers}):
        yield


def kept_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """
    What a forward pass keeps for its backward pass, in bytes, parameters left out.

    :param forward: a pass that needs gradients
    """
    known = {
        tensor.untyped_storage().data_ptr()
        for tensor in chain(model.parameters(), model.buffers())
    }
    sizes: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that keeps itself would never be freed

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        out = forward()
    del out  # until here the graph kept everything alive, so no address came twice
    return sum(sizes.values())


def free_bytes(device: torch.device) -> int | None:
    """Memory that is left on a GPU, what PyTorch holds unused included; else None."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + unused


def _rerun(forward: Callable[..., Tensor], *args: object, **kwargs: object) -> Tensor:
    call = partial(forward, **kwargs)
    out: Tensor = checkpoint(call, *args, use_reentrant=False, preserve_rng_state=False)
    return out
