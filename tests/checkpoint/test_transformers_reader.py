# SPDX-License-Identifier: Apache-2.0
"""transformers reads our checkpoints as it reads the dense ones, and no others so."""

import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_files import KINDS, MakeDense, assert_same_bits, quantize
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig
from transformers.quantizers import auto

from nm_permute_plugin.checkpoint.directory import INDEX, SINGLE
from nm_permute_plugin.checkpoint.transformers_reader import register_reader
from nm_permute_plugin.checkpoint.writer import convert
from nm_permute_plugin.maths.masks import nm_mask
from nm_permute_plugin.maths.pattern import NMPattern

DOWN = "model.layers.0.mlp.down_proj"
TOKENS = torch.arange(32)[None]


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    mappings = auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING
    before = [dict(mapping) for mapping in mappings]
    register_reader()
    yield
    for mapping, old in zip(mappings, before, strict=True):
        mapping.update(old)


@pytest.fixture
def reported(
    caplog: pytest.LogCaptureFixture,
) -> Iterator[pytest.LogCaptureFixture]:
    """What transformers logs."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def logits(path: Path, **options: object) -> Tensor:
    """The logits of a checkpoint, loaded by transformers."""
    model = AutoModelForCausalLM.from_pretrained(path, **options).eval()
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("form", ["sparse-24-bitmask", "sparse-bitmask"])
@pytest.mark.parametrize("shard", ["20KB", "1GB"], ids=["shards", "one file"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_dense_checkpoint(
    tmp_path: Path, make_dense: MakeDense, kind: str, shard: str, form: str
) -> None:
    dense = make_dense(kind, shard)
    convert(dense, tmp_path / "sparse", form)
    expected = logits(dense)
    assert float(expected.float().std()) > 0.1
    assert_same_bits(logits(tmp_path / "sparse"), expected)


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_logits_agree_in_another_dtype(
    tmp_path: Path, make_dense: MakeDense, kind: str
) -> None:
    dense = make_dense(kind)
    convert(dense, tmp_path / "sparse", "sparse-24-bitmask")
    found = logits(tmp_path / "sparse", dtype=torch.float32)
    assert_same_bits(found, logits(dense, dtype=torch.float32))


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_dequantizing_at_loading_agrees(
    tmp_path: Path, make_dense: MakeDense, kind: str
) -> None:
    dense = make_dense(kind)
    convert(dense, tmp_path / "sparse", "sparse-24-bitmask")
    option = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    assert_same_bits(logits(tmp_path / "sparse", **option), logits(dense, **option))


def test_nothing_is_said_of_compressed_execution(
    tmp_path: Path, make_dense: MakeDense, reported: pytest.LogCaptureFixture
) -> None:
    convert(make_dense(), tmp_path / "sparse", "sparse-24-bitmask")
    AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert "Compressed execution" not in reported.text


def test_a_model_that_was_read_is_an_ordinary_one(
    tmp_path: Path, make_dense: MakeDense
) -> None:
    dense = make_dense()
    convert(dense, tmp_path / "sparse", "sparse-24-bitmask")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert getattr(model.config, "quantization_config", None) is None
    model(TOKENS).logits.sum().backward()
    assert model.get_parameter(f"{DOWN}.weight").grad is not None
    model.save_pretrained(tmp_path / "again")
    assert f"{DOWN}.weight" in load_file(tmp_path / "again" / SINGLE)
    assert_same_bits(logits(tmp_path / "again"), logits(dense))


def test_tied_embeddings_stay_tied(tmp_path: Path, make_dense: MakeDense) -> None:
    dense = make_dense(tie_word_embeddings=True)
    convert(dense, tmp_path / "sparse", "sparse-24-bitmask")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same_bits(logits(tmp_path / "sparse"), logits(dense))


def test_a_base_model_is_read_without_its_head(
    tmp_path: Path, make_dense: MakeDense
) -> None:
    from transformers import AutoModel

    dense = make_dense()
    convert(dense, tmp_path / "sparse", "sparse-24-bitmask")
    found, expected = (
        AutoModel.from_pretrained(path)(TOKENS).last_hidden_state
        for path in (tmp_path / "sparse", dense)
    )
    assert_same_bits(found, expected)


def test_another_class_gets_a_new_head_and_all_other_weights(
    tmp_path: Path, make_dense: MakeDense
) -> None:
    from transformers import AutoModelForSequenceClassification

    convert(make_dense(), tmp_path / "sparse", "sparse-24-bitmask")
    found = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "sparse", num_labels=3
    )
    assert found.score.weight.shape == (3, 32)
    assert bool((found.score.weight != 0).any())
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    expected = whole.model.state_dict()
    assert found.model.state_dict().keys() == expected.keys()
    for name, weight in found.model.state_dict().items():
        assert_same_bits(weight, expected[name])


def test_an_encoder_without_a_pooler_gets_a_new_one(tmp_path: Path) -> None:
    from transformers import (
        AutoModelForSequenceClassification,
        BertConfig,
        BertForMaskedLM,
    )

    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    model = BertForMaskedLM(BertConfig(**size, num_attention_heads=2, vocab_size=40))
    for module in model.bert.encoder.modules():
        if isinstance(module, torch.nn.Linear):
            mask = nm_mask(module.weight.data.abs(), NMPattern(2, 4))
            module.weight.data.masked_fill_(~mask, 0)
    model.save_pretrained(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "sparse", "sparse-24-bitmask")
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "sparse")
    expected = model.bert.state_dict()
    for name, weight in found.bert.state_dict().items():
        assert weight.isfinite().all()
        if not name.startswith("pooler."):
            assert_same_bits(weight, expected[name])


@pytest.mark.parametrize("module", [DOWN, "model.layers.1.self_attn.q_proj"])
def test_another_class_misses_a_layers_weight_all_the_same(
    tmp_path: Path, make_dense: MakeDense, module: str
) -> None:
    from transformers import AutoModelForSequenceClassification

    convert(make_dense(shard="1GB"), tmp_path / "sparse", "sparse-24-bitmask")
    drop_module(tmp_path / "sparse", module)
    with pytest.raises(ValueError, match=f"no weight for {module}"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "sparse")


def test_registering_twice_changes_nothing() -> None:
    before = auto.AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"]
    register_reader()
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"] is before


def test_foreign_checkpoints_get_the_stock_classes(make_dense: MakeDense) -> None:
    from transformers.quantizers.quantizer_compressed_tensors import (
        CompressedTensorsHfQuantizer,
    )

    config = AutoConfig.from_pretrained(make_dense("fp8")).quantization_config
    made = auto.AutoQuantizationConfig.from_dict(config)
    assert type(made) is CompressedTensorsConfig
    assert type(auto.AutoHfQuantizer.from_config(made)) is CompressedTensorsHfQuantizer
    option = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    assert logits(make_dense("fp8"), **option).isfinite().all()


def test_importing_the_codec_imports_no_transformers() -> None:
    script = (
        "import sys\n"
        "from nm_permute_plugin.checkpoint import bitmask, codec, config, verify\n"
        "from nm_permute_plugin.checkpoint import transformers_reader\n"
        "print([m for m in ('transformers', 'compressed_tensors') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=root
    )
    assert done.stdout.strip() == "[]", done.stderr


def damage_bitmask(path: Path) -> None:
    """Three bits in a group, in a file without checksums."""
    tensors = load_file(path / SINGLE)
    tensors[f"{DOWN}.bitmask"][0, 0] = 0x73
    save_file(tensors, path / SINGLE, {"format": "pt"})


def damage_byte(path: Path) -> None:
    """Another value of a norm, as a bad disk would leave it."""
    content = bytearray((path / SINGLE).read_bytes())
    tensor = load_file(path / SINGLE)["model.norm.weight"]
    at = content.index(tensor.view(torch.uint8).numpy().tobytes())
    content[at] ^= 4
    (path / SINGLE).write_bytes(content)


def drop_module(path: Path, module: str = DOWN) -> None:
    """No weight at all for a module that the config promises."""
    tensors = load_file(path / SINGLE)
    for part in ("compressed", "bitmask", "shape"):
        del tensors[f"{module}.{part}"]
    save_file(tensors, path / SINGLE, {"format": "pt"})


def drop_part(path: Path) -> None:
    """A module without its bitmask."""
    tensors = load_file(path / SINGLE)
    del tensors[f"{DOWN}.bitmask"]
    save_file(tensors, path / SINGLE, {"format": "pt"})


def rename_module(path: Path) -> None:
    """A sparse module that the model does not have."""
    tensors = load_file(path / SINGLE)
    for part in ("compressed", "bitmask", "shape"):
        tensors[f"model.experts.{part}"] = tensors[f"{DOWN}.{part}"].clone()
    save_file(tensors, path / SINGLE, {"format": "pt"})


def change_size(path: Path) -> None:
    """A config of another width."""
    config = json.loads((path / "config.json").read_text())
    config["intermediate_size"] = 60
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_bitmask, DOWN),
        (damage_byte, r"model.norm.weight .*CRC-32"),
        (drop_module, f"no weight for {DOWN}"),
        (drop_part, rf"no {DOWN}.bitmask"),
        (rename_module, "model.experts is stored sparse"),
        (change_size, "model.layers"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damage_is_an_error_and_no_random_weight(
    tmp_path: Path,
    make_dense: MakeDense,
    reported: pytest.LogCaptureFixture,
    damage,
    message: str,
) -> None:
    sparse = tmp_path / "sparse"
    convert(make_dense(shard="1GB"), sparse, "sparse-24-bitmask")
    damage(sparse)
    with pytest.raises((ValueError, RuntimeError, NotImplementedError)) as caught:
        logits(sparse)
    # what happens inside of transformers' own loop it reports, and raises an error
    said = f"{caught.value}\n{reported.text}"
    assert re.search(message, said)


def test_quantized_weights_without_quantization_are_refused(
    tmp_path: Path, make_dense: MakeDense, reported: pytest.LogCaptureFixture
) -> None:
    dense, sparse = make_dense(shard="1GB"), tmp_path / "sparse"
    convert(dense, tmp_path / "plain", "sparse-24-bitmask")
    quantize(dense, "fp8")
    convert(dense, sparse, "sparse-24-bitmask")
    plain = (tmp_path / "plain" / "config.json").read_text()
    (sparse / "config.json").write_text(plain)
    with pytest.raises(RuntimeError):
        logits(sparse)
    assert "is torch.float8_e4m3fn in the checkpoint" in reported.text


def test_a_shard_that_the_index_forgot_is_missed(
    tmp_path: Path, make_dense: MakeDense
) -> None:
    sparse = tmp_path / "sparse"
    convert(make_dense(), sparse, "sparse-24-bitmask")
    index = json.loads((sparse / INDEX).read_text())
    lost = index["weight_map"][f"{DOWN}.compressed"]
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f != lost}
    (sparse / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="no weight for model.layers"):
        logits(sparse)
