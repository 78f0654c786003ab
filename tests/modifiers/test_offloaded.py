# SPDX-License-Identifier: Apache-2.0
"""A model whose weights are on disk: what ``oneshot`` leaves, what is held meanwhile."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from compressed_tensors.offload import OffloadCache, load_offloaded_model
from compressed_tensors.offload.cache import DiskCache
from safetensors.torch import load_file
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
    held: list[int] = []
    fetch = DiskCache.onload

    def onload(cache: DiskCache, offloaded: torch.Tensor) -> torch.Tensor:
        held.append(sum(t.numel() for t in OffloadCache.keep_onloaded_values.values()))
        return fetch(cache, offloaded)

    monkeypatch.setattr(DiskCache, "onload", onload)
    fields = {"steps": 4, "learning_rate": 0.1, "block_size": 16, "search_rounds": 3}
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
    assert here.record.history[-1]["held_back"] < here.record.history[0]["held_back"]
    expected, found = (
        load_file(tmp_path / out / "model.safetensors") for out in ("here", "away")
    )
    assert expected.keys() == found.keys()
    assert [n for n in expected if not torch.equal(expected[n], found[n])] == []
    whole = sum(parameter.numel() for parameter in model.parameters())
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    table = model.model.embed_tokens.weight.numel()
    if objective == "layer_wise":
        assert layer / 2 < max(held) <= layer + table
    else:
        assert max(held) > whole / 2
