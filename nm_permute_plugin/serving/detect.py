# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints are ours, how they are to be served, and what became of them."""

import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import cast, get_args

from nm_permute_plugin.checkpoint.config import QUANT_METHOD
from nm_permute_plugin.serving.linear import Mode

MODE_VARIABLE = "NM_PERMUTE_SERVE"
"""The environment variable that names the mode; vLLM's processes inherit it."""

_FORMATS = ("sparse-24-bitmask", "dense")


def is_ours(quantization: Mapping[str, object]) -> bool:
    """
    Whether a quantization config is that of a 2:4 checkpoint, which vLLM would refuse.

    :param quantization: the ``quantization_config`` of a ``config.json``

    >>> is_ours({"quant_method": "compressed-tensors", "sparsity_config": {}})
    False
    """
    block = quantization.get("sparsity_config")
    return (
        quantization.get("quant_method") == QUANT_METHOD
        and isinstance(block, Mapping)
        and block.get("format") in _FORMATS
        and block.get("sparsity_structure") == "2:4"
    )


def mode() -> Mode:
    """
    How 2:4 layers are served, by ``NM_PERMUTE_SERVE``; ``auto`` if it is not set.

    :raises ValueError: for another word than a mode
    """
    word = os.environ.get(MODE_VARIABLE, "auto")
    if word not in get_args(Mode):
        raise ValueError(
            f"{MODE_VARIABLE} is {word!r}; it must be one of {', '.join(get_args(Mode))}"
        )
    return cast(Mode, word)


class RollCall:
    """
    Notes how each 2:4 layer is served, and says it once, when all have been loaded.

    :param warn: takes the message on layers that are served dense, one for each reason
    :param inform: takes the message on the others

    >>> roll_call = RollCall(print, print)
    >>> roll_call.expect("up"), roll_call.expect("down")
    (None, None)
    >>> roll_call.note("up", "no CUDA device")
    >>> roll_call.note("down", "no CUDA device")
    2 of 2 2:4 layers are served dense, from up to down: no CUDA device
    """

    def __init__(
        self, warn: Callable[[str], object], inform: Callable[[str], object]
    ) -> None:
        self._warn = warn
        self._inform = inform
        self._expected: set[str] = set()
        self._dense: dict[str, list[str]] = defaultdict(list)
        self._noted: set[str] = set()

    def expect(self, name: str) -> None:
        """A layer has been made, and will be noted."""
        self._expected.add(name)

    def note(self, name: str, reason: str | None) -> None:
        """
        A layer has been loaded.

        :param reason: why it is served dense, None if it is not
        """
        self._noted.add(name)
        if reason is not None:
            self._dense[reason].append(name)
        if self._noted != self._expected:
            return
        total = len(self._noted)
        for why, names in self._dense.items():
            which = names[0] if len(names) == 1 else f"from {names[0]} to {names[-1]}"
            self._warn(
                f"{len(names)} of {total} 2:4 layers are served dense, {which}: {why}"
            )
        sparse = total - sum(map(len, self._dense.values()))
        if sparse:
            self._inform(f"{sparse} of {total} 2:4 layers are served sparse")
        self._noted.clear()
        self._dense.clear()
