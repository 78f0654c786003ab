# SPDX-License-Identifier: Apache-2.0
"""Input norms equal a plain float64 sum, count real tokens only, and refuse bad runs."""

import pytest
import torch
from torch import Tensor, nn
from zoo_models import zoo_linears, zoo_model

from nm_permute_plugin.pruning import statistics
from nm_permute_plugin.pruning.data import token_mask
from nm_permute_plugin.pruning.statistics import input_norms

NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.o_proj",
    "model.layers.1.mlp.down_proj",
]


def plain_norms(
    model: nn.Module, batches: list[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The norms from all inputs kept whole, row by row, without any padding."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: inputs[name].append(args[0].double()[0])
        )
        for name in NAMES
    ]
    with torch.no_grad():
        for batch in batches:
            for row, mask in zip(batch["input_ids"], token_mask(batch), strict=True):
                model(row[mask][None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows).norm(dim=0) for name, rows in inputs.items()}


def assert_norms_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, norm in expected.items():
        torch.testing.assert_close(found[name].double(), norm, rtol=1e-5, atol=1e-6)


def hooks_of(model: nn.Module) -> int:
    return sum(
        len(module._forward_pre_hooks) + len(module._forward_hooks)
        for module in model.modules()
    )


def test_norms_equal_the_plain_sum(tiny_model, tokens: Tensor) -> None:
    model = tiny_model("llama")
    batches = [{"input_ids": tokens[:2]}, {"input_ids": tokens[2:]}]
    found = input_norms(model, NAMES, batches)
    assert_norms_equal(found, plain_norms(model, batches))
    assert {norm.dtype for norm in found.values()} == {torch.float32}


def test_padded_tokens_do_not_count(tiny_model, tokens: Tensor) -> None:
    model = tiny_model("llama")
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    batches = [{"input_ids": tokens, "attention_mask": mask}]
    found = input_norms(model, NAMES, batches)
    assert_norms_equal(found, plain_norms(model, batches))
    other = tokens.clone()
    other[1, 5:] = 7
    refilled = input_norms(model, NAMES, [{"input_ids": other, "attention_mask": mask}])
    assert_norms_equal(refilled, {name: norm.double() for name, norm in found.items()})


def test_norms_do_not_depend_on_the_batches(tiny_model, tokens: Tensor) -> None:
    model = tiny_model("llama")
    whole = input_norms(model, NAMES, [{"input_ids": tokens}])
    parts = input_norms(model, NAMES, [{"input_ids": row[None]} for row in tokens])
    assert_norms_equal(parts, {name: norm.double() for name, norm in whole.items()})


def test_norms_come_from_the_first_tokens_of_very_many(
    tiny_model, monkeypatch, tokens: Tensor
) -> None:
    model, one = tiny_model("llama"), {"input_ids": tokens}
    other = {"input_ids": tokens.flip(1)}
    monkeypatch.setattr(statistics, "ENOUGH_TOKENS", tokens.numel() + 1)
    names = NAMES
    enough = input_norms(model, names, [one, other, other, other])
    both = input_norms(model, names, [one, other])
    assert all(torch.equal(enough[name], both[name]) for name in names)


def test_squares_of_short_formats_are_summed_in_float32(
    tiny_model, tokens: Tensor
) -> None:
    # In bfloat16 the sum would stand still after a few hundred tokens.
    model = tiny_model("llama", dtype=torch.bfloat16)
    batch = {"input_ids": tokens}
    once = input_norms(model, NAMES, [batch])
    often = input_norms(model, NAMES, [batch] * 100)
    assert {norm.dtype for norm in once.values()} == {torch.float32}
    assert_norms_equal(often, {name: norm.double() * 10 for name, norm in once.items()})


def test_no_hook_and_no_change_is_left_behind(tiny_model, tokens: Tensor) -> None:
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    input_norms(model, NAMES, [{"input_ids": tokens}])
    assert hooks_of(model) == 0
    state = model.state_dict()
    assert [n for n, t in before.items() if not torch.equal(state[n], t)] == []


def test_no_hook_is_left_behind_after_an_error(tiny_model) -> None:
    model = tiny_model("llama")
    with pytest.raises(IndexError):
        input_norms(model, NAMES, [{"input_ids": torch.full((1, 4), 999)}])
    assert hooks_of(model) == 0


@pytest.mark.parametrize(
    "bad", [float("nan"), float("inf")], ids=["nan", "overflow to inf"]
)
def test_activations_that_are_not_finite_are_refused_by_the_first_linear(
    tiny_model, tokens: Tensor, bad: float
) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 3] = bad
    message = r"activations that enter model\.layers\.1\.self_attn\.o_proj"
    with pytest.raises(ValueError, match=message):
        input_norms(model, NAMES, [{"input_ids": tokens}])
    assert hooks_of(model) == 0


def test_activations_whose_squares_overflow_are_not_called_infinite(
    tiny_model, tokens: Tensor
) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight[5] = 1e20
    message = (
        r"that enter model\.layers\.0\.mlp\.up_proj reach \d\.\de\+(19|20) \(channel 5\), "
        "and their squares are beyond float32"
    )
    with pytest.raises(ValueError, match=message):
        input_norms(model, ["model.layers.0.mlp.up_proj"], [{"input_ids": tokens}])
    assert hooks_of(model) == 0


def test_no_batches_are_refused(tiny_model) -> None:
    with pytest.raises(ValueError, match="holds no tokens"):
        input_norms(tiny_model("llama"), NAMES, [])


def test_batches_of_padding_are_refused(tiny_model, tokens: Tensor) -> None:
    batch = {"input_ids": tokens, "attention_mask": torch.zeros_like(tokens)}
    with pytest.raises(ValueError, match="holds no tokens"):
        input_norms(tiny_model("llama"), NAMES, [batch])


def test_a_linear_that_never_runs_is_refused(tiny_model, tokens: Tensor) -> None:
    model = tiny_model("llama")
    model.unused = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="unused never ran.*`ignore`"):
        input_norms(model, [*NAMES, "unused"], [{"input_ids": tokens}])


def test_refusals_hold_for_names_that_come_only_once(
    tiny_model, tokens: Tensor
) -> None:
    model = tiny_model("llama")
    model.unused = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="unused never ran"):
        input_norms(model, iter([*NAMES, "unused"]), [{"input_ids": tokens}])


class Experts(nn.Module):
    """Experts as modules of their own, each of which sees the tokens routed to it."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.each = nn.ModuleList(nn.Linear(width, width) for _ in range(count))

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for number, expert in enumerate(self.each):
            token, place = torch.where(chosen == number)
            if len(token):
                out[token] += weights[token, place, None] * expert(hidden[token])
        return out


def test_padding_does_not_count_where_tokens_are_flattened(
    generator: torch.Generator,
) -> None:
    """Experts, and the one that all tokens share, see tokens without their rows."""
    model = zoo_model("qwen2moe-gqa")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for layer in model.model.layers:
            layer.mlp.experts = Experts(4, 32)
    names = zoo_linears(model)
    assert len([name for name in names if ".experts." in name]) == 8
    tokens = torch.randint(1, 48, (6, 40), generator=generator)  # 0 is its padding
    mask = torch.ones_like(tokens)
    mask[0, 7:] = 0
    mask[2, 30:] = 0
    padded = {"input_ids": tokens, "attention_mask": mask}
    rows = [row[kept] for row, kept in zip(tokens, mask.bool(), strict=True)]
    plain = input_norms(model, names, [{"input_ids": row[None]} for row in rows])
    found = input_norms(model, names, [padded])
    assert_norms_equal(found, {name: norm.double() for name, norm in plain.items()})
