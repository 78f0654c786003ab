# SPDX-License-Identifier: Apache-2.0
"""What vLLM loads from a sparse checkpoint is, bit by bit, what it loads from the dense."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from nm_permute_plugin.checkpoint.writer import convert
from nm_permute_plugin.maths.masks import nm_mask
from nm_permute_plugin.maths.pattern import NMPattern

pytestmark = pytest.mark.slow

SIZES = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
QWEN2 = (Qwen2Config, Qwen2ForCausalLM)
# vLLM's class does not say which layers it fuses, and names its head otherwise.
STABLELM = (StableLmConfig, StableLmForCausalLM)
MIXED = ("lm_head", "self_attn.k_proj", "layers.1.mlp.up_proj")
MODELS = {
    "biases": (QWEN2, ("lm_head",)),
    "mixed": (QWEN2, MIXED),
    "head": (QWEN2, ()),
    "fused unsaid": (STABLELM, ("lm_head",)),
    "fused unsaid, mixed": (STABLELM, MIXED),
}
"""Models, and which of their layers stay dense."""

DAMAGED = "model.layers.1.mlp.gate_proj"
EXPERT = "model.layers.1.mlp.experts.2.up_proj"


@dataclass(frozen=True)
class Loaded:
    """A model's parameters and its layers' methods, or why it was not loaded."""

    parameters: Mapping[str, Tensor]
    methods: Mapping[str, str]
    error: str | None


@pytest.fixture(scope="module")
def loaded(pruned, run_engine, tmp_path_factory) -> Mapping[str, Loaded]:
    """Every model, loaded one after the other in one process."""
    folder = tmp_path_factory.mktemp("load")
    static = {
        form: pruned("fp8-static", form) for form in ("dense", "sparse-24-bitmask")
    }
    paths = {f"static {form}": path for form, path in static.items()}
    for name, (classes, kept) in MODELS.items():
        dense = folder / name
        two_of_four(*classes, kept).save_pretrained(dense)
        paths[f"{name} dense"] = dense
        paths[f"{name} sparse-24-bitmask"] = folder / f"{name}-sparse"
        convert(dense, paths[f"{name} sparse-24-bitmask"], "sparse-24-bitmask")
    whole = paths["biases sparse-24-bitmask"]
    paths["missing"] = edited(whole, folder / "missing", lambda tensor: None)
    paths["damaged"] = edited(whole, folder / "damaged", lambda bits: bits | 7)
    for form in ("dense", "sparse-24-bitmask"):
        paths[f"experts {form}"] = pruned("qwen2-moe", form)
    whole = paths["experts sparse-24-bitmask"]
    paths["lost expert"] = edited(whole, folder / "lost", lambda bits: None, EXPERT)
    outs = {name: folder / f"{i}.safetensors" for i, name in enumerate(paths)}
    words = [word for name in paths for word in (paths[name], outs[name])]
    done = run_engine("load.py", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: read(out) for name, out in outs.items()}


def two_of_four(
    config: type[PretrainedConfig],
    kind: type[PreTrainedModel],
    kept: tuple[str, ...],
) -> nn.Module:
    """A tiny model, pruned 2:4 but for the layers that are kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config(**SIZES))
        for parameter in model.parameters():
            parameter.data.normal_()
    model = model.to(torch.bfloat16)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith(kept or ("none",)):
            weight = module.weight.data
            mask = nm_mask(weight.abs().float(), NMPattern(2, 4))
            weight.masked_fill_(~mask, 0)
    return model


def edited(
    source: Path,
    out: Path,
    edit: Callable[[Tensor], Tensor | None],
    module: str = DAMAGED,
) -> Path:
    """A copy with one layer's bitmask edited, or left out."""
    copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    name = f"{module}.bitmask"
    bits = edit(tensors.pop(name))
    if bits is not None:
        tensors[name] = bits
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def read(out: Path) -> Loaded:
    error = Path(f"{out}.error")
    if error.exists():
        return Loaded({}, {}, error.read_text())
    with safe_open(out, "pt") as file:
        return Loaded(load_file(out), file.metadata(), None)


@pytest.mark.parametrize(
    "name", ["static", "experts", *(name for name in MODELS if name != "head")]
)
def test_every_parameter_is_the_same(loaded, name: str) -> None:
    dense, sparse = loaded[f"{name} dense"], loaded[f"{name} sparse-24-bitmask"]
    assert (dense.error, sparse.error) == (None, None)
    assert dense.parameters.keys() == sparse.parameters.keys()
    different = [
        parameter
        for parameter, expected in dense.parameters.items()
        if sparse.parameters[parameter].dtype != expected.dtype
        or not torch.equal(bits(sparse.parameters[parameter]), bits(expected))
    ]
    assert different == []
    weights = [
        p for name, p in sparse.parameters.items() if name.endswith("proj.weight")
    ]
    assert min(float((w.float() == 0).float().mean()) for w in weights) >= 0.25


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def test_biases_and_static_scales_are_among_them(loaded) -> None:
    attention = "model.layers.0.self_attn.qkv_proj"
    assert f"{attention}.bias" in loaded["biases sparse-24-bitmask"].parameters
    static = loaded["static sparse-24-bitmask"].parameters
    assert static[f"{attention}.weight"].dtype == torch.float8_e4m3fn
    assert static[f"{attention}.input_scale"].shape == (3,)


def test_only_layers_that_are_2of4_are_wrapped(loaded) -> None:
    ours = "Sparse24LinearMethod"
    methods = loaded["biases sparse-24-bitmask"].methods
    linears = {name: m for name, m in methods.items() if name.endswith("_proj")}
    assert len(linears) == 8
    assert set(linears.values()) == {ours}
    assert methods["lm_head"] == "UnquantizedEmbeddingMethod"
    assert ours not in loaded["biases dense"].methods.values()


@pytest.mark.parametrize("name", ["missing", "damaged"])
def test_a_layer_that_is_damaged_or_missing_is_named(loaded, name: str) -> None:
    error = loaded[name].error
    assert error is not None
    assert "model.layers.1.mlp.gate_up_proj" in error
    assert "damaged" in error


def test_an_expert_that_is_missing_is_named(loaded) -> None:
    error = loaded["lost expert"].error
    assert error is not None
    assert "model.layers.1.mlp.experts: up_proj of expert 2" in error
    assert "damaged" in error


def test_sparse_experts_have_our_method(loaded) -> None:
    methods = loaded["experts sparse-24-bitmask"].methods
    assert "Sparse24ExpertsMethod" in methods.values()
    assert "UnquantizedFusedMoEMethod" not in methods.values()
    assert "UnquantizedFusedMoEMethod" in loaded["experts dense"].methods.values()


def test_a_sparse_head_is_refused_with_the_way_out(loaded) -> None:
    error = loaded["head sparse-24-bitmask"].error
    assert error is not None
    assert "lm_head" in error
    assert "nm-permute convert" in error
