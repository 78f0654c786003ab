# SPDX-License-Identifier: Apache-2.0
"""Tensors of a folder that transformers has no place for are found, and carried whole."""

from pathlib import Path

import pytest
import torch
from checkpoint_files import MakeDense, assert_same_tensors, tensors_of
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaModel,
)

from nm_permute_plugin.checkpoint.directory import open_checkpoint
from nm_permute_plugin.checkpoint.unloaded import (
    FILE,
    carry_tensors,
    unloaded_tensors,
)
from nm_permute_plugin.checkpoint.verify import verify

EXTRA = {"mtp.fc.weight": torch.rand(32, 64), "mtp.norm.weight": torch.rand(32)}


def add(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    file = folder / "model.safetensors"
    save_file(load_file(file) | tensors, file, {"format": "pt"})
    return folder


def names(folder: Path, model) -> list[str]:
    return [tensor.name for tensor in unloaded_tensors(folder, model)]


def test_what_a_model_has_no_place_for_is_found(tiny_checkpoint) -> None:
    folder = add(tiny_checkpoint(), EXTRA)
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = unloaded_tensors(folder, model)
    assert {t.name: t.shape for t in found} == {
        "mtp.fc.weight": (32, 64),
        "mtp.norm.weight": (32,),
    }


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_as_transformers_writes_it_has_none(
    tiny_checkpoint, tied: bool
) -> None:
    folder = tiny_checkpoint(tie_word_embeddings=tied)
    assert names(folder, AutoModelForCausalLM.from_pretrained(folder)) == []
    # Another class puts a prefix before each name, or takes it away.
    head = [] if tied else ["lm_head.weight"]
    bare = LlamaModel.from_pretrained(folder)
    assert names(folder, bare) == head
    bare.save_pretrained(folder)
    assert names(folder, AutoModelForCausalLM.from_pretrained(folder)) == []


def test_constants_that_a_model_computes_are_none(tiny_checkpoint) -> None:
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4)}
    folder = add(tiny_checkpoint(), frequencies)
    assert names(folder, AutoModelForCausalLM.from_pretrained(folder)) == []


def test_the_masks_of_an_older_gpt2_are_none(tmp_path: Path) -> None:
    size = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 32}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=48, **size))
    model.save_pretrained(tmp_path)
    masks = {
        "h.0.attn.bias": torch.ones(1, 1, 32, 32),
        "h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    assert names(add(tmp_path, masks), model) == []


def test_older_names_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    model = BertForSequenceClassification(BertConfig(num_hidden_layers=1, **size))
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    older = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma"): value
        for name, value in load_file(file).items()
    }
    older["bert.embeddings.position_ids"] = torch.arange(8)
    save_file(older, file)
    assert names(tmp_path, model) == []


def test_a_folder_of_pickled_weights_has_none(tiny_checkpoint) -> None:
    folder = tiny_checkpoint()
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert names(folder, model) == []


@pytest.mark.parametrize("sharded", [False, True])
def test_tensors_are_carried_beside_a_checkpoint(
    tiny_checkpoint, tmp_path: Path, sharded: bool
) -> None:
    folder, out = add(tiny_checkpoint(), EXTRA), tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(out, max_shard_size="20KB" if sharded else "1GB")
    before = tensors_of(out)
    carry_tensors(folder, out, list(EXTRA))
    assert (out / FILE).exists()
    assert_same_tensors(tensors_of(out), before | EXTRA)
    assert set(open_checkpoint(out).where) == {*before, *EXTRA}
    assert verify(out).good
    AutoModelForCausalLM.from_pretrained(out)
    # What is there already is not written twice.
    content = {file.name: file.read_bytes() for file in out.iterdir()}
    carry_tensors(folder, out, list(EXTRA))
    assert {file.name: file.read_bytes() for file in out.iterdir()} == content


def test_damage_to_a_file_beside_the_single_one_is_seen(
    tiny_checkpoint, tmp_path: Path
) -> None:
    folder, out = add(tiny_checkpoint(), EXTRA), tmp_path / "out"
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(out)
    carry_tensors(folder, out, list(EXTRA))
    (out / FILE).write_bytes((out / FILE).read_bytes()[:-4])
    report = verify(out)
    assert [fault.file for fault in report.faults] == [FILE]
    (out / FILE).unlink()
    assert [fault.file for fault in verify(out).faults] == [FILE]


def test_an_index_of_an_older_save_does_not_count(make_dense: MakeDense) -> None:
    folder = make_dense("bf16")
    single = {k: v.clone() for k, v in tensors_of(folder).items() if "lm_head" in k}
    save_file(single, folder / "model.safetensors")
    assert set(open_checkpoint(folder).where) == {"lm_head.weight"}
