# SPDX-License-Identifier: Apache-2.0
"""Folding is exact: the same logits, bitwise undone, and refused before it writes."""

import pytest
import torch
from torch import Tensor, nn

from nm_permute_plugin.maths.permutation import expand_heads
from nm_permute_plugin.specs.fold import fold, invert_all


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def relative_change(after: Tensor, before: Tensor) -> float:
    return float((after - before).abs().max() / before.abs().max())


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    changed = [
        n for n, t in model.state_dict().items() if not torch.equal(t, weights[n])
    ]
    assert changed == []


@pytest.mark.parametrize("seed", [0, 1])
def test_a_fold_leaves_the_logits(
    tiny_model, resolve_model, legal_perms, tokens, architecture, options, seed
) -> None:
    model = tiny_model(architecture, dtype=torch.float64, **options)
    resolved = resolve_model(model)
    before, weights = logits_of(model, tokens), copy_of(model)
    fold(model, resolved, legal_perms(resolved, seed))
    # RMSNorm's float32 inside is the floor: 4e-7 over ten seeds.
    assert relative_change(logits_of(model, tokens), before) < 1e-6
    still = {n for n, t in model.state_dict().items() if torch.equal(t, weights[n])}
    fixed = ("q_proj.bias", "k_proj.bias", "q_norm.weight", "k_norm.weight")
    assert all(name.endswith(fixed) for name in still)


def test_the_inverse_fold_is_bitwise(
    tiny_model, resolve_model, legal_perms, architecture, options
) -> None:
    model = tiny_model(architecture, **options)
    resolved, weights = resolve_model(model), copy_of(model)
    perms = legal_perms(resolved)
    fold(model, resolved, perms)
    fold(model, resolved, invert_all(perms))
    assert_same_weights(model, weights)


@pytest.mark.parametrize("family", ["residual", "hidden", "value"])
def test_each_space_folds_alone(
    tiny_model, resolve_model, legal_perms, tokens, family: str
) -> None:
    model = tiny_model("qwen3", dtype=torch.float64, attention_bias=True)
    resolved = resolve_model(model)
    before, weights = logits_of(model, tokens), copy_of(model)
    perms = {n: p for n, p in legal_perms(resolved).items() if n.startswith(family)}
    fold(model, resolved, perms)
    assert relative_change(logits_of(model, tokens), before) < 1e-6
    named = {
        name
        for parameter in resolved.parameters
        for name in parameter.names
        if parameter.spaces & perms.keys()
    }
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, weights[n])}
    assert moved == named


@pytest.mark.parametrize(
    ("dtype", "bound"),
    # Measured over ten seeds: fp32 1.1e-6; bf16 0, so few products add up exactly.
    [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)],
    ids=["fp32", "bf16"],
)
def test_rounding_is_all_that_a_fold_changes_in_short_formats(
    tiny_model, resolve_model, legal_perms, tokens, dtype: torch.dtype, bound: float
) -> None:
    model = tiny_model("llama", dtype=dtype)
    resolved = resolve_model(model)
    before = logits_of(model, tokens).double()
    fold(model, resolved, legal_perms(resolved))
    assert relative_change(logits_of(model, tokens).double(), before) < bound


def test_no_permutations_change_nothing(tiny_model, resolve_model) -> None:
    model = tiny_model("llama")
    weights = copy_of(model)
    fold(model, resolve_model(model), {})
    assert_same_weights(model, weights)


def test_two_folds_compose(tiny_model, resolve_model, legal_perms) -> None:
    twice, once = tiny_model("llama"), tiny_model("llama")
    resolved = resolve_model(twice)
    first, second = legal_perms(resolved, 1), legal_perms(resolved, 2)
    fold(twice, resolved, first)
    fold(twice, resolved, second)
    fold(once, resolve_model(once), {n: first[n][second[n]] for n in first})
    assert_same_weights(twice, copy_of(once))


def test_new_channels_are_the_old_ones_by_the_index_vector(
    tiny_model, resolve_model, legal_perms
) -> None:
    model = tiny_model("llama")
    resolved, weights = resolve_model(model), copy_of(model)
    perms = legal_perms(resolved)
    fold(model, resolved, perms)
    residual, hidden, value = (perms[n] for n in ("residual", "hidden.0", "value.0"))
    layer = "model.layers.0."
    expected = {
        "model.embed_tokens.weight": weights["model.embed_tokens.weight"][:, residual],
        layer + "mlp.down_proj.weight": weights[layer + "mlp.down_proj.weight"][
            residual
        ][:, hidden],
        layer + "mlp.up_proj.weight": weights[layer + "mlp.up_proj.weight"][hidden][
            :, residual
        ],
        layer + "self_attn.o_proj.weight": weights[layer + "self_attn.o_proj.weight"][
            residual
        ][:, expand_heads(value, 8, 2)],
        layer + "self_attn.q_proj.weight": weights[layer + "self_attn.q_proj.weight"][
            :, residual
        ],
    }
    state = model.state_dict()
    assert [n for n, t in expected.items() if not torch.equal(state[n], t)] == []


def test_tied_embeddings_are_moved_once_and_stay_tied(
    tiny_model, resolve_model, legal_perms
) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    table = model.lm_head.weight.detach().clone()
    resolved = resolve_model(model)
    written = []

    def write(owner: nn.Module, name: str, tensor: Tensor) -> None:
        written.append(owner)
        with torch.no_grad():
            getattr(owner, name).copy_(tensor)

    perms = legal_perms(resolved)
    fold(model, resolved, perms, write)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, table[:, perms["residual"]])
    assert sum(w in (model.lm_head, model.model.embed_tokens) for w in written) == 1


def test_parameters_that_share_storage_only_are_moved_once(
    tiny_model, resolve_model, legal_perms, tokens
) -> None:
    model = tiny_model("llama", dtype=torch.float64)
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.data)
    resolved, before = resolve_model(model), logits_of(model, tokens)
    fold(model, resolved, legal_perms(resolved))
    assert relative_change(logits_of(model, tokens), before) < 1e-6


def test_half_a_fold_shows_in_the_logits(
    tiny_model, resolve_model, legal_perms, tokens
) -> None:
    """The yardstick of the tests above sees one parameter that was left behind."""
    reference = tiny_model("qwen3", dtype=torch.float64, attention_bias=True)
    resolved, weights = resolve_model(reference), copy_of(reference)
    before = logits_of(reference, tokens)
    fold(reference, resolved, legal_perms(resolved))
    folded = copy_of(reference)
    for name in weights:
        if torch.equal(folded[name], weights[name]):
            continue
        reference.load_state_dict(folded | {name: weights[name]})
        assert relative_change(logits_of(reference, tokens), before) > 1e-4, name


def test_folding_keeps_parameters_trainable(
    tiny_model, resolve_model, legal_perms
) -> None:
    model = tiny_model("llama")
    before = dict(model.named_parameters())
    resolved = resolve_model(model)
    fold(model, resolved, legal_perms(resolved))
    for name, parameter in model.named_parameters():
        assert parameter is before[name]
        assert parameter.requires_grad


def swapped(size: int, first: int, second: int) -> Tensor:
    perm = torch.arange(size)
    perm[[first, second]] = perm[[second, first]]
    return perm


REFUSED = [
    pytest.param(
        "hidden.9",
        torch.arange(48),
        "no space 'hidden.9'; it has .*hidden.0",
        id="unknown",
    ),
    pytest.param(
        "hidden.0", torch.arange(44), "hidden.0 has 48 channels, .* 44", id="too short"
    ),
    pytest.param(
        "hidden.0",
        torch.zeros(48, dtype=torch.int64),
        "space hidden.0 is no permutation of 48 channels: channel 1 is missing",
        id="no permutation",
    ),
    pytest.param(
        "value.1",
        swapped(16, 0, 8),
        "space value.1 .* segment of 8",
        id="leaves its head",
    ),
]


@pytest.mark.parametrize(("space", "perm", "message"), REFUSED)
def test_a_bad_permutation_is_refused_before_anything_is_written(
    tiny_model, resolve_model, legal_perms, space: str, perm: Tensor, message: str
) -> None:
    model = tiny_model("llama")
    resolved, weights = resolve_model(model), copy_of(model)
    with pytest.raises(ValueError, match=message):
        fold(model, resolved, {**legal_perms(resolved), space: perm})
    assert_same_weights(model, weights)
