# SPDX-License-Identifier: Apache-2.0
"""Specs that do not fit are refused by the parameter's name; views of consumers."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from nm_permute_plugin.maths.masks import nm_mask
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.specs.architectures import LLAMA, head_dim_of, spec_of
from nm_permute_plugin.specs.grammar import Part
from nm_permute_plugin.specs.spec import Consumer, ResolvedSpec, resolve

TWO_OF_FOUR = NMPattern(2, 4)


class Mlp(nn.Module):
    """Two linears with a space between them: the smallest model that has an order."""

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.up = nn.Linear(4, hidden)
        self.down = nn.Linear(hidden, 4)


MLP = {
    "up.weight": "hidden _",
    "up.bias": "hidden",
    "down.weight": "_ hidden",
    "down.bias": "_",
}


def resolve_mlp(
    spec: dict[str, str], model: nn.Module | None = None, **options
) -> ResolvedSpec:
    options = {"pattern": TWO_OF_FOUR, "prunable": ["down"], "head_dim": None} | options
    return resolve(model or Mlp(), spec, **options)


def test_a_spec_that_fits_gives_the_axes_it_names() -> None:
    resolved = resolve_mlp(MLP)
    axes = {p.names[0]: p.matrices for p in resolved.parameters}
    inner, outer = (Part("hidden", length=8),), (Part(None, length=4),)
    assert axes == {
        "up.weight": ((inner, outer),),
        "up.bias": ((inner,),),
        "down.weight": ((outer, inner),),
        "down.bias": ((outer,),),
    }
    assert resolved.spaces["hidden"].consumers == (Consumer("down"),)


def test_a_pruned_linear_that_no_space_orders_is_listed() -> None:
    resolved = resolve_mlp(MLP, prunable=["up", "down"])
    assert resolved.unordered == {"up": ""}


BROKEN = [
    pytest.param(
        {"up.bias": None},
        r"parameter up\.bias \(8,\) is claimed by no line",
        id="claimed by no line",
    ),
    pytest.param(
        {"{up,down}.bias": "_"},
        r"parameter up\.bias is claimed by 'up\.bias', '\{up,down\}\.bias'",
        id="claimed by two lines",
    ),
    pytest.param(
        {"gate.weight": "hidden _"},
        r"line 'gate\.weight' fits no parameter",
        id="a line that fits nothing",
    ),
    pytest.param(
        {"down.weight": "hidden"},
        r"parameter down\.weight has 2 axes \(4, 8\).* names 1: 'hidden'",
        id="too few words",
    ),
    pytest.param(
        {"down.bias": "_ hidden"},
        r"parameter down\.bias has 1 axes \(4,\).* names 2: '_ hidden'",
        id="too many words",
    ),
    pytest.param(
        {"down.weight": "_ hidden:head"},
        r"parameter down\.weight: 'hidden:head' is no word",
        id="misspelt suffix",
    ),
    pytest.param(
        {"down.weight": "_ Hidden!"},
        r"parameter down\.weight: 'Hidden!' is no word",
        id="misspelt word",
    ),
    pytest.param(
        {"down.weight": "_ hidden.{i}"},
        r"parameter down\.weight: 'hidden\.\{i\}' is no word",
        id="a number the line does not have",
    ),
    pytest.param(
        {"down.weight": "hidden hidden"},
        r"line 'down\.weight' claims a space twice",
        id="space claimed twice",
    ),
    pytest.param(
        {"down.weight": "hidden _"},
        r"space hidden differ in size.*up\.weight has 8.*down\.weight has 4",
        id="axes of different sizes",
    ),
    pytest.param(
        {"down.weight": "_ value:heads"},
        r"space value is read by down\.weight with ':heads' but written nowhere",
        id="heads that nothing writes",
    ),
    pytest.param(
        {"down.weight": "_ hidden:heads"},
        r"space hidden has 8 channels, which heads of None",
        id="heads without a head_dim",
    ),
]


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_a_spec_that_does_not_fit_is_refused(
    change: dict[str, str | None], message: str
) -> None:
    spec = {line: words for line, words in (MLP | change).items() if words is not None}
    with pytest.raises(ValueError, match=message):
        resolve_mlp(spec)


def test_heads_that_do_not_share_the_channels_evenly_are_refused() -> None:
    model = Mlp()
    model.down = nn.Linear(12, 4)
    with pytest.raises(ValueError, match=r"down\.weight has 12 channels.* 8 of space"):
        resolve_mlp(MLP | {"down.weight": "_ hidden:heads"}, model, head_dim=4)


def test_heads_that_do_not_divide_their_space_are_refused() -> None:
    with pytest.raises(ValueError, match="space hidden has 8 channels.*heads of 3"):
        resolve_mlp(MLP | {"down.weight": "_ hidden:heads"}, head_dim=3)


@pytest.mark.parametrize(
    "line", ["{i}.{i}.weight", "{i-j}.weight", "{}.weight"], ids=str
)
def test_a_line_with_broken_braces_is_refused_by_its_text(line: str) -> None:
    with pytest.raises(ValueError, match="line"):
        resolve_mlp(MLP | {line: "_ _"})


def test_an_optional_line_may_fit_nothing() -> None:
    resolved = resolve_mlp(MLP | {"gate.bias?": "hidden"})
    assert list(resolved.spaces) == ["hidden"]


def test_an_extra_parameter_is_refused_by_its_name(tiny_model, resolve_model) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.scale = nn.Parameter(torch.ones(48))
    with pytest.raises(
        ValueError, match=r"model\.layers\.1\.mlp\.scale \(48,\).*no line"
    ):
        resolve_model(model)


def test_a_dot_in_a_line_is_no_wildcard() -> None:
    model = Mlp()
    model.upXbias = nn.Parameter(torch.zeros(8))
    with pytest.raises(ValueError, match="upXbias .* no line"):
        resolve_mlp(MLP, model)


def test_a_width_that_m_does_not_divide_is_refused(tiny_model, resolve_model) -> None:
    model = tiny_model("llama", intermediate_size=30)
    message = (
        r"layers\.0\.mlp\.down_proj\.weight.* segments of 30, which M=4.*2:4.*`ignore`"
    )
    with pytest.raises(ValueError, match=message):
        resolve_model(model)


def test_a_width_that_m_does_not_divide_is_accepted_where_nothing_is_pruned(
    tiny_model, resolve_model
) -> None:
    model = tiny_model("llama", intermediate_size=30)
    prunable = [f"model.layers.{i}.self_attn.o_proj" for i in range(2)]
    spaces = resolve_model(model, prunable=prunable).spaces
    assert spaces["hidden.0"].size == 30
    assert spaces["hidden.0"].consumers == ()


def test_a_head_that_m_does_not_divide_is_refused(tiny_model, resolve_model) -> None:
    model = tiny_model("llama", head_dim=6, num_key_value_heads=4)
    with pytest.raises(ValueError, match=r"self_attn\.o_proj\.weight.* segments of 6,"):
        resolve_model(model)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int32], ids=["int8", "uint8", "int32"]
)
def test_a_quantized_parameter_is_refused(
    tiny_model, resolve_model, dtype: torch.dtype
) -> None:
    model = tiny_model("llama")
    linear = model.model.layers[0].mlp.down_proj
    linear.weight = nn.Parameter(linear.weight.to(dtype), requires_grad=False)
    name = r"model\.layers\.0\.mlp\.down_proj\.weight is torch\."
    with pytest.raises(ValueError, match=name + ".*quantized already"):
        resolve_model(model)


def test_tied_parameters_that_move_differently_are_refused(tiny_model) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    spec = {**LLAMA, "lm_head.weight": "_ _"}
    message = r"tied .*model\.embed_tokens\.weight, lm_head\.weight move differently"
    with pytest.raises(ValueError, match=message):
        resolve(model, spec, TWO_OF_FOUR, [], head_dim=8)


def test_a_tied_parameter_that_one_line_misses_is_refused(tiny_model) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    spec = {line: words for line, words in LLAMA.items() if line != "lm_head.weight"}
    with pytest.raises(ValueError, match=r"lm_head\.weight .*no line"):
        resolve(model, spec, TWO_OF_FOUR, [], head_dim=8)


def test_empty_parameters_are_not_tied() -> None:
    """They have no storage, so that none is shared."""
    model = Mlp()
    model.none = nn.Parameter(torch.empty(0, 8))
    model.nothing = nn.Parameter(torch.empty(0))
    spec = MLP | {"none": "_ hidden", "nothing": "_"}
    resolved = resolve_mlp(spec, model)
    assert {p.names for p in resolved.parameters} >= {("none",), ("nothing",)}


def test_an_empty_parameter_with_two_names_is_tied() -> None:
    model = Mlp()
    model.none = model.nothing = nn.Parameter(torch.empty(0, 8))
    resolved = resolve_mlp(MLP | {"none": "_ hidden", "nothing": "_ hidden"}, model)
    assert ("none", "nothing") in {p.names for p in resolved.parameters}


@pytest.fixture
def shared_heads(tiny_model) -> Callable[[int], Consumer]:
    """The consumer of a value space whose heads so many query heads share."""

    def consumer(queries: int) -> Consumer:
        model = tiny_model("llama", num_key_value_heads=4 // queries)
        name = "model.layers.0.self_attn.o_proj"
        resolved = resolve(
            model, spec_of(model), TWO_OF_FOUR, [name], head_dim_of(model.config)
        )
        return resolved.spaces["value.0"].consumers[0]

    return consumer


@pytest.mark.parametrize("queries", [1, 2, 4], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=["fp32", "bool"])
def test_view_and_unview_are_inverse(
    shared_heads, queries: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    consumer = shared_heads(queries)
    matrix = torch.randn(32, 32, generator=generator).to(dtype)
    view = consumer.view(matrix)
    assert view.shape == (32 * queries, 32 // queries)
    assert torch.equal(consumer.unview(view), matrix)
    assert torch.equal(consumer.view(consumer.unview(view)), view)


@pytest.mark.parametrize("queries", [1, 2, 4], ids=["mha", "gqa", "mqa"])
def test_a_mask_made_in_the_view_is_the_mask_of_the_weight(
    shared_heads, queries: int, generator: torch.Generator
) -> None:
    consumer = shared_heads(queries)
    score = torch.rand(32, 32, generator=generator)
    in_the_view = consumer.unview(nm_mask(consumer.view(score), TWO_OF_FOUR))
    assert torch.equal(in_the_view, nm_mask(score, TWO_OF_FOUR))


def test_the_view_of_shared_heads_keeps_channels_apart() -> None:
    consumer = Consumer("o", queries=2, head_dim=2)
    # Channel numbers of one row: 2 key/value heads x 2 query heads x 2 channels.
    view = consumer.view(torch.arange(8)[None])
    assert view.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
