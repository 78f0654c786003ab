# SPDX-License-Identifier: Apache-2.0
"""A 2:4 Qwen2-VL and a Qwen2.5-VL are served with an image in the prompt."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from llmcompressor import oneshot
from transformers import (
    AutoTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from nm_permute_plugin.checkpoint.writer import convert
from nm_permute_plugin.modifiers import LearnablePermutationModifier as Modifier

pytestmark = pytest.mark.slow

MARKS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
IMAGES = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "size": {"shortest_edge": 56 * 56, "longest_edge": 112 * 112},
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    "rope_parameters": {
        "rope_type": "default",
        "mrope_section": [8, 12, 12],
        "rope_theta": 1e4,
    },
    "tie_word_embeddings": False,
}
WINDOWS = {
    "depth": 2,
    "hidden_size": 64,
    "num_heads": 2,
    "intermediate_size": 96,
    "out_hidden_size": 128,
    "window_size": 56,
    "fullatt_block_indexes": [1],
}
PLAIN = {"depth": 2, "embed_dim": 64, "hidden_size": 128, "num_heads": 2}
FAMILIES = {
    "Qwen2VL": (Qwen2VLConfig, Qwen2VLForConditionalGeneration, PLAIN),
    "Qwen2_5_VL": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, WINDOWS),
}
"""By the name of their processor: config, model and tower of images."""


@pytest.fixture(scope="module")
def torchvision() -> Path:
    """Where torchvision is, which reads the images; not beside vLLM, it needs CUDA."""
    found = os.environ.get("NM_PERMUTE_TORCHVISION")
    if not found:
        pytest.skip("NM_PERMUTE_TORCHVISION names no folder with torchvision")
    return Path(found)


@pytest.fixture(scope="module", params=FAMILIES)
def sparse(
    request: pytest.FixtureRequest,
    cut_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A random model of images and text, its language tower pruned by our recipe."""
    config_class, model_class, tower = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("vision")
    tokenizer = AutoTokenizer.from_pretrained(cut_model)
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    ids = tokenizer.convert_tokens_to_ids(MARKS)
    names = ("vision_start", "vision_end", "image", "video")
    config = config_class(
        text_config={**TEXT, "vocab_size": len(tokenizer)},
        vision_config=tower,
        **{f"{name}_token_id": mark for name, mark in zip(names, ids, strict=True)},
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data.uniform_(0.5, 1.5)
            else:
                parameter.data.normal_(std=parameter[0].numel() ** -0.5)
    model.to(torch.bfloat16).save_pretrained(folder / "source")
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(3, 40000, (12, 32), generator=generator).tolist()
    ignore = ["lm_head", "re:.*visual.*"]
    oneshot(
        model=model_class.from_pretrained(folder / "source", dtype="auto"),
        tokenizer=tokenizer,
        recipe=[Modifier(method="search", search={"rounds": 1}, ignore=ignore)],
        dataset=Dataset.from_dict({"input_ids": rows}),
        max_seq_length=32,
        num_calibration_samples=len(rows),
        shuffle_calibration_samples=False,
        output_dir=str(folder / "sparse"),
    )
    file = folder / "sparse" / "preprocessor_config.json"
    file.write_text(
        json.dumps({**IMAGES, "processor_class": f"{request.param}Processor"})
    )
    return folder / "sparse"


@pytest.fixture(scope="module")
def said(
    sparse: Path, torchvision: Path, run_engine, engine_environment: Mapping[str, str]
) -> Mapping[str, dict]:
    """What the checkpoint and its dense form say to two images."""
    dense = sparse.parent / "dense"
    convert(sparse, dense, "dense")
    scripts = Path(__file__).parent / "scripts"
    paths = [str(scripts / "torchvision_ops"), str(torchvision)]
    before = engine_environment.get("PYTHONPATH")
    out = sparse.parent / "said.json"
    path = os.pathsep.join([*paths, before] if before else paths)
    done = run_engine("look.py", out, sparse, dense, alone=True, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    log = (done.stdout + done.stderr).splitlines()
    return {
        "sparse": found[str(sparse)],
        "dense": found[str(dense)],
        "log": {"lines": [line for line in log if "served dense" in line]},
    }


def test_tokens_and_logprobs_are_those_of_the_dense_checkpoint(said) -> None:
    for key in ("tokens", "logprobs"):
        assert said["sparse"][key] == said["dense"][key]
    assert said["sparse"]["config"] == "Sparse24Config"
    (line,) = said["log"]["lines"]
    assert "8 of 8" in line
    assert "language_model.model.layers.0.self_attn.qkv_proj" in line


def test_the_image_is_looked_at(said) -> None:
    first, second = said["sparse"]["logprobs"]
    assert first != second
