# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints this plugin serves, under which name, and in which mode."""

import os
from collections.abc import Mapping
from typing import Literal, cast, get_args

from nm_permute_plugin.checkpoint.config import QUANT_METHOD

NAME = "nm_sparse24"
"""vLLM registers and selects our quantization method under this name."""

MODE_VARIABLE = "NM_PERMUTE_SERVE"
"""This environment variable selects the mode; vLLM's worker processes inherit it."""

Mode = Literal["auto", "memory", "dense"]
"""How 2:4 layers are served: ``auto`` runs the fastest kernel for each number of tokens,
dense ones too; ``memory`` keeps one sparse copy of each weight and no dense one, even where
that is slower; ``dense`` runs vLLM's own kernels only."""


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
        and block.get("format") in ("sparse-24-bitmask", "dense")
        and block.get("sparsity_structure") == "2:4"
    )


def mode() -> Mode:
    """
    Return the mode that ``NM_PERMUTE_SERVE`` names; ``auto`` if it is not set.

    :raises ValueError: if the variable names no mode
    """
    return must_be_mode(os.environ.get(MODE_VARIABLE, "auto"), MODE_VARIABLE)


def must_be_mode(word: object, name: str) -> Mode:
    """
    Return a word that names a mode.

    :param name: what the message calls the word
    :raises ValueError: if it names none
    """
    if word not in get_args(Mode):
        raise ValueError(
            f"{name} is {word!r}; it must be one of {', '.join(get_args(Mode))}"
        )
    return cast(Mode, word)
