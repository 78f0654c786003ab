# SPDX-License-Identifier: Apache-2.0
"""FP8 and INT8 checkpoints of 2:4 weights in transformers; stand-ins multiply."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from loguru import logger
from stand_in_kernels import stand_in_kernels
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import nm_permute_plugin as nmp
from nm_permute_plugin.checkpoint.writer import convert
from nm_permute_plugin.maths.masks import nm_mask
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.serving.accelerated_linear import AcceleratedLinear
from nm_permute_plugin.serving.quantized_linear import quantize, unsupported_scheme

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoint"))
from checkpoint_files import quantize as quantize_files  # noqa: E402

SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    with stand_in_kernels("triton"):
        yield


@pytest.fixture
def read(tiny_model, tmp_path: Path) -> Callable[[str], PreTrainedModel]:
    """A factory: a tiny 2:4 model of 8 bits, read from its sparse checkpoint."""

    def make(kind: str) -> PreTrainedModel:
        sparse = tmp_path / f"{kind}-sparse"
        if not sparse.exists():
            model = tiny_model("llama", dtype=torch.bfloat16, **SIZES)
            for module in model.model.layers.modules():
                if isinstance(module, nn.Linear):
                    weight = module.weight.data
                    mask = nm_mask(weight.abs().float(), NMPattern(2, 4))
                    weight.masked_fill_(~mask, 0)
            model.save_pretrained(tmp_path / kind)
            quantize_files(tmp_path / kind, kind)
            convert(tmp_path / kind, sparse, "sparse-24-bitmask", clear_zeros=True)
        return AutoModelForCausalLM.from_pretrained(sparse, dtype="auto")

    return make


def accelerated(model: nn.Module) -> int:
    return sum(isinstance(m, AcceleratedLinear) for m in model.modules())


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.view(torch.int8).clone() for name, t in model.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )


@pytest.mark.parametrize("kind", DTYPES)
def test_it_says_what_the_decompressed_model_says(
    read, tokens: Tensor, kind: str
) -> None:
    model, right = read(kind), read(kind)
    nmp.accelerate(model)
    assert accelerated(model) == 14
    assert {m.dtype for m in model.modules() if hasattr(m, "packed_names")} == {
        DTYPES[kind]
    }
    with torch.no_grad():
        found, expected = model(tokens).logits, right(tokens).logits
        for name in ("self_attn.q_proj", "mlp.down_proj"):
            ours, theirs = (
                m.get_submodule(f"model.layers.0.{name}") for m in (model, right)
            )
            x = torch.randn(2, 5, ours.in_features).bfloat16()
            wrong = (ours(x) - theirs(x)).abs().max() / theirs(x).abs().max()
            assert wrong < 0.01, name
    # of a model: a sum that is rounded elsewhere moves inputs of later layers by a step
    assert (found - expected).abs().mean() < 0.02 * expected.abs().max()
    same_word = found.argmax(-1) == expected.argmax(-1)
    assert same_word.float().mean() > 0.9
    options = {"do_sample": False, "max_new_tokens": 2, "pad_token_id": 0}
    assert torch.equal(
        model.generate(tokens[:, :6], **options),
        right.generate(tokens[:, :6], **options),
    )


@pytest.mark.parametrize("ran", [False, True], ids=["at once", "after a forward"])
@pytest.mark.parametrize("kind", DTYPES)
def test_undo_gives_the_model_back(read, tokens: Tensor, kind: str, ran: bool) -> None:
    model, right = read(kind), read(kind)
    nmp.accelerate(model)
    assert same(bits(model), bits(right))
    with torch.no_grad():
        if ran:  # compressed-tensors decompresses its own at the first forward
            model(tokens)
            right(tokens)
        nmp.accelerate(model, undo=True)
        assert accelerated(model) == 0
        assert same(bits(model), bits(right))
        assert torch.equal(model(tokens).logits, right(tokens).logits)


def test_it_saves_what_the_quantized_model_saves(
    read, tokens: Tensor, tmp_path
) -> None:
    model, right = read("fp8"), read("fp8")
    nmp.accelerate(model)
    for one, name in ((model, "a"), (right, "b")):
        one.save_pretrained(tmp_path / name)
    files = [tmp_path / name / "model.safetensors" for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_decompressed_model_is_refused_with_the_way(read, tokens: Tensor) -> None:
    model = read("fp8")
    with torch.no_grad():
        model(tokens)
    with pytest.raises(ValueError, match="accelerate the model right after from_pretr"):
        nmp.accelerate(model)


def scheme(**changed: object) -> SimpleNamespace:
    """A scheme of compressed-tensors, changed somewhere: ``weights__num_bits=4``."""
    weights = {"num_bits": 8, "strategy": "channel", "symmetric": True}
    inputs = {"num_bits": 8, "strategy": "token", "symmetric": True, "dynamic": True}
    parts = {
        "weights": SimpleNamespace(**weights),
        "input_activations": SimpleNamespace(**inputs),
        "output_activations": None,
    }
    for name, value in changed.items():
        part, _, field = name.partition("__")
        if field:
            setattr(parts[part], field, value)
        else:
            parts[part] = value
    return SimpleNamespace(**parts)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"weights__num_bits": 4}, "another quantization than 8 bits"),
        ({"input_activations": None}, "another quantization than 8 bits"),
        ({"weights__strategy": "group"}, "scales by group"),
        ({"weights__symmetric": False}, "a zero point"),
        ({"input_activations__symmetric": False}, "a zero point"),
        ({"input_activations__dynamic": False}, "8-bit inputs with a scale by token"),
        ({"output_activations": 1}, "quantized outputs"),
        ({}, "a forward has decompressed"),  # its weight has 32 bits
    ],
)
def test_other_schemes_stay_with_compressed_tensors(
    changed: dict[str, object], reason: str
) -> None:
    linear = nn.Linear(8, 8)
    linear.quantization_scheme = scheme(**changed)
    assert reason in str(unsupported_scheme(linear))
    assert "another forward" in str(unsupported_scheme(nn.Linear(8, 8)))


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize(
    "given", [None, 0.05], ids=["a scale a token", "a given scale"]
)
def test_inputs_are_quantized_to_half_a_step(kind: str, given: float | None) -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    x[1] = 0
    scale = None if given is None else torch.tensor([given], dtype=torch.bfloat16)
    found, scales = quantize(x, DTYPES[kind], scale)
    assert (found.dtype, scales.dtype) == (DTYPES[kind], torch.float32)
    assert scales.shape == ((5, 1) if given is None else (1, 1))
    largest = (x.abs() / (8 if kind == "fp8" else 1e9)).clamp_min(scales)
    assert bool(((found.float() * scales - x).abs() <= largest / 2 + 1e-6).all())


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Without the log of conversions."""
    logger.disable("nm_permute_plugin")
    yield
    logger.enable("nm_permute_plugin")
