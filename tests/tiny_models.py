# SPDX-License-Identifier: Apache-2.0
"""Tiny random models, their tokenizers, and text that they can learn."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.specs.architectures import head_dim_of, spec_of
from nm_permute_plugin.specs.spec import ResolvedSpec, resolve

VOCABULARY = 48

CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def tiny_model(
    architecture: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **options
) -> PreTrainedModel:
    torch.manual_seed(seed)
    config_class, model_class = CLASSES[architecture]
    size = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    model = model_class(config_class(**size | options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model.to(dtype).eval()


def _linears(model: nn.Module) -> list[str]:
    """The linears that are pruned by default: all but the head."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]


def resolve_model(
    model: PreTrainedModel, prunable: list[str] | None = None
) -> ResolvedSpec:
    return resolve(
        model,
        spec_of(model),
        NMPattern(2, 4),
        _linears(model) if prunable is None else prunable,
        head_dim_of(model.config),
    )


def save(model: PreTrainedModel, folder: Path) -> Path:
    words = models.WordLevel(
        {f"w{i:02}": i for i in range(VOCABULARY)}, unk_token="w00"
    )
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w00", pad_token="w01", eos_token="w02"
    ).save_pretrained(folder)
    return folder


def chain_rows(count: int, length: int, seed: int) -> Tensor:
    """Tokens that follow one fixed cycle-like map, with one jump in ten."""
    follows = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(VOCABULARY, (count, length), generator=generator)
    jumps = torch.rand(count, length, generator=generator) < 0.1
    for i in range(1, length):
        rows[:, i] = torch.where(jumps[:, i], rows[:, i], follows[rows[:, i - 1]])
    return rows
