# SPDX-License-Identifier: Apache-2.0
"""The benchmark of true shapes learns on a shape, here a tiny one, and says its cost."""

import re
from itertools import islice

import pytest
import torch

import shapes

TINY = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": True,
}


def test_a_shape_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(shapes.SHAPES, "smollm2-135m", TINY)
    words = "smollm2-135m --layers 2 --rows 2 --sequence-length 8 --steps 1 --search"
    shapes.main([*words.split(), "--device", "cpu"])
    out = capsys.readouterr().out
    assert "smollm2-135m, 2 layers" in out
    assert "2 x 8 tokens" in out
    assert "search over 5 spaces" in out
    for epoch in ("first epoch", "later epochs"):
        assert re.search(rf"a step of the {epoch}: \d+\.\d+ s", out)
    assert torch.get_default_dtype() == torch.float32


def test_a_batch_comes_anew_so_often_and_then_stays() -> None:
    batch = {"input_ids": torch.zeros(1, 4, dtype=torch.long)}
    data = shapes.TimedData([batch], [batch], new=3)
    seen = [step["input_ids"] for step in islice(data.batches(0), 6)]
    assert len({ids.data_ptr() for ids in seen}) == 4
    assert len({ids.data_ptr() for ids in seen[3:]}) == 1
    assert len(data.times) == 6
    data.times[:] = [0, 10, 11, 12, 13, 100]
    assert data.step(2, 4) == 1


@pytest.mark.parametrize(
    ("name", "billions"),
    [("smollm2-135m", 0.135), ("llama-3.2-1b", 1.236), ("llama-2-7b", 6.738)],
)
def test_shapes_have_as_many_weights_as_they_say(name: str, billions: float) -> None:
    words = [name, "--sequence-length", "8", "--device", "meta"]
    model = shapes.model_of(shapes.arguments(words))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e9 == pytest.approx(billions, abs=6e-4)
