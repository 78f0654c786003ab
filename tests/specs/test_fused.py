# SPDX-License-Identifier: Apache-2.0
"""Fused axes and packed stacks: how they divide, and what is refused."""

import pytest
import torch
from torch import nn

from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.specs.fold import fold
from nm_permute_plugin.specs.spec import Consumer, ResolvedSpec, resolve


class Fused(nn.Module):
    """Two query heads and one key/value head of 4 channels, and a fused MLP."""

    def __init__(self, qkv: int = 16, up: int = 16) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, qkv)
        self.out = nn.Linear(8, 6)
        self.up = nn.Linear(6, up, bias=False)
        self.down = nn.Linear(8, 6, bias=False)


FUSED = {
    "qkv.weight": "_:heads+_+value _",
    "qkv.bias": "_:heads+_+value",
    "out.weight": "_ value:heads",
    "out.bias": "_",
    "up.weight": "hidden+hidden _",
    "down.weight": "_ hidden",
}


def resolve_fused(
    model: nn.Module | None = None,
    change: dict[str, str] | None = None,
    prunable: tuple[str, ...] = ("out", "down"),
) -> ResolvedSpec:
    spec = FUSED | (change or {})
    return resolve(model or Fused(), spec, NMPattern(2, 4), prunable, head_dim=4)


def test_a_fused_axis_divides_by_heads_and_then_evenly() -> None:
    resolved = resolve_fused()
    qkv = resolved.parameters[0]
    assert [part.length for part in qkv.matrices[0][0]] == [8, 4, 4]
    assert (resolved.spaces["value"].size, resolved.spaces["value"].segment) == (4, 4)
    assert resolved.spaces["value"].consumers == (Consumer("out", 2, 4),)
    assert resolved.spaces["hidden"].size == 8


def test_a_fused_fold_moves_its_own_rows_alone() -> None:
    model = Fused()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    value, hidden = torch.tensor([2, 0, 3, 1]), torch.arange(8).flip(0)
    fold(model, resolve_fused(model), {"value": value, "hidden": hidden})
    after = model.state_dict()
    assert torch.equal(after["qkv.weight"][:12], before["qkv.weight"][:12])
    assert torch.equal(after["qkv.bias"][12:], before["qkv.bias"][12:][value])
    assert torch.equal(after["qkv.weight"][12:], before["qkv.weight"][12:][value])
    assert torch.equal(after["up.weight"][8:], before["up.weight"][8:][hidden])
    assert torch.equal(after["up.weight"][:8], before["up.weight"][:8][hidden])


class TakingTurns(nn.Module):
    """Three key/value heads of 4 channels, each with its two query heads before it."""

    def __init__(self, qkv: int = 48) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, qkv)
        self.out = nn.Linear(24, 6, bias=False)


TURNS = {
    "qkv.weight": "_:heads|_|value _",
    "qkv.bias": "_:heads|_|value",
    "out.weight": "_ value:heads",
}


def test_parts_that_take_turns_move_their_own_rows_head_by_head() -> None:
    model = TakingTurns()
    resolved = resolve(model, TURNS, NMPattern(2, 4), ["out"], head_dim=4)
    assert [part.length for part in resolved.parameters[0].matrices[0][0]] == [
        24,
        12,
        12,
    ]
    assert resolved.spaces["value"].consumers == (Consumer("out", 2, 4),)
    before = model.qkv.weight.detach().view(3, 4, 4, 6).clone()
    bias = model.qkv.bias.detach().view(3, 4, 4).clone()
    orders = torch.tensor([[2, 0, 3, 1], [0, 1, 2, 3], [3, 2, 1, 0]])
    fold(model, resolved, {"value": (orders + 4 * torch.arange(3)[:, None]).flatten()})
    after, after_bias = model.qkv.weight.view(3, 4, 4, 6), model.qkv.bias.view(3, 4, 4)
    assert torch.equal(after[:, :3], before[:, :3])  # two queries and a key
    for head, order in enumerate(orders):
        assert torch.equal(after[head, 3], before[head, 3][order])
        assert torch.equal(after_bias[head, 3], bias[head, 3][order])


class Packed(nn.Module):
    """Three experts, packed as transformers 5 packs them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(3, 16, 6))
        self.down = nn.Parameter(torch.randn(3, 6, 8))


PACKED = {
    "gate_up": "{e} hidden.{e}+hidden.{e} _",
    "down": "{e} _ hidden.{e}",
}


def test_a_packed_stack_has_a_space_for_every_expert() -> None:
    model = Packed()
    resolved = resolve(model, PACKED, NMPattern(2, 4), [])
    assert {name: space.size for name, space in resolved.spaces.items()} == {
        "hidden.0": 8,
        "hidden.1": 8,
        "hidden.2": 8,
    }
    down = model.down.detach().clone()
    fold(model, resolved, {"hidden.1": torch.arange(8).flip(0)})
    assert torch.equal(model.down[0], down[0])
    assert torch.equal(model.down[1], down[1].flip(1))


class Twice(nn.Module):
    """A linear that reads a space twice, as DINOv2's classifier does."""

    def __init__(self) -> None:
        super().__init__()
        self.write = nn.Linear(6, 8, bias=False)
        self.read = nn.Linear(16, 4, bias=False)


def test_a_linear_that_reads_a_space_twice_has_a_view_of_both_runs() -> None:
    spec = {"write.weight": "hidden _", "read.weight": "_ hidden+hidden"}
    resolved = resolve(Twice(), spec, NMPattern(2, 4), ["read"])
    (consumer,) = resolved.spaces["hidden"].consumers
    view = consumer.view(torch.arange(16)[None])
    assert view.tolist() == [list(range(8)), list(range(8, 16))]
    assert consumer.unview(view).tolist() == [list(range(16))]


REFUSED = [
    pytest.param(
        Fused(qkv=17),
        {},
        r"qkv\.weight has a fused axis of 17 .* 9 .* 2 equal",
        id="odd",
    ),
    pytest.param(Fused(qkv=8), {}, r"qkv\.weight .*: 0 channels are left", id="short"),
    pytest.param(
        Fused(up=18), {}, "space hidden differ in size: .*up.weight has 9", id="halves"
    ),
    pytest.param(
        None,
        {"out.weight": "_ value"},
        r"qkv\.weight has a part ':heads' in a fused axis, but no other axis",
        id="heads that nothing follows",
    ),
    pytest.param(
        None,
        {"up.weight": "hidden|hidden _"},
        r"up\.weight has parts that take turns by head \('\|'\) in a fused axis, but no "
        "other axis",
        id="turns without heads",
    ),
    pytest.param(
        None,
        {"qkv.weight": "_:heads|_+value _"},
        r"qkv\.weight: '_:heads\|_\+value' is no word",
        id="turns and one after another",
    ),
    pytest.param(
        None, {"out.bias": "_:heads"}, r"out\.bias: '_:heads' is no word", id="alone"
    ),
    pytest.param(
        None, {"up.weight": "hidden+ _"}, r"up\.weight: 'hidden\+' is no word", id="end"
    ),
    pytest.param(
        None,
        {"up.weight": "hidden+hidden hidden"},
        r"line 'up\.weight' claims a space twice",
        id="twice",
    ),
    pytest.param(
        Fused(up=8),
        {"down.weight": "_ hidden+_"},
        r"down\.weight reads channels of several spaces",
        id="consumer of several spaces",
    ),
]


@pytest.mark.parametrize(("model", "change", "message"), REFUSED)
def test_what_does_not_divide_is_refused(
    model: nn.Module | None, change: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_fused(model, change)
