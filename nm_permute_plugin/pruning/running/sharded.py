# SPDX-License-Identifier: Apache-2.0
"""
A model whose weights lie in shards on the GPUs of several ranks, by PyTorch's FSDP2.

The model itself stays on the CPU, whole: it is folded and pruned there. Its sharded twin
runs: before a layer runs, its weights are gathered, and they are freed after it.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from nm_permute_plugin.pruning import ranks
from nm_permute_plugin.pruning.running.masked import linear
from nm_permute_plugin.pruning.running.memory import repeated_layers

LEARNED = "nm_learned"
"""The parameter that a linear of the twin has beside its own: what is learned."""


def sharded_twin(
    model: nn.Module,
    linears: Iterable[str],
    learned: Mapping[str, Tensor],
    start: Callable[[str], Tensor],
) -> nn.Module:
    """
    A twin of a model in shards, one part of every weight on each rank.

    Gradients of what is learned are summed over ranks, and lie in shards as it does.

    :param model: whole, on the CPU, where it stays as it is; the values are those of the
        first rank
    :param linears: that are pruned: what repeats around them is gathered at a time
    :param learned: of some linears, what a parameter is like that ``LEARNED`` names in the
        twin
    :param start: the value that it begins with, by linear; asked for on the first rank
    :raises ValueError: if a weight is not on the CPU
    """
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu":
            raise ValueError(
                f"memory.shard takes a model on the CPU, which every rank has, but {name} "
                f"is on {parameter.device}: load it without device_map, and leave out "
                "--device"
            )
    device = ranks.device()
    memo: dict[int, object] = {
        id(parameter): _empty(parameter) for parameter in model.parameters()
    }
    memo |= {id(b): b.detach().to(device) for b in model.buffers()}
    twin = copy.deepcopy(model, memo)
    for name, like in learned.items():
        own = nn.Parameter(torch.empty_like(like, device="meta"))
        linear(twin, name).register_parameter(LEARNED, own)
    mesh = init_device_mesh(device.type, (ranks.count(),))
    for layer in repeated_layers(twin, linears):
        fully_shard(layer, mesh=mesh)
    fully_shard(twin, mesh=mesh)
    for module in twin.modules():
        if isinstance(module, FSDPModule):
            # The sum of the ranks' parts, and not their mean.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    twin._apply(
        lambda t: torch.empty_like(t, device=device) if t.is_meta else t, recurse=True
    )
    whole = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            owner, _, leaf = name.rpartition(".")
            value: Callable[[], Tensor] = partial(whole.__getitem__, name)
            value = partial(start, owner) if leaf == LEARNED else value
            _deal(value, parameter)
    return twin.eval()


def _deal(whole: Callable[[], Tensor], parameter: Tensor) -> None:
    """Give every rank its rows of the first rank's value."""
    own, count = own_shard(parameter), ranks.count()
    most = -(-len(parameter) // count)
    shape, device = parameter.shape[1:], own.device
    parts: list[Tensor] | None = None
    if ranks.is_first():
        padded = own.new_zeros(most * count, *shape)
        padded[: len(parameter)] = whole().to(device, own.dtype)
        parts = list(padded.chunk(count))
    received = own.new_empty(most, *shape)
    torch.distributed.scatter(received, parts)
    own.copy_(received[: len(own)])


def learned_of(twin: nn.Module, name: str) -> nn.Parameter:
    """What is learned of a linear: whole while its layer runs, in shards otherwise."""
    parameter = linear(twin, name).get_parameter(LEARNED)
    return parameter


def own_shard(parameter: Tensor) -> Tensor:
    """The part of a sharded parameter that this rank holds, itself."""
    sharded = cast("DTensor", parameter.detach())
    local: Tensor = sharded.to_local()
    return local


def gathered_rows(shard: Tensor, rows: int) -> Tensor:
    """
    A whole tensor on the CPU of every rank, from all ranks' shards.

    :param shard: of a sharded parameter
    :param rows: of the whole
    """
    count = ranks.count()
    most = -(-rows // count)
    padded = shard.new_zeros(most, *shard.shape[1:])
    padded[: len(shard)] = shard
    parts = [torch.empty_like(padded) for _ in range(count)]
    torch.distributed.all_gather(parts, padded)
    return torch.cat(parts)[:rows].cpu()


def _empty(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter without memory; frozen, as all weights are while masks are learned."""
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


@contextmanager
def holding(
    parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> Iterator[None]:
    """Let sharded parameters hold other values, shard by shard, while the context lasts."""
    before = {name: own_shard(parameters[name]).clone() for name in values}
    try:
        for name, value in values.items():
            own_shard(parameters[name]).copy_(value)
        yield
    finally:
        for name, value in before.items():
            own_shard(parameters[name]).copy_(value)
