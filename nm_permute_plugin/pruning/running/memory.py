# SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing, and whether a step needs it to fit into memory."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nm_permute_plugin.pruning import ranks
from nm_permute_plugin.pruning.data import Batch, first_sample, on_device, token_mask
from nm_permute_plugin.pruning.running.loss import loss, run
from nm_permute_plugin.pruning.running.masked import Mask, forwards, masked
from nm_permute_plugin.pruning.running.teacher import Teacher
from nm_permute_plugin.pruning.settings import MemorySettings

Masks = Callable[[], Mapping[str, Mask]]
"""Makes the masks of a step, by linear."""


def layers_to_checkpoint(
    teacher: Teacher, masks: Masks, batches: Sequence[Batch], settings: MemorySettings
) -> list[nn.Module]:
    """
    The layers to run again in backward: all that hold any masked linear, or none.

    ``gradient_checkpointing: null`` takes all of them where the activations of a step need
    more than half of a GPU's free memory, after what the teacher will keep. One row of the
    first batch is run to find out.

    :param masks: makes the masks of a step
    :param batches: the training batches
    """
    model = teacher.model
    wanted = settings.gradient_checkpointing
    if wanted is None and settings.shard:
        wanted = True  # for models that leave little room
    if wanted is None:
        free = free_bytes(next(model.parameters()).device)
        if free is not None:
            own, _ = ranks.own_part(batches[0], 0)
            needed = activation_bytes(teacher, masks, own, settings)
            wanted = 2 * needed > free - teacher.bytes_to_come(batches) / ranks.count()
            wanted = ranks.total(wanted) > 0  # one way on all of them
    return repeated_layers(model, masks()) if wanted else []


def activation_bytes(
    teacher: Teacher, masks: Masks, batch: Batch, settings: MemorySettings
) -> int:
    """How many bytes a step keeps between forward and backward, estimated from one row."""
    model, one = teacher.model, first_sample(batch)
    rows = len(token_mask(batch)) // len(token_mask(one))
    row = on_device(one, model)
    dense = Teacher(model, teacher.loss, keep=False)(row)
    with torch.enable_grad(), masked(model, masks()):
        of_row = kept_bytes(
            model, lambda: loss(run(model, row, teacher.loss), dense, row, teacher.loss)
        )
    return of_row * min(rows, settings.micro_batch_size or rows)


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
    """Keep only what enters these layers, and run them again in backward, meanwhile."""
    with forwards({layer: partial(_rerun, layer.forward) for layer in layers}):
        yield


def kept_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """
    The bytes that a forward pass keeps for its backward pass, parameters left out.

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
    """
    The free bytes of a GPU, what PyTorch holds unused included; None on other devices.
    """
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + unused


def _rerun(forward: Callable[..., Tensor], *args: object, **kwargs: object) -> Tensor:
    call = partial(forward, **kwargs)
    out: Tensor = checkpoint(call, *args, use_reentrant=False, preserve_rng_state=False)
    return out
