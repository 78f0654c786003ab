# SPDX-License-Identifier: Apache-2.0
"""A model's own text is as long as was asked for, and the same for the same seed."""

from pathlib import Path

import pytest
from commands import assert_one_error, nm_permute
from helpers import begin_texts_with
from transformers import AutoTokenizer
from typer.testing import CliRunner

from nm_permute_plugin.cli.app import app
from nm_permute_plugin.cli.sample import sample_text


@pytest.fixture
def model(tiny_checkpoint) -> Path:
    return tiny_checkpoint()


def sample(model: Path, **changes: object) -> list[str]:
    defaults = {"rows": 5, "tokens": 20, "start": None, "seed": 0, "batch_size": 2}
    return sample_text(model, **{**defaults, **changes}, device="cpu")


def test_texts_are_as_many_and_as_long_as_was_asked_for(model: Path) -> None:
    texts = sample(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert [len(tokenizer(text).input_ids) for text in texts] == [20] * 5
    assert len(set(texts)) == 5
    special = set(tokenizer.all_special_tokens)
    assert not special & {word for text in texts for word in text.split()}


def test_the_seed_decides(model: Path) -> None:
    assert sample(model) == sample(model)
    assert sample(model) != sample(model, seed=1)


def test_a_start_is_one_token(model: Path) -> None:
    with pytest.raises(ValueError, match=r"is 2 tokens of this tokenizer, not one"):
        sample(model, start="t1 t2")


def test_the_command_writes_a_new_file(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "own.txt"
    words = ["sample", model, out, "--rows", 3, "--tokens", 8, "--device", "cpu"]
    first = CliRunner().invoke(app, [str(word) for word in words])
    assert first.exit_code == 0, first.output
    assert f"{out}: 3 texts of 8 tokens; next: nm-permute prune " in first.output
    assert len(out.read_text().split("\n\n")) == 3
    again = CliRunner().invoke(app, [str(word) for word in words])
    assert again.exit_code == 1
    assert "exists; give a new file" in again.stderr


def test_the_default_text_is_as_long_as_the_model_can_read(
    older_checkpoint, tmp_path: Path
) -> None:
    folder, out = older_checkpoint(positions=48), tmp_path / "own.txt"
    words = ["sample", folder, out, "--rows", 2, "--device", "cpu"]
    refused = nm_permute(*words, "--tokens", 49)
    assert_one_error(refused, "48 learned positions .* give --tokens 48 or less")
    assert not out.exists()
    result = nm_permute(*words)
    assert result.exit_code == 0, result.output
    assert f"{out}: 2 texts of 48 tokens" in result.stdout


def test_a_text_begins_as_the_tokenizer_begins_one(model: Path) -> None:
    assert sample(model) == sample(
        model, start="w02"
    )  # the end of text: there is no other
    begin_texts_with(model, "w07")
    assert sample(model) == sample(model, start="w07")
    assert sample(model) != sample(model, start="w02")
