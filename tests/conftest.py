# SPDX-License-Identifier: Apache-2.0
"""What all tests share: the hypothesis profile, a seeded generator and tiny models."""

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import from_blocks
from nm_permute_plugin.specs.architectures import head_dim_of, spec_of
from nm_permute_plugin.specs.spec import ResolvedSpec, resolve

# One model forward takes longer than hypothesis' 200 ms; no database in the work tree.
settings.register_profile("nm_permute", deadline=None, max_examples=40, database=None)
settings.load_profile("nm_permute")

# On tiny tensors threads only wait for each other.
torch.set_num_threads(1)

VOCABULARY = 48

CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}

TinyModel = Callable[..., PreTrainedModel]
LegalPerms = Callable[..., dict[str, Tensor]]


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded source of random numbers."""
    return torch.Generator().manual_seed(20260222)


@pytest.fixture
def tiny_model() -> Iterator[TinyModel]:
    """
    A factory: ``tiny_model("llama", num_key_value_heads=1)`` is a random model.

    Every parameter is random, norm weights and biases too: a fold that forgets one of
    them shows in the logits only if it is not constant.
    """
    with torch.random.fork_rng(devices=[]):
        yield _tiny_model


@pytest.fixture
def resolve_model() -> Callable[..., ResolvedSpec]:
    """A factory: the resolved spec of a model whose linears are all pruned 2:4."""
    return _resolve_model


@pytest.fixture
def legal_perms() -> LegalPerms:
    """A factory: a random permutation of every space that stays inside the walls."""
    return _legal_perms


@pytest.fixture
def tokens() -> Tensor:
    """Three rows of twelve tokens that every tiny model knows."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(VOCABULARY, (3, 12), generator=generator)


def _tiny_model(
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


def _resolve_model(
    model: PreTrainedModel, prunable: list[str] | None = None
) -> ResolvedSpec:
    return resolve(
        model,
        spec_of(model),
        NMPattern(2, 4),
        _linears(model) if prunable is None else prunable,
        head_dim_of(model.config),
    )


def _legal_perms(resolved: ResolvedSpec, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: from_blocks(
            torch.rand(
                space.size // space.wall, space.wall, generator=generator
            ).argsort()
        )
        for name, space in resolved.spaces.items()
    }
