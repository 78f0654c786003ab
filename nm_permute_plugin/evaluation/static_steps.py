# SPDX-License-Identifier: Apache-2.0
"""
Run a language model token by token as a CUDA graph: its kernels are shorter than their
launches.
"""

from functools import partial
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import StaticCache, StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nm_permute_plugin.pruning.running.cuda_graph import MOST_GRAPHS, CudaGraphs

GROUPED = "nm_permute_grouped"
"""Names our attention function in transformers' registries."""


def can_be_static(model: nn.Module) -> bool:
    """
    Whether a step can be the same for every token: all keys are kept, and transformers
    knows the model to run with keys of a fixed length.
    """
    known: Any = model
    if not getattr(known, "_can_compile_fullgraph", False):
        return False
    if known.config._attn_implementation != "sdpa":
        return False
    layers = StaticCache(config=known.config, max_cache_len=1).layers
    return all(type(layer) is StaticLayer for layer in layers)


class StaticSteps:
    """
    Run a model token by token; attention reads one of a few lengths, under a mask.

    A context: within it the model attends by ``grouped_attention``.

    :param tokens: the most there will be
    """

    def __init__(self, model: nn.Module, tokens: int) -> None:
        # Loosely typed: transformers' stubs do not know what a model can do.
        known: Any = model
        self._model, self._usual = known, known.config._attn_implementation
        self._cache = StaticCache(config=known.config, max_cache_len=tokens)
        self._cache.layers = [_Part(tokens) for _ in self._cache.layers]
        self._lengths = [tokens * n // MOST_GRAPHS for n in range(1, MOST_GRAPHS + 1)]
        # Bound to no method of this object: a cycle would hold the keys until it is found.
        self._graphs = CudaGraphs(partial(_logits, known, self._cache))
        self._seen = 0

    def __enter__(self) -> "StaticSteps":
        ALL_ATTENTION_FUNCTIONS.register(GROUPED, grouped_attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(GROUPED, sdpa_mask)
        self._model.set_attn_implementation(GROUPED)
        return self

    def __exit__(self, *error: object) -> None:
        self._model.set_attn_implementation(self._usual)

    def __call__(self, ids: Int[Tensor, "texts new"]) -> Tensor:
        """The logits of the next token."""
        self._seen += ids.shape[1]
        length = next(length for length in self._lengths if length >= self._seen)
        return self._graphs(ids, length)


def _logits(model: Any, cache: StaticCache, ids: Tensor, length: int) -> Tensor:
    """The logits of the next token, from keys and values of so many tokens."""
    for layer in cache.layers:
        layer.read = length
    out = model(input_ids=ids, past_key_values=cache, use_cache=True)
    logits: Tensor = out.logits[:, -1]
    return logits


class _Part(StaticLayer):
    """
    Keys and values of one layer, of which a part is read.

    :ivar read: how many tokens, from the first on
    """

    def __init__(self, tokens: int) -> None:
        super().__init__(max_cache_len=tokens)
        self.read = tokens

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states)
        return keys[:, :, : self.read], values[:, :, : self.read]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.read, 0


def grouped_attention(
    module: nn.Module,
    query: Float[Tensor, "texts heads new size"],
    key: Float[Tensor, "texts pairs read size"],
    value: Float[Tensor, "texts pairs read size"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "texts new heads size"], None]:
    """
    Attention of one token in which heads that share a key are queries of it.

    transformers repeats keys and values for every head where there is a mask.
    """
    if query.shape[2] > 1 or kwargs.get("position_bias") is not None:
        attended: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return attended
    texts, heads, _, _ = query.shape
    grouped = query.reshape(texts, key.shape[1], -1, query.shape[-1])
    if attention_mask is not None:
        attention_mask = attention_mask.expand(texts, 1, grouped.shape[2], key.shape[2])
    out = F.scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, scale=scaling
    )
    return out.reshape(texts, 1, heads, out.shape[-1]), None
