# SPDX-License-Identifier: Apache-2.0
"""The decoder layers of a model, found and run one by one."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nm_permute_plugin.pruning.running.masked import forwards
from nm_permute_plugin.pruning.statistics import (
    Batch,
    first_sample,
    forward,
    on_device,
)


@dataclass(frozen=True)
class DecoderLayers:
    """
    Layers that run one after the other.

    :param names: of the layers, in order
    """

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]

    def __len__(self) -> int:
        return len(self.modules)


@dataclass
class Calls:
    """
    What a model hands to its decoder layers for one batch.

    :ivar hidden: what enters the first layer
    :ivar others: all other arguments (positions, masks), by layer
    """

    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    others: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


def decoder_layers(model: nn.Module, linears: Iterable[str]) -> DecoderLayers:
    """
    The entries of the outermost ``ModuleList`` that holds all the linears.

    :param linears: names of the linears that are pruned
    :raises ValueError: if no list holds them all
    """
    linears = list(linears)
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    for name, modules in lists:
        outside = [x for x in linears if not x.startswith(f"{name}.")]
        if not outside:
            names = tuple(f"{name}.{i}" for i in range(len(modules)))
            return DecoderLayers(names, tuple(modules))
    lost = next(x for x in linears if not lists or not x.startswith(f"{lists[0][0]}."))
    where = f"outside of {lists[0][0]}" if lists else "in a model without such a list"
    raise ValueError(
        f"decoder layers are taken one by one, but {lost} stands {where}: add it to "
        "`ignore`, or use end_to_end instead (`objective`, or `recover` without blocks)"
    )


def calls_of(model: nn.Module, layers: DecoderLayers, batch: Batch) -> Calls:
    """What enters every layer for a batch; no layer runs, and nothing after them."""
    calls = Calls()

    def record(*args: Any, **kwargs: Any) -> Tensor:
        hidden: Tensor = args[0] if args else kwargs.pop("hidden_states")
        if not calls.others:
            calls.hidden = hidden
        calls.others.append((args[1:], kwargs))
        if len(calls.others) == len(layers):
            raise _AllCalled
        return hidden

    replaced = dict.fromkeys(layers.modules, record)
    with torch.no_grad(), forwards(replaced), suppress(_AllCalled):
        forward(model, on_device(batch, model))
    return calls


def run_layers(
    layers: DecoderLayers, calls: Calls, window: range, hidden: Tensor
) -> Tensor:
    """What comes out of the last layer of the window for what enters its first."""
    for index in window:
        args, kwargs = calls.others[index]
        out = layers.modules[index](hidden, *args, **kwargs)
        hidden = out if isinstance(out, Tensor) else out[0]
    return hidden


def check_layers(
    model: nn.Module, layers: DecoderLayers, batches: Sequence[Batch]
) -> None:
    """
    See that the layers, run one by one, do what they do inside the model.

    :raises ValueError: if they do not
    """
    batch = first_sample(batches[0])
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: Any) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])

    hook = layers.modules[-1].register_forward_hook(keep)
    try:
        with torch.no_grad():
            forward(model, on_device(batch, model))
    finally:
        hook.remove()
    calls = calls_of(model, layers, batch)
    if len(calls.others) != len(layers) or not _runs_alike(layers, calls, seen):
        raise ValueError(
            f"the layers {layers.names[0]} to {layers.names[-1]} of "
            f"{type(model).__name__} do not run one after the other on their own; "
            "use end_to_end instead (`objective`, or `recover` without blocks)"
        )


def _runs_alike(layers: DecoderLayers, calls: Calls, seen: Sequence[Tensor]) -> bool:
    with torch.no_grad():
        ours = run_layers(layers, calls, range(len(layers)), calls.hidden)
    if len(seen) != 1 or ours.shape != seen[0].shape:
        return False
    # NaN passes: that is for the first error to tell
    return not bool((ours - seen[0]).norm() > 0.01 * seen[0].norm())


class _AllCalled(Exception):
    """Every layer has been called: the rest of the model need not run."""
