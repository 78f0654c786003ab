# SPDX-License-Identifier: Apache-2.0
"""A model's folder opens in its own class and dtype; what is no model is named."""

import json
from pathlib import Path

import pytest
import torch

from nm_permute_plugin.evaluation.model_names import must_be_model
from nm_permute_plugin.evaluation.pretrained import (
    config_of,
    image_processor,
    load_checkpoint,
    load_model,
    tokenizer_of,
)
from nm_permute_plugin.pruning.running import fast_dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_checkpoint_is_read_in_its_own_dtype(
    tiny_checkpoint, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a CPU that is not slow in 16 bits, whatever this one is.
    monkeypatch.setattr(fast_dtype, "_times_as_long", lambda dtype: 0.6)
    model = load_checkpoint(tiny_checkpoint(dtype=dtype), "cpu")
    assert model.dtype == dtype
    assert not model.training


def test_a_checkpoint_without_a_processor_is_named(image_checkpoint) -> None:
    folder = image_checkpoint()
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="dense has no image processor"):
        image_processor(folder)


def test_a_folder_or_a_name_of_the_hub_may_be_a_model(tiny_checkpoint) -> None:
    must_be_model(tiny_checkpoint())
    must_be_model("Qwen/Qwen3-0.6B")


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "/no/where", "a/b/c", "~/a"])
def test_what_cannot_be_a_model_comes_with_both_ways(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"does not exist.* ORGANISATION/NAME"):
        must_be_model(name)


def test_a_folder_without_a_model_is_no_name_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"a/b holds no checkpoint"):
        must_be_model("a/b")


@pytest.mark.parametrize("number", [1 << 40, -1, "7", 10**400])
def test_a_token_of_an_impossible_number_is_told(tiny_checkpoint, number) -> None:
    folder = tiny_checkpoint()
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["w07"] = number
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"tokenizer\.json: the token 'w07' has the num"
    ):
        tokenizer_of(folder)


def test_what_transformers_cannot_read_names_the_file(tiny_checkpoint) -> None:
    folder = tiny_checkpoint()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"use_cache": "x" * 9999}))
    with pytest.raises(
        ValueError, match=r"config\.json: transformers cannot read"
    ) as e:
        config_of(folder)
    assert len(str(e.value)) < 1000
    with (folder / "generation_config.json").open("wb") as hole:
        hole.truncate(1 << 40)
    with pytest.raises(ValueError, match=r"generation_config\.json has 1,099,511,"):
        load_model(folder)
