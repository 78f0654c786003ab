# SPDX-License-Identifier: Apache-2.0
"""The decoder layers of a model, found and run one by one."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nm_permute_plugin.pruning import ranks
from nm_permute_plugin.pruning.data import (
    Batch,
    Data,
    first_sample,
    forward,
    on_device,
    token_mask,
)
from nm_permute_plugin.pruning.running.loss import check_finite, relative_error
from nm_permute_plugin.pruning.running.masked import Mask, forwards, masked

Hidden = Float[Tensor, "*_places _width"]  # batches differ

MOST_BYTES = 1 << 30
"""Bytes of positions and attention masks that are kept from batch to batch; the model makes
those of further batches anew each time."""


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
    The arguments of a model's decoder layers for one batch.

    :ivar hidden: the hidden states that enter the first layer
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
    """The arguments of every layer for a batch; no layer runs, and nothing after them."""
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
    """Run the layers of the window on the hidden states that enter the first of them."""
    for index in window:
        args, kwargs = calls.others[index]
        out = layers.modules[index](hidden, *args, **kwargs)
        hidden = out if isinstance(out, Tensor) else out[0]
    return hidden


def check_layers(
    model: nn.Module, layers: DecoderLayers, batches: Sequence[Batch]
) -> None:
    """
    Refuse layers that do not do one by one what they do inside the model.

    :raises ValueError: naming the layers
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


class LayerStream:
    """
    The hidden states of all batches on their way through the decoder layers, on the CPU.

    Two streams run side by side: one through the dense layers, which give the targets, one
    through layers that are pruned already. So errors are corrected, not copied. Each of
    several ranks holds its rows of every batch.

    :param linears: names of the linears that are pruned
    :raises ValueError: if there are no decoder layers, or if they do not run on their own
    :ivar dense: the hidden states of the dense model, by batch, validation batches last
    :ivar pruned: those behind pruned layers
    """

    def __init__(self, model: nn.Module, linears: Iterable[str], data: Data) -> None:
        self.model = model
        parts = [*data.train, *data.validation]
        own = [ranks.own_part(batch, turn) for turn, batch in enumerate(parts)]
        self.batches, self._shares = [b for b, _ in own], [share for _, share in own]
        self.train = range(len(data.train))
        self.layers = decoder_layers(model, linears)
        check_layers(model, self.layers, self.batches)
        self._calls: dict[int, Calls] = {}
        self._bytes = 0
        self.dense: list[Hidden] = [
            self._arguments(number).hidden.cpu() for number in range(len(self.batches))
        ]
        self.pruned = list(self.dense)

    def advance(self, hidden: list[Hidden], window: range) -> None:
        """Run one of the streams through the layers of the window, without gradients."""
        with torch.no_grad():
            for number, entering in enumerate(hidden):
                hidden[number] = self._run(number, window, entering).cpu()

    def error(
        self, number: int, window: range, masks: Mapping[str, Mask]
    ) -> Float[Tensor, ""]:
        """
        The relative error of a batch behind the window, which only ``dense`` has passed;
        of several ranks, the part of it that is this one's, so that it wants summing.

        :param masks: of the linears in the window
        """
        with masked(self.model, masks):
            out = self._run(number, window, self.pruned[number])
        counted = token_mask(self.batches[number]).to(out.device)
        error = relative_error(out, self.dense[number].to(out.device), counted)
        return error * self._shares[number]

    def validate(self, window: range, masks: Mapping[str, Mask]) -> float:
        """
        The mean error of the validation batches behind the window.

        :raises ValueError: if it is not finite
        """
        numbers = range(len(self.train), len(self.batches))
        with torch.no_grad():
            errors = [float(self.error(number, window, masks)) for number in numbers]
        total = ranks.total(sum(errors))
        return check_finite(total / len(errors), "validation error of a layer")

    def _run(self, number: int, window: range, hidden: Hidden) -> Hidden:
        """Run a batch through the layers of the window, on the model's device."""
        calls = self._arguments(number)
        return run_layers(self.layers, calls, window, hidden.to(calls.hidden.device))

    def _arguments(self, number: int) -> Calls:
        """The arguments of the layers for a batch, kept while there is room."""
        if number in self._calls:
            return self._calls[number]
        calls = calls_of(self.model, self.layers, self.batches[number])
        tensors = {id(x): x for x in tree_leaves(calls.others) if isinstance(x, Tensor)}
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._bytes + size <= MOST_BYTES:
            self._bytes += size
            nothing = torch.empty(0, device=calls.hidden.device)
            self._calls[number] = Calls(nothing, calls.others)
        return calls


class _AllCalled(Exception):
    """Every layer has been called: the rest of the model need not run."""
