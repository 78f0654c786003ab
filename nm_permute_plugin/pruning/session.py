# SPDX-License-Identifier: Apache-2.0
"""
Measure a dense model, search and learn once for all recipes that are tried on it.

What was found is known by the content of what it was found from: weights, tokens, settings.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from hashlib import blake2b
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from nm_permute_plugin.pruning.data import Data
from nm_permute_plugin.pruning.resuming import expect, is_resuming, kept
from nm_permute_plugin.pruning.settings import Settings

T = TypeVar("T")

_found: ContextVar[dict[str, object] | None] = ContextVar("_found", default=None)


@contextmanager
def session() -> Iterator[None]:
    """
    Keep what is measured and searched, and take it again, while the context lasts.

    A run whose model holds the same weights, on the same data, does not measure them
    again, does not search again with the same score, pattern, seed and loss, and does not
    learn again where only the recovery or the format differ, or a budget that leaves the
    same linears dense. What it finds is the same as without a session, up to rounding.

    >>> import nm_permute_plugin as nmp
    >>> with nmp.session():  # doctest: +SKIP
    ...     for method in ("search", "learned"):
    ...         model = AutoModelForCausalLM.from_pretrained("MODEL", dtype="auto")
    ...         pruned = nmp.prune(model, data, nmp.Settings(method=method))
    """
    token = _found.set({})
    try:
        yield
    finally:
        _found.reset(token)


def recognise(*parts: object) -> str:
    """
    A digest of the content of models, tensors, and what holds them, in a session.

    Outside of one it is empty: nothing is kept there, and large models are not read.
    A run that can go on (``resuming``) is a session as well.
    """
    if _found.get() is None and not is_resuming():
        return ""
    total = blake2b(digest_size=16)
    for part in parts:
        _add(total, part)
    return total.hexdigest()


def once(make: Callable[[], T], what: str, *known_by: object) -> T:
    """
    What ``make`` makes, or what it made for the same ``known_by`` in this session.

    :param what: is made, in words
    :param known_by: words, numbers, and what ``recognise`` gave
    """
    found = _found.get()
    if found is None:
        return kept(make, what, *known_by)
    key = repr((what, *known_by))
    if key not in found:
        found[key] = kept(make, what, *known_by)
    return cast("T", found[key])


def known_run(
    model: nn.Module, prunable: Sequence[str], data: Data, settings: Settings
) -> str:
    """
    A digest of what a run measures, which goes on only if it was given the same before.

    :raises ValueError: if the folder of ``resuming`` holds another run's state
    """
    weights, samples = recognise(model), recognise(data.train, data.validation)
    if is_resuming():
        first = next(model.parameters())
        given = {
            "torch": torch.__version__,
            "device": first.device.type,
            "dtype": first.dtype,
            "model": f"{type(model).__name__} of weights {weights[:8]}",
            "calibration data": f"{data}, {samples[:8]}",
            # How the checkpoint is stored changes nothing of what is found.
            **settings.model_dump(exclude={"format"}),
        }
        expect(given, _bytes(model))
    return recognise(weights, prunable, samples)


def _bytes(model: nn.Module) -> int:
    return sum(
        parameter.nbytes
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
    )


def _add(total: blake2b, part: object) -> None:
    total.update(type(part).__name__.encode())
    if isinstance(part, nn.Module):
        total.update(repr(getattr(part, "config", None)).encode())
        for name, module in part.named_modules():
            # Of a module alone: an offloaded model is never whole where it runs.
            _add(total, name)
            _add(total, dict(module.named_parameters(recurse=False)))
            _add(total, dict(module.named_buffers(recurse=False)))
    elif isinstance(part, Tensor):
        total.update(f"{part.dtype} {tuple(part.shape)}".encode())
        flat = part.detach().contiguous().flatten().cpu()
        total.update(flat.view(torch.uint8).numpy().data)
    elif isinstance(part, Mapping):
        for key, value in part.items():
            _add(total, key)
            _add(total, value)
    elif isinstance(part, Sequence) and not isinstance(part, str):
        for value in part:
            _add(total, value)
    else:
        total.update(repr(part).encode())
