# SPDX-License-Identifier: Apache-2.0
"""
Measure a dense model once, and search once, for all recipes that are tried on it.

What was found is known by the content of what it was found from: weights, tokens, settings.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from hashlib import blake2b
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

T = TypeVar("T")

_found: ContextVar[dict[str, object] | None] = ContextVar("_found", default=None)


@contextmanager
def session() -> Iterator[None]:
    """
    Keep what is measured and searched, and take it again, while the context lasts.

    A run whose model holds the same weights, on the same data, does not measure them
    again, and does not search again with the same score, pattern, seed and loss. What it
    finds is the same as without a session.

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
    """
    if _found.get() is None:
        return ""
    total = blake2b(digest_size=16)
    for part in parts:
        _add(total, part)
    return total.hexdigest()


def once(make: Callable[[], T], *known_by: object) -> T:
    """
    What ``make`` makes, or what it made for the same ``known_by`` in this session.

    :param known_by: words, numbers, and what ``recognise`` gave
    """
    found = _found.get()
    if found is None:
        return make()
    key = repr(known_by)
    if key not in found:
        found[key] = make()
    return cast("T", found[key])


def _add(total: blake2b, part: object) -> None:
    total.update(type(part).__name__.encode())
    if isinstance(part, nn.Module):
        total.update(repr(getattr(part, "config", None)).encode())
        _add(total, part.state_dict())
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
