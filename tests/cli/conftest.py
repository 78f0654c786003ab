# SPDX-License-Identifier: Apache-2.0
"""A recipe, text and a folder that is full, for the tests of the command."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)

sys.path.insert(0, str(Path(__file__).parent))  # for commands.py beside the tests
from commands import listing  # noqa: E402


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe that takes no time."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "prune_stage:\n  permutation_modifiers:\n    LearnablePermutationModifier:\n"
        "      method: search\n      search: {rounds: 2}\n"
    )
    return path


@pytest.fixture
def ready(tiny_checkpoint, recipe: Path, text_file: Path, tmp_path: Path) -> list[str]:
    """Model, recipe and text lie in ``tmp_path``; what is there now."""
    tiny_checkpoint()
    return listing(tmp_path)


@pytest.fixture(params=["gpt2", "opt"])
def older_checkpoint(
    request: pytest.FixtureRequest, tiny_checkpoint, tmp_path: Path
) -> Callable[..., Path]:
    """A factory: the folder of a tiny model with so many learned positions."""

    def save(positions: int) -> Path:
        torch.manual_seed(0)
        ends = {"vocab_size": 48, "bos_token_id": 1, "eos_token_id": 2}
        if request.param == "gpt2":
            size = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": positions}
            model = GPT2LMHeadModel(GPT2Config(**ends, **size))
        else:
            size = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2}
            size |= {"num_attention_heads": 4, "word_embed_proj_dim": 32}
            config = OPTConfig(**ends, **size, max_position_embeddings=positions)
            model = OPTForCausalLM(config)
        folder = tmp_path / request.param
        model.save_pretrained(folder)
        dense = tiny_checkpoint(name="llama")
        AutoTokenizer.from_pretrained(dense).save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def text_file(tmp_path: Path, chain_rows, words) -> Path:
    """A file of 1280 tokens that a tiny checkpoint knows."""
    path = tmp_path / "text.txt"
    path.write_text(words(chain_rows(40, 32, seed=3)))
    return path


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 KiB, less than a tiny checkpoint's 80; needs root."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(folder)]
    try:
        made = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if made.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
