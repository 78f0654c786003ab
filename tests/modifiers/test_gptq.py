# SPDX-License-Identifier: Apache-2.0
"""GPTQ keeps the zeros of sparse weights, and loses less than plain rounding."""

from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from helpers import ours, quantize
from llmcompressor.modifiers.gptq import base, gptq_quantize
from llmcompressor.observers import Observer
from torch import Tensor
from transformers import AutoModelForCausalLM

import nm_permute_plugin.modifiers  # noqa: F401
from nm_permute_plugin.checkpoint.verify import verify
from nm_permute_plugin.maths.masks import nm_mask
from nm_permute_plugin.maths.pattern import NMPattern

WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
ARGS = {
    "4 bits in groups": {"num_bits": 4, "strategy": "group", "group_size": 16},
    "with a zero point": {
        "num_bits": 4,
        "strategy": "group",
        "group_size": 16,
        "symmetric": False,
    },
    "8 bits a channel": {"num_bits": 8, "strategy": "channel"},
    "FP8 a channel": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "FP8 a tensor": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    "FP8 in blocks": {
        "num_bits": 8,
        "type": "float",
        "strategy": "block",
        "block_structure": [16, 16],
    },
}


@pytest.fixture
def inputs() -> Tensor:
    """Inputs whose channels go together, as those of a language model do."""
    generator = torch.Generator().manual_seed(1)
    few = torch.randn(512, 12, generator=generator)
    mixed = few @ torch.randn(12, 64, generator=generator)
    return mixed + 0.3 * torch.randn(512, 64, generator=generator)


def weights(count: int, sparse: bool) -> Tensor:
    value = torch.randn(count, 32, 64, generator=torch.Generator().manual_seed(2))
    if sparse:
        mask = nm_mask(value.flatten(0, 1).abs(), NMPattern(2, 4))
        value = value.masked_fill(~mask.view_as(value), 0)
    return value


def observed(value: Tensor, args: QuantizationArgs) -> dict[str, Tensor]:
    """Scales of every weight of a batch, as an observer of llm-compressor finds them."""
    found = []
    for each in value:
        kind = "memoryless_minmax"
        observer = Observer.load_from_registry(kind, base_name="weight", args=args)
        found.append(observer(each).get_qparams())
    names = ("scale", "zero_point")
    return {name: torch.stack([one[name] for one in found]) for name in names}


def gptq(value: Tensor, args: QuantizationArgs, x: Tensor) -> Tensor:
    hessians = (2 * x.T @ x / len(x)).repeat(len(value), 1, 1)
    given = observed(value, args) | {"global_scale": None, "quant_args": args}
    found, losses, _ = base.quantize_weight(
        weights=value.clone(), hessians=hessians, **given
    )
    assert found.shape == value.shape
    assert losses.shape == (len(value),)
    return found


def error(found: Tensor, value: Tensor, x: Tensor) -> float:
    return float((x @ (found - value).mT).square().mean())


@pytest.mark.parametrize("order", ["static", None], ids=["ordered", "as they stand"])
@pytest.mark.parametrize("fields", ARGS.values(), ids=ARGS)
def test_zeros_stay_and_less_is_lost_than_by_plain_rounding(
    inputs: Tensor, fields: dict[str, object], order: str | None
) -> None:
    args = QuantizationArgs(**fields, actorder=order)
    value = weights(2, sparse=True)
    found = gptq(value, args, inputs)
    assert torch.equal(found == 0, (value == 0) | (found == 0))
    assert not bool(torch.signbit(found[value == 0]).any())
    given = observed(value, args)
    plain = torch.stack(
        [
            fake_quantize(one, scale, point, args)
            for one, scale, point in zip(value, *given.values(), strict=True)
        ]
    )
    assert error(found, value, inputs) < 0.7 * error(plain, value, inputs)


@pytest.mark.parametrize("fields", ARGS.values(), ids=ARGS)
def test_what_is_found_lies_on_the_grid_of_the_scales(
    inputs: Tensor, fields: dict[str, object]
) -> None:
    args = QuantizationArgs(**fields, actorder="static")
    value = weights(1, sparse=True)
    found = gptq(value, args, inputs)[0]
    scale, point = (one[0] for one in observed(value, args).values())
    assert torch.allclose(fake_quantize(found, scale, point, args), found, atol=1e-6)


def test_weights_without_zeros_are_the_hosts_bit_by_bit(
    inputs: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = QuantizationArgs(**ARGS["4 bits in groups"], actorder="static")
    value = weights(2, sparse=False)
    ours = gptq(value, args, inputs)
    monkeypatch.setattr(base, "quantize_weight", gptq_quantize.quantize_weight)
    assert torch.equal(gptq(value, args, inputs), ours)


def test_the_host_alone_fills_the_zeros(
    inputs: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = QuantizationArgs(**ARGS["4 bits in groups"], actorder="static")
    value = weights(1, sparse=True)
    monkeypatch.setattr(base, "quantize_weight", gptq_quantize.quantize_weight)
    assert bool((gptq(value, args, inputs)[value == 0] != 0).any())


@pytest.mark.parametrize(
    ("pattern", "scheme", "stored"),
    [
        ("2:4", "W4A16", "packed"),
        ("2:4", "FP8_DYNAMIC", "sparse-24-bitmask"),
        ("2:4", "W8A8", "sparse-24-bitmask"),
        ("4:8", "W4A16", "packed"),
    ],
)
def test_a_recipe_with_gptq_is_saved_sparse_and_read_again(
    tiny_checkpoint, run_oneshot, tmp_path: Path, pattern: str, scheme: str, stored: str
) -> None:
    recipe = ours(mask_structure=pattern, method="identity")
    recipe += quantize(scheme, "GPTQModifier")
    run_oneshot(tiny_checkpoint(**WIDE), recipe, tmp_path / "out")
    report = verify(tmp_path / "out")
    assert report.faults == ()
    assert [row.format for row in report.rows if row.promised] == [stored] * 14
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert bool(model(torch.tensor([[1, 2, 3, 4]])).logits.isfinite().all())


def test_a_later_session_keeps_the_zeros_too(
    tiny_checkpoint, run_oneshot, tmp_path: Path
) -> None:
    run_oneshot(tiny_checkpoint(), ours(method="identity"), tmp_path / "pruned")
    later = "quantization_stage:\n" + quantize("FP8_DYNAMIC", "GPTQModifier")
    run_oneshot(tmp_path / "pruned", later, tmp_path / "out")
    report = verify(tmp_path / "out")
    assert report.faults == ()
    assert sum(row.promised and row.sparse for row in report.rows) == 14
