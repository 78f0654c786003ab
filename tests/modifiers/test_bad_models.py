# SPDX-License-Identifier: Apache-2.0
"""Models and specs that do not go together stop oneshot at its start, by name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from nm_permute_plugin.modifiers import LearnablePermutationModifier as Modifier
from nm_permute_plugin.specs.architectures import LLAMA

DOWN = "model.layers.{i}.mlp.down_proj.weight"
LINE = r"model\.layers\.\{i\}\.mlp\.down_proj\.weight"
FIRST = r"model\.layers\.0\.mlp\.down_proj\.weight"

SHAPES = [
    pytest.param(
        {"intermediate_size": 50},
        r"mlp\.down_proj and 1 more are linears of 50 input channels, which M=4",
        id="d_ff",
    ),
    pytest.param(
        {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 2},
        r"model\.layers\.0\.self_attn\.o_proj\.weight has 24 channels, no multiple of "
        r"the 16 of space value\.0",
        id="heads",
    ),
    pytest.param(
        {"head_dim": 6},
        r"model\.layers\.0\.self_attn\.o_proj\.weight has .* in segments of 6, which M=4",
        id="head_dim",
    ),
]


@pytest.mark.parametrize(("options", "message"), SHAPES)
def test_sizes_that_do_not_divide_are_refused(
    tiny_checkpoint, run_oneshot, tmp_path: Path, options: dict, message: str
) -> None:
    folder = tiny_checkpoint(**options)
    with pytest.raises(ValueError, match=message):
        run_oneshot(folder, [Modifier(method="search")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


SPECS = [
    pytest.param(
        {"model.layers.{i}.mlp.scale.weight": "residual"},
        r"line 'model\.layers\.\{i\}\.mlp\.scale\.weight' fits no parameter",
        id="missing weight",
    ),
    pytest.param(
        {DOWN: "residual hiden.{i}"},
        rf"parameter {FIRST}: 'hiden\.\{{i\}}' is no word of a permutation spec",
        id="misspelt space",
    ),
    pytest.param(
        {DOWN: "residual hidden.{i}.extra"},
        rf"space hidden\.0\.extra is named by {FIRST} alone.*misspelt",
        id="another space",
    ),
    pytest.param(
        {DOWN: "hidden.{i} hidden.{i}"},
        rf"parameter {FIRST}: the spec's line '{LINE}' claims a space twice",
        id="a space twice",
    ),
    pytest.param(
        {"model.layers.{i}.mlp.{down,up}_proj.weight": "residual hidden.{i}"},
        r"parameter model\.layers\.0\.mlp\.up_proj\.weight is claimed by '.*', '.*'",
        id="a parameter twice",
    ),
    pytest.param(
        {DOWN: "residual"},
        rf"parameter {FIRST} has 2 axes \(32, 48\), but .* names 1",
        id="an axis too few",
    ),
]


@pytest.mark.parametrize(("change", "message"), SPECS)
def test_a_wrong_spec_is_refused(
    tiny_checkpoint, run_oneshot, change: dict[str, str], message: str
) -> None:
    spec = {**LLAMA, **change}
    with pytest.raises(ValueError, match=message):
        run_oneshot(tiny_checkpoint(), [Modifier(method="search", spec=spec)])


def add_parameter(model: nn.Module) -> None:
    """A relative of a known class, with one parameter more."""
    model.model.layers[1].mlp.scale = nn.Parameter(torch.ones(48))


def quantize(model: nn.Module) -> None:
    """A weight of 8 bits."""
    module = model.model.layers[1].mlp.up_proj
    levels = module.weight.data.mul(40).round().to(torch.int8)
    module.weight = nn.Parameter(levels, requires_grad=False)


def drop_values(model: nn.Module) -> None:
    """A weight that was never loaded."""
    module = model.model.layers[1].mlp.up_proj
    module.weight = nn.Parameter(module.weight.data.to("meta"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_parameter, r"parameter model\.layers\.1\.mlp\.scale \(48,\).*no line"),
        (
            quantize,
            r"model\.layers\.1\.mlp\.up_proj\.weight is torch\.int8.*quantized already",
        ),
        (drop_values, r"model\.layers\.1\.mlp\.up_proj\.weight is on the meta device"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_model_that_is_not_what_its_class_says_is_refused(
    tiny_checkpoint, run_oneshot, change: Callable[[nn.Module], None], message: str
) -> None:
    folder = tiny_checkpoint()
    model = AutoModelForCausalLM.from_pretrained(folder)
    change(model)
    with pytest.raises(ValueError, match=message):
        run_oneshot(folder, [Modifier(method="search")], model=model)
