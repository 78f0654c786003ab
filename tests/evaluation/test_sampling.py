# SPDX-License-Identifier: Apache-2.0
"""What is drawn follows from the beginning and from all that was drawn before it."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)

from nm_permute_plugin.evaluation.sampling import (
    ON_CPU,
    bytes_of_a_text,
    draw,
    texts_at_a_time,
)
from nm_permute_plugin.evaluation.static_steps import (
    StaticSteps,
    can_be_static,
    grouped_attention,
)


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    )


def opt() -> nn.Module:
    size = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "word_embed_proj_dim": 32}
    return OPTForCausalLM(
        OPTConfig(vocab_size=48, **size, **heads, max_position_embeddings=64)
    )


def gemma3() -> nn.Module:
    """Every other layer sees a window of 8 tokens."""
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    layers = {"layer_types": ["sliding_attention", "full_attention"]}
    return Gemma3ForCausalLM(
        Gemma3TextConfig(vocab_size=48, **size, **heads, **layers, sliding_window=8)
    )


@pytest.fixture(params=["llama", "qwen3", gpt2, opt, gemma3])
def model(request: pytest.FixtureRequest, tiny_model) -> nn.Module:
    torch.manual_seed(0)
    if isinstance(request.param, str):
        return tiny_model(request.param)
    return request.param().eval()


def drawn_by_hand(model: nn.Module, begin: list[int], tokens: int) -> Tensor:
    """Without anything kept from token to token."""
    ids = torch.tensor([begin] * 3)
    with torch.no_grad():
        for _ in range(tokens):
            logits = model(input_ids=ids, use_cache=False).logits[:, -1].float()
            logits[:, [0, 1]] = -torch.inf
            ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1)], dim=1)
    return ids[:, len(begin) :]


@pytest.mark.parametrize("begin", [[2], [2, 5]])
def test_every_token_is_drawn_from_all_before_it(
    model: nn.Module, begin: list[int]
) -> None:
    torch.manual_seed(7)
    expected = drawn_by_hand(model, begin, 24)
    torch.manual_seed(7)
    found = draw(model, begin, texts=3, tokens=24, never=[0, 1])
    assert torch.equal(found, expected)
    if can_be_static(model):
        torch.manual_seed(7)
        found = draw(model, begin, texts=3, tokens=24, never=[0, 1], static=True)
        assert torch.equal(found, expected)


def test_steps_are_static_where_every_layer_keeps_all_keys(tiny_model) -> None:
    assert can_be_static(tiny_model("llama"))
    assert can_be_static(tiny_model("qwen3"))
    assert can_be_static(gpt2())
    assert not can_be_static(gemma3())
    eager = tiny_model("llama")
    eager.set_attn_implementation("eager")
    assert not can_be_static(eager)


def test_the_model_attends_as_before_after_static_steps(tiny_model) -> None:
    model = tiny_model("llama")
    draw(model, [2], texts=2, tokens=4, never=[], static=True)
    assert model.config._attn_implementation == "sdpa"


def test_heads_that_share_a_key_attend_as_with_keys_repeated() -> None:
    torch.manual_seed(0)
    query = torch.randn(3, 6, 1, 8, dtype=torch.float64)
    key, value = torch.randn(2, 3, 2, 10, 8, dtype=torch.float64)
    mask = torch.arange(10).expand(3, 1, 1, 10) < 7
    found, _ = grouped_attention(nn.Identity(), query, key, value, mask, scaling=0.3)
    repeated = (x.repeat_interleave(3, dim=1)[:, :, :7] for x in (key, value))
    expected = nn.functional.scaled_dot_product_attention(query, *repeated, scale=0.3)
    torch.testing.assert_close(found, expected.transpose(1, 2))


def test_a_text_follows_from_how_it_begins(tiny_model) -> None:
    texts = []
    for begin in (2, 5):
        torch.manual_seed(7)
        texts.append(draw(tiny_model("llama"), [begin], 8, 6, never=[]))
    assert not torch.equal(*texts)


def test_a_text_takes_the_memory_that_its_cache_has(tiny_model) -> None:
    model = tiny_model("llama", vocab_size=100)
    # 2 layers, 2 heads of 8 numbers for keys and for values, of 4 bytes each.
    assert bytes_of_a_text(model, 10) == 2 * 2 * 2 * 8 * 4 * 10 + 100 * 24
    assert bytes_of_a_text(gpt2(), 10) == 2 * 2 * 4 * 8 * 4 * 10 + 48 * 24
    assert texts_at_a_time(model, 10) == ON_CPU


def test_keys_are_freed_with_the_steps_that_made_them(tiny_model) -> None:
    """The next texts need their memory before a garbage collector would find it."""
    gc.disable()
    try:
        with torch.no_grad(), StaticSteps(tiny_model("llama"), 8) as step:
            step(torch.tensor([[1], [2]]))
            keys = weakref.ref(step._cache.layers[0].keys)
            assert keys() is not None
        del step
        assert keys() is None
    finally:
        gc.enable()
