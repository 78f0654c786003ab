# SPDX-License-Identifier: Apache-2.0
"""Sparse experts: transformers packs them while loading, as it packs dense ones."""

import json
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_files import assert_same_bits, assert_same_tensors, tensors_of
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
)

from nm_permute_plugin.checkpoint.config import read_sparsity_config
from nm_permute_plugin.checkpoint.directory import SINGLE, read_json
from nm_permute_plugin.checkpoint.transformers_conversions import (
    with_sparse,
    without_sparse,
)
from nm_permute_plugin.checkpoint.transformers_reader import register_reader
from nm_permute_plugin.checkpoint.verify import verify
from nm_permute_plugin.checkpoint.writer import convert
from nm_permute_plugin.maths.masks import nm_mask
from nm_permute_plugin.maths.pattern import NMPattern

sys.path.insert(0, str(Path(__file__).parents[1] / "specs"))  # for the zoo
from zoo import ZOO, logits_of, tiny  # noqa: E402

CASES = {case.id: case.values for case in ZOO}
FAMILIES = ["qwen2moe-one-dense-layer", "qwen3moe-gqa", "mixtral-gqa"]
PARTS = ("bitmask", "compressed", "shape")
TOKENS = torch.arange(32)[None]
UP = "model.layers.0.mlp.experts.2.up_proj"


@pytest.fixture
def dense(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A checkpoint with all experts, and all of attention, 2:4; Qwen3-MoE by default."""
    name, config, options = CASES[getattr(request, "param", "qwen3moe-gqa")]
    model = tiny(name, config, options, torch.float32)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("_proj", "shared_expert.", "experts.")):
            flat = parameter.data.flatten(0, -2)
            flat.masked_fill_(~nm_mask(flat.abs(), NMPattern(2, 4)), 0)
    model.bfloat16().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def logits(path: Path) -> Tensor:
    register_reader()
    return logits_of(AutoModelForCausalLM.from_pretrained(path), TOKENS)


@pytest.mark.parametrize("form", ["sparse-24-bitmask", "sparse-bitmask"])
@pytest.mark.parametrize("dense", FAMILIES, indirect=True)
def test_logits_are_those_of_the_dense_checkpoint(
    tmp_path: Path, dense: Path, form: str
) -> None:
    sparse = tmp_path / "sparse"
    done = convert(dense, sparse, form)
    experts = [name for name in done.compressed if ".experts." in name]
    assert len(experts) == len([x for x in tensors_of(dense) if ".experts." in x]) > 0
    assert any("self_attn" in name for name in done.compressed)
    assert verify(sparse).good
    assert_same_bits(logits(sparse), logits(dense))
    convert(sparse, tmp_path / "back", "dense")
    assert_same_tensors(tensors_of(tmp_path / "back"), tensors_of(dense))


def test_the_config_names_what_is_sparse(tmp_path: Path, dense: Path) -> None:
    done = convert(dense, tmp_path / "sparse", "sparse-24-bitmask")
    block = read_sparsity_config(read_json(tmp_path / "sparse" / "config.json"))
    assert block.targets == done.compressed
    assert UP in block.targets
    assert not block.promises("model.layers.0.mlp.gate")


@pytest.mark.parametrize("dense", ["qwen3moe-gqa", "mixtral-gqa"], indirect=True)
def test_what_was_read_is_saved_as_what_was_dense(tmp_path: Path, dense: Path) -> None:
    convert(dense, tmp_path / "sparse", "sparse-24-bitmask")
    register_reader()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    model.save_pretrained(tmp_path / "again")
    assert_same_tensors(tensors_of(tmp_path / "again"), tensors_of(dense))


def test_one_dense_expert_leaves_its_layer_dense(tmp_path: Path, dense: Path) -> None:
    tensors = load_file(dense / SINGLE)
    tensors[f"{UP}.weight"][0, :4] = 1.0
    save_file(tensors, dense / SINGLE, {"format": "pt"})
    done = convert(dense, tmp_path / "sparse", "sparse-24-bitmask")
    assert "row 0" in done.dense[UP]
    assert "not all experts" in done.dense["model.layers.0.mlp.experts.3.down_proj"]
    experts = [name for name in done.compressed if ".experts." in name]
    assert len(experts) == 12
    assert all(name.startswith("model.layers.1.") for name in experts)
    assert_same_bits(logits(tmp_path / "sparse"), logits(dense))


def drop(tensors: dict[str, Tensor], *modules: str) -> None:
    for module in modules:
        for part in PARTS:
            del tensors[f"{module}.{part}"]


def drop_one(tensors: dict[str, Tensor]) -> None:
    """An expert's weight is lost."""
    drop(tensors, UP)


def drop_all(tensors: dict[str, Tensor]) -> None:
    """A layer's experts are lost."""
    drop(tensors, *{name.rpartition(".")[0] for name in tensors if "0.mlp.exp" in name})


def make_dense(tensors: dict[str, Tensor]) -> None:
    """One of the experts is stored dense."""
    drop(tensors, UP)
    tensors[f"{UP}.weight"] = torch.zeros(16, 32, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_one, f"no weight for {UP}"),
        (drop_all, r"no weight for model\.layers\.0\.mlp\.experts\.\d"),
        (
            make_dense,
            r"0\.mlp\.experts\.gate_up_proj is made of weights that are stored",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damage_is_an_error_and_no_random_weight(
    tmp_path: Path, dense: Path, damage, message: str
) -> None:
    sparse = tmp_path / "sparse"
    convert(dense, sparse, "sparse-24-bitmask")
    tensors = load_file(sparse / SINGLE)
    damage(tensors)
    save_file(tensors, sparse / SINGLE, {"format": "pt"})
    with pytest.raises((ValueError, NotImplementedError), match=message):
        logits(sparse)


def test_fewer_experts_than_the_config_says_are_an_error(
    tmp_path: Path, dense: Path
) -> None:
    sparse = tmp_path / "sparse"
    convert(dense, sparse, "sparse-24-bitmask")
    config = read_json(sparse / "config.json")
    (key,) = {"num_experts", "num_local_experts"} & set(config)
    (sparse / "config.json").write_text(json.dumps({**config, key: 5}))
    with pytest.raises(RuntimeError, match="automatic conversion"):
        logits(sparse)


@pytest.mark.parametrize("dot", [r"\.", "."], ids=["escaped", "plain"])
def test_patterns_are_read_with_and_without_escaped_dots(dot: str) -> None:
    stock = WeightConverter(
        source_patterns=[f"mlp.experts.*.{name}{dot}weight" for name in ("w1", "w3")],
        target_patterns="mlp.experts.gate_up_proj",
        operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
    )
    merging, plain = with_sparse([stock])
    name = "model.layers.3.mlp.experts.7.w3"
    target = "model.layers.3.mlp.experts.gate_up_proj"
    for part in PARTS:
        assert merging.rename_source_key(f"{name}.{part}")[0] == target
        assert plain.rename_source_key(f"lm_head.{part}")[0] == "lm_head.weight"
    assert merging.rename_source_key(f"{name}.weight")[0] == target
    assert without_sparse([merging, plain]) == [stock]
