# SPDX-License-Identifier: Apache-2.0
"""Keep transformers from starting with random weights where it cannot read sparse ones."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

_PARTS = ("compressed", "bitmask", "shape")


def register_refusal() -> None:
    """
    Has ``from_pretrained`` look at the names of tensors before it reads them.

    Where they are those of a sparse format and ``config.json`` does not say so, whatever
    reads the checkpoint would find no weights and take random ones. Calling it again
    changes nothing, as does a transformers that loads in another way.
    """
    from transformers.modeling_utils import PreTrainedModel

    held = inspect.getattr_static(PreTrainedModel, "_load_pretrained_model", None)
    if not isinstance(held, staticmethod):
        return
    stock = held.__func__
    if hasattr(stock, "refuses_sparse"):
        return
    signature = inspect.signature(stock)

    @wraps(stock)
    def load(*args: Any, **options: Any) -> Any:
        given = signature.bind(*args, **options).arguments
        quantizer = getattr(given.get("load_config"), "hf_quantizer", None)
        if not hasattr(quantizer, "reads_sparse"):
            refuse_sparse(given.get("checkpoint_files") or ())
        return stock(*args, **options)

    load.__dict__["refuses_sparse"] = True
    PreTrainedModel._load_pretrained_model = staticmethod(load)


def refuse_sparse(files: Sequence[str]) -> None:
    """
    Checks that no weight in some files is stored sparse.

    :raises ValueError: if one is, naming it
    """
    names: set[str] = set()
    for file in files:
        if str(file).endswith(".safetensors"):
            names |= _names(file)
    for name in sorted(names):
        module, _, part = name.rpartition(".")
        if part == _PARTS[0] and all(f"{module}.{p}" in names for p in _PARTS):
            folder = Path(files[0]).parent
            raise ValueError(
                f"{folder}: {module} is stored sparse, and config.json does not say so "
                "in quantization_config.sparsity_config: its weights would be random. "
                "Take the config.json that it came with, or write it again with "
                "`nm-permute convert FOLDER OUT`, which reads it by its tensors"
            )


def _names(file: str) -> set[str]:
    """Lists the tensors of a file; none of a file that transformers will refuse."""
    try:
        with safe_open(file, "pt") as opened:
            return set(opened.keys())
    except (OSError, SafetensorError):
        return set()
