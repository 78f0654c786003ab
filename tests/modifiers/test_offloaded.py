# SPDX-License-Identifier: Apache-2.0
"""A model whose weights are on disk: what ``oneshot`` leaves, what is held meanwhile."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from compressed_tensors.offload import load_offloaded_model
from compressed_tensors.offload.cache import DiskCache
from safetensors.torch import load_file
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM

from nm_permute_plugin.modifiers import LearnablePermutationModifier as Modifier

CASES = {
    "layer_wise": ("layer_wise", load_offloaded_model),
    "layer_wise, by accelerate": ("layer_wise", nullcontext),
    "end_to_end": ("end_to_end", load_offloaded_model),
}


@pytest.mark.parametrize(("objective", "loading"), CASES.values(), ids=CASES)
def test_a_model_on_disk_is_pruned_as_in_memory(
    trained_checkpoint,
    run_oneshot,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    objective: str,
    loading: Callable[[], AbstractContextManager[None]],
) -> None:
    fetch = DiskCache.onload
    fetched: list[tuple[StorageWeakRef, int]] = []
    held: list[int] = []

    def onload(cache: DiskCache, offloaded: torch.Tensor) -> torch.Tensor:
        weight = fetch(cache, offloaded)
        fetched.append((StorageWeakRef(weight.untyped_storage()), weight.numel()))
        held.append(sum(size for storage, size in fetched if not storage.expired()))
        return weight

    monkeypatch.setattr(DiskCache, "onload", onload)
    # Finer multipliers need more text than this.
    learn = {"steps": 4, "multipliers": {"rows": None}}
    fields = {"learn": learn, "search": {"rounds": 3}}
    here, away = (Modifier(objective=objective, **fields) for _ in range(2))
    model = run_oneshot(trained_checkpoint, [here], tmp_path / "here")
    assert not held
    with loading():
        offloaded = AutoModelForCausalLM.from_pretrained(
            trained_checkpoint,
            device_map="auto",
            max_memory={"cpu": 1},
            offload_folder=str(tmp_path / "offload"),
        )
    run_oneshot(trained_checkpoint, [away], tmp_path / "away", model=offloaded)
    assert away.record.history == here.record.history
    assert here.record.history[-1]["validation"] < here.record.history[0]["validation"]
    expected, found = (
        load_file(tmp_path / out / "model.safetensors") for out in ("here", "away")
    )
    assert expected.keys() == found.keys()
    assert [n for n in expected if not torch.equal(expected[n], found[n])] == []
    whole = sum(parameter.numel() for parameter in model.parameters())
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    table = model.model.embed_tokens.weight.numel()
    assert max(held) == (layer + table if objective == "layer_wise" else whole)
