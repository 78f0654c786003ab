# SPDX-License-Identifier: Apache-2.0
"""
What vLLM 0.17 and 0.18, the last to serve 2:4 by themselves, ask of a checkpoint.

Their kernels are for Hopper GPUs; the conditions stand in their
``compressed_tensors_24.py`` and ``CompressedTensorsConfig.supports_cutlass_24``.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nm_permute_plugin.checkpoint.codec import decompress
from nm_permute_plugin.checkpoint.writer import convert

pytestmark = pytest.mark.slow

FUSED = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]
DTYPES = {
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
    "fp8-static": torch.float8_e4m3fn,
}


@dataclass(frozen=True)
class Native:
    """A checkpoint as those vLLMs read it."""

    kind: str
    config: dict
    tokenizer: dict
    tensors: dict[str, Tensor]

    @property
    def modules(self) -> list[str]:
        """The modules that are stored sparse."""
        ends = ".compressed"
        return [n.removesuffix(ends) for n in self.tensors if n.endswith(ends)]

    def shape(self, module: str) -> tuple[int, int]:
        rows, columns = self.tensors[f"{module}.shape"].flatten().tolist()
        return rows, columns


@pytest.fixture(scope="module", params=DTYPES)
def native(request, pruned, tmp_path_factory) -> Native:
    """Each kind of checkpoint, written with ``legacy``."""
    out = tmp_path_factory.mktemp("native") / request.param
    source = pruned(request.param, "sparse-24-bitmask")
    convert(source, out, "sparse-24-bitmask", legacy=True)
    config, tokenizer = (
        json.loads((out / f"{name}.json").read_text())
        for name in ("config", "tokenizer_config")
    )
    tensors = load_file(out / "model.safetensors")
    return Native(request.param, config, tokenizer, tensors)


def test_the_block_is_one_that_selects_the_sparse_kernels(native: Native) -> None:
    quantization = native.config["quantization_config"]
    assert quantization["quant_method"] == "compressed-tensors"
    block = quantization["sparsity_config"]
    assert block["format"] == "sparse-24-bitmask"
    assert block["sparsity_structure"] == "2:4"
    # no field that their config class does not know
    assert set(block) <= {
        "format",
        "targets",
        "ignore",
        "global_sparsity",
        "sparsity_structure",
        "registry_requires_subclass",
    }


def test_what_stays_dense_is_left_out_by_a_name_they_know(native: Native) -> None:
    block = native.config["quantization_config"]["sparsity_config"]
    linears = {name.rpartition(".")[0] for name in native.tensors if "_proj." in name}
    # ``ignore`` takes out equal targets only: with a class among them, all are sparse
    assert block["targets"] == ["Linear"]
    assert block["ignore"] == ["lm_head"]
    assert set(native.modules) == linears


def test_a_dense_linear_makes_the_targets_names(
    native: Native, pruned, tmp_path: Path
) -> None:
    kept = native.modules[1:]
    source = pruned(native.kind, "dense")
    convert(source, tmp_path / "out", "sparse-24-bitmask", modules=kept, legacy=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    block = config["quantization_config"]["sparsity_config"]
    assert sorted(block["targets"]) == sorted(kept)
    assert block["ignore"] == []


def test_the_parts_have_the_layout_of_their_parameters(native: Native) -> None:
    assert len(native.modules) == 28
    for module in native.modules:
        rows, columns = native.shape(module)
        parts = [native.tensors[f"{module}.{p}"] for p in ("compressed", "bitmask")]
        assert [part.shape for part in parts] == [
            (rows, columns // 2),
            (rows, columns // 8),
        ]
        assert [part.dtype for part in parts] == [DTYPES[native.kind], torch.uint8]
        shape = native.tensors[f"{module}.shape"]
        assert (shape.dtype, shape.shape) == (torch.int64, (2, 1))
        assert f"{module}.weight" not in native.tensors


def test_every_group_has_two_bits_and_what_is_pruned_is_positive_zero(
    native: Native,
) -> None:
    for module in native.modules:
        parts = {p: native.tensors[f"{module}.{p}"] for p in ("compressed", "bitmask")}
        # refuses another number of bits than two in a group of four
        weight = decompress(**parts, shape=native.shape(module), name=module)
        groups = weight.view(len(weight), -1, 4)
        assert int((groups.float() != 0).sum(-1).max()) == 2
        if native.kind.startswith("fp8"):
            assert int((weight.view(torch.uint8) == 0x80).sum()) == 0


def test_sizes_suit_the_kernels(native: Native) -> None:
    by_owner: dict[str, dict[str, tuple[int, int]]] = {}
    for module in native.modules:
        owner, _, leaf = module.rpartition(".")
        by_owner.setdefault(owner, {})[leaf] = native.shape(module)
    for leaves in by_owner.values():
        for names in FUSED:
            parts = {n: leaves.pop(n) for n in names if n in leaves}
            # all parts of a fused layer are sparse, or it is not fused here
            assert len(parts) in (0, len(names))
            assert [rows for rows, _ in parts.values() if rows % 8] == []
            if parts:
                total = sum(rows for rows, _ in parts.values())
                leaves["+".join(names)] = (total, next(iter(parts.values()))[1])
        sizes = leaves.values()
        assert [size for size in sizes if size[0] % 16 or size[1] % 32] == []


def test_quantized_are_weights_and_activations_alike(native: Native) -> None:
    quantization = native.config["quantization_config"]
    groups = quantization.get("config_groups", {})
    assert (not groups) == (native.kind == "bf16")
    for group in groups.values():
        weights, inputs = group["weights"], group["input_activations"]
        assert weights["num_bits"] == inputs["num_bits"] == 8
        assert weights["type"] == inputs["type"]
        assert weights["strategy"] in ("tensor", "channel")
        assert inputs["strategy"] in ("tensor", "token")
        assert inputs["dynamic"] or inputs["strategy"] == "tensor"
    scaled = {n.removesuffix("_scale") for n in native.tensors if "weight_scale" in n}
    assert scaled == ({f"{m}.weight" for m in native.modules} if groups else set())


def test_rotary_base_and_dtype_stand_where_transformers_4_looks(
    native: Native, cut_model: Path
) -> None:
    written = json.loads((cut_model / "config.json").read_text())
    rope = written["rope_parameters"]
    assert "rope_parameters" not in native.config
    assert native.config["rope_theta"] == rope["rope_theta"] != 10000.0
    assert native.config["rope_scaling"] is None
    assert native.config["torch_dtype"] == "bfloat16"
    assert "dtype" not in native.config
    assert native.tokenizer["tokenizer_class"] != "TokenizersBackend"


def test_there_are_no_experts(native: Native) -> None:
    assert [name for name in native.tensors if "experts" in name] == []
