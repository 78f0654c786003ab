# SPDX-License-Identifier: Apache-2.0
"""Tell by their names which matrices of a checkpoint pruning is for."""

import re

from nm_permute_plugin.checkpoint.directory import Checkpoint
from nm_permute_plugin.checkpoint.packed import packed_modules

_LAYER = re.compile(r"(?:^|\.)\d+\.")
_ROUTERS = ("gate", "router", "shared_expert_gate")
_OTHER_TABLES = ("relative_attention_bias", "relative_position_bias")


def prunable(checkpoint: Checkpoint) -> set[str]:
    """
    Lists the linears of a checkpoint's layers, which ``targets: [Linear]`` prunes.

    Left out are the head, embeddings, norms, and the routers of experts. A linear that
    is in no numbered layer, a pooler say, is not listed either.
    """
    names = {*checkpoint.matrices(), *packed_modules(checkpoint)}
    return {name for name in names if is_prunable(name)}


def is_prunable(module: str) -> bool:
    """
    Tells by its name whether a matrix is a linear of a layer.

    >>> [is_prunable(f"model.layers.3.mlp.{name}") for name in ("gate", "up_proj")]
    [False, True]
    >>> is_prunable("lm_head"), is_prunable("model.embed_tokens")
    (False, False)
    """
    parts = module.split(".")
    return (
        _LAYER.search(module) is not None
        and parts[-1] not in (*_ROUTERS, *_OTHER_TABLES)
        and "router" not in parts
        and not any("embed" in part for part in parts)
    )


def packed_experts(checkpoint: Checkpoint) -> list[str]:
    """Lists the tensors that hold the weights of all experts of a layer."""
    return [
        name
        for name, shard in checkpoint.where.items()
        if ".experts." in name and len(shard.tensors[name].shape) == 3
    ]
