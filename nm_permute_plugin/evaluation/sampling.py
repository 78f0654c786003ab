# SPDX-License-Identifier: Apache-2.0
"""Draw tokens from a language model's own predictions, many texts at a time."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from tqdm import tqdm
from transformers.cache_utils import DynamicCache, DynamicLayer

from nm_permute_plugin.evaluation.static_steps import StaticSteps, can_be_static

ON_CPU = 128
"""Texts at a time on a CPU, whose memory is not the limit."""

SHARE = 0.3
"""Of a GPU's memory that the weights leave: what keys, values and logits may take. With
more there is no room for CUDA graphs, without which a token takes five times as long."""

LOGITS_BYTES = 24
"""Bytes of an entry of the vocabulary while a token is drawn: float32, and its copies."""


def draw(
    model: nn.Module,
    begin: Sequence[int],
    texts: int,
    tokens: int,
    never: Sequence[int],
    static: bool | None = None,
) -> Int[Tensor, "texts tokens"]:
    """
    Draw texts at temperature 1 from torch's generator of the model's device.

    :param begin: the tokens that every text begins with; they are not among those returned
    :param never: tokens that are not drawn
    :param static: whether a step is the same for every token, as a CUDA graph wants it; by
        default on a GPU where the model allows it
    """
    device = next(model.parameters()).device
    if static is None:
        static = device.type == "cuda" and can_be_static(model)
    steps = StaticSteps if static else _GrowingSteps
    excluded = torch.tensor(list(never), dtype=torch.int64, device=device)
    ids = torch.tensor([list(begin)] * texts, device=device)
    drawn = torch.empty(texts, tokens, dtype=torch.int64, device=device)
    with torch.no_grad(), steps(model, len(begin) + tokens) as step:
        for place in tqdm(range(tokens), desc="Sampling text", leave=False):
            logits = step(ids).float()
            logits = logits.index_fill_(1, excluded, -torch.inf)
            ids = torch.multinomial(logits.softmax(-1), 1)
            drawn[:, place : place + 1] = ids
    return drawn.cpu()


def texts_at_a_time(model: nn.Module, tokens: int) -> int:
    """
    How many texts fit beside the model; the same on the same hardware.

    :param tokens: of each text
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        return ON_CPU
    weights = sum(p.nbytes for p in model.parameters())
    total = torch.cuda.get_device_properties(device).total_memory
    return max(1, int(SHARE * (total - weights)) // bytes_of_a_text(model, tokens))


def bytes_of_a_text(model: nn.Module, tokens: int) -> int:
    """The memory that the keys, values and logits of one text take."""
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    pairs = getattr(text, "num_key_value_heads", None) or heads
    element = next(model.parameters()).element_size()
    kept = 2 * text.num_hidden_layers * pairs * size * tokens * element
    return int(kept + text.vocab_size * LOGITS_BYTES)


class _GrowingSteps:
    """
    Run a model token by token; attention reads what there is so far.

    :param tokens: the most there will be
    """

    def __init__(self, model: nn.Module, tokens: int) -> None:
        config: Any = model.config
        self._model, self._cache = model, DynamicCache(config=config)
        self._cache.layers = [
            _RoomyLayer(tokens) if type(layer) is DynamicLayer else layer
            for layer in self._cache.layers
        ]

    def __enter__(self) -> "_GrowingSteps":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __call__(self, ids: Int[Tensor, "texts new"]) -> Tensor:
        """The logits of the next token."""
        # No attention mask: nothing is padding, least of all the beginning.
        out = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True)
        logits: Tensor = out.logits[:, -1]
        return logits


class _RoomyLayer(DynamicLayer):
    """
    Keys and values of one layer, in memory that is set aside once.

    transformers copies all of them for every token, into new memory each time; with a
    static cache it needs an attention mask, for which keys are repeated for every head.

    :param tokens: the most there will be
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self._tokens = tokens

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._all_keys, self._all_values = (
                states.new_empty(*states.shape[:-2], self._tokens, states.shape[-1])
                for states in (key_states, value_states)
            )
        first = self.get_seq_length()
        last = first + key_states.shape[-2]
        self._all_keys[..., first:last, :] = key_states
        self._all_values[..., first:last, :] = value_states
        self.keys = self._all_keys[..., :last, :]
        self.values = self._all_values[..., :last, :]
        return self.keys, self.values
