# SPDX-License-Identifier: Apache-2.0
"""Folding models whose weights llm-compressor's host keeps on the CPU or on disk."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nm_permute_plugin.specs.fold import fold, invert_all

offload = pytest.importorskip("compressed_tensors.offload")

PLACES = ["cpu", "disk"]
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
TABLE_NAMES = ("model.embed_tokens.weight", "lm_head.weight")


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters(remove_duplicate=False)
    return {name: tensor.detach().clone() for name, tensor in named}


@pytest.mark.parametrize("place", PLACES)
@TIED
def test_an_offloaded_fold_leaves_the_logits(
    tiny_model,
    resolve_model,
    legal_perms,
    tokens,
    offload_to,
    tmp_path: Path,
    place: str,
    tied: bool,
) -> None:
    model = tiny_model("llama", dtype=torch.float64, tie_word_embeddings=tied)
    before = logits_of(model, tokens)
    offload_to(model, place, tmp_path)
    with offload.disable_onloading():
        resolved = resolve_model(model)
    weights = weights_of(model)
    perms = legal_perms(resolved)
    fold(model, resolved, perms, offload.update_offload_parameter)
    after = logits_of(model, tokens)
    assert float((after - before).abs().max() / before.abs().max()) < 1e-6
    moved = weights_of(model)
    table = weights["lm_head.weight"][:, perms["residual"]]
    assert torch.equal(moved["lm_head.weight"], table)
    assert [name for name in weights if torch.equal(moved[name], weights[name])] == []


@pytest.mark.parametrize("place", PLACES)
@TIED
def test_the_inverse_fold_of_an_offloaded_model_is_bitwise(
    tiny_model,
    resolve_model,
    legal_perms,
    offload_to,
    tmp_path: Path,
    place: str,
    tied: bool,
) -> None:
    model = tiny_model("qwen2", tie_word_embeddings=tied)
    offload_to(model, place, tmp_path)
    with offload.disable_onloading():
        resolved = resolve_model(model)
    weights, perms = weights_of(model), legal_perms(resolved)
    fold(model, resolved, perms, offload.update_offload_parameter)
    fold(model, resolved, invert_all(perms), offload.update_offload_parameter)
    after = weights_of(model)
    assert [
        name for name in weights if not torch.equal(after[name], weights[name])
    ] == []


def test_a_write_in_place_is_lost_on_disk(
    tiny_model, resolve_model, legal_perms, tokens, offload_to, tmp_path: Path
) -> None:
    """Why ``fold`` takes its ``write`` as an argument."""
    model = tiny_model("llama")
    before = logits_of(model, tokens)
    offload_to(model, "disk", tmp_path)
    resolved = resolve_model(model)
    fold(model, resolved, legal_perms(resolved))
    assert torch.equal(logits_of(model, tokens), before)


def tied_names(model: nn.Module, resolve_model, context) -> list[tuple[str, ...]]:
    with context:
        resolved = resolve_model(model)
    return [p.names for p in resolved.parameters if "lm_head.weight" in p.names]


def test_ties_show_only_without_onloading_where_tensors_change_device(
    tiny_model, resolve_model
) -> None:
    # Offloaded to the CPU and used elsewhere, each access hands out a fresh copy.
    model = tiny_model("llama", tie_word_embeddings=True)
    offload.set_onload_device(model, "meta")
    hidden = tied_names(model, resolve_model, nullcontext())
    shown = tied_names(model, resolve_model, offload.disable_onloading())
    assert hidden == [("lm_head.weight",)]
    assert shown == [TABLE_NAMES]


def test_a_tied_model_loaded_to_disk_folds_its_table_once(
    tiny_model, resolve_model, legal_perms, tokens, offload_to, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    model = tiny_model("llama", tie_word_embeddings=True)
    before = logits_of(model, tokens)
    model.save_pretrained(tmp_path / "model")
    with offload.load_offloaded_model(type(model)):
        loaded = type(model).from_pretrained(
            tmp_path / "model",
            device_map="auto",
            max_memory={"cpu": 1},
            offload_folder=str(tmp_path / "offload"),
        )
    assert offload.get_offloaded_device(loaded.lm_head) == "disk"
    hidden = tied_names(loaded, resolve_model, nullcontext())
    shown = tied_names(loaded, resolve_model, offload.disable_onloading())
    assert hidden == [("lm_head.weight",)]
    assert shown == [TABLE_NAMES]
    with offload.disable_onloading():
        resolved = resolve_model(loaded)
    fold(loaded, resolved, legal_perms(resolved), offload.update_offload_parameter)
    assert not torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    torch.testing.assert_close(logits_of(loaded, tokens), before, atol=1e-5, rtol=1e-5)
