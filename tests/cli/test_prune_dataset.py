# SPDX-License-Identifier: Apache-2.0
"""``prune --dataset``: data as people have them, from a file to a checkpoint."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from commands import assert_one_error, listing, prune
from helpers import TURNS, give_template
from safetensors.torch import load_file
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

from nm_permute_plugin.checkpoint.verify import verify


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library ``datasets`` keeps what it has read; here for one test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def texts(chain_rows, words, tmp_path: Path) -> list[str]:
    """Twenty texts of 32 tokens."""
    return [words(row) for row in chain_rows(20, 32, seed=3)]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def test_two_data_sets_calibrate(
    ready: list[str], texts: list[str], tmp_path: Path
) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.parquet"
    first.write_text("\n".join(json.dumps({"story": text}) for text in texts))
    datasets.Dataset.from_dict({"story": texts, "n": range(20)}).to_parquet(second)
    given = ["--dataset", f"{first}=3", "--dataset", second]
    refused = prune(tmp_path, *given, "--samples", 16)
    assert_one_error(refused, r"a\.jsonl line 1 holds story, but no .* --text-column")
    assert not (tmp_path / "out").exists()
    result = prune(tmp_path, *given, "--samples", 16, "--text-column", "story")
    assert result.exit_code == 0, result.output
    assert f"out: calibrated on {16 * 32} tokens," in result.stdout
    assert verify(tmp_path / "out").good


def test_the_same_text_gives_the_same_weights_in_every_kind_of_file(
    ready: list[str], texts: list[str], tmp_path: Path
) -> None:
    lines, table = tmp_path / "a.jsonl", tmp_path / "a.csv"
    lines.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    datasets.Dataset.from_dict({"text": texts}).to_csv(table)
    given = {"text": ["--text", lines], "csv": ["--dataset", table]}
    for name, words in given.items():
        result = prune(tmp_path, *words, out=tmp_path / name)
        assert result.exit_code == 0, result.output
    one, other = weights(tmp_path / "text"), weights(tmp_path / "csv")
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def chat_file(folder: Path, texts: list[str]) -> Path:
    """Conversations in ShareGPT's form: every text asks, and the next one answers."""
    lines = [
        {
            "conversations": [
                {"from": "human", "value": asked[:40]},
                {"from": "gpt", "value": answered[:79]},
            ]
        }
        for asked, answered in zip(texts, [*texts[1:], texts[0]], strict=True)
    ]
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "chat.jsonl"


def test_answers_alone_calibrate(
    ready: list[str], texts: list[str], tmp_path: Path
) -> None:
    give_template(
        tmp_path / "dense", TURNS + "{% if add_generation_prompt %}w11 {% endif %}"
    )
    given = ["--dataset", chat_file(tmp_path, texts), "--sequence-length", 48]
    for name, more in (("all", []), ("answers", ["--answers-only"])):
        result = prune(tmp_path, *given, *more, out=tmp_path / name)
        assert result.exit_code == 0, result.output
    # 10 words asked, 20 answered, and who says them.
    assert (
        f"answers: calibrated on {20 * 32} tokens, {20 * 20} of them the assistant's,"
        in result.stdout
    )
    whole, answers = weights(tmp_path / "all"), weights(tmp_path / "answers")
    assert any(not torch.equal(whole[name], answers[name]) for name in whole)


def test_answers_of_a_model_of_experts_are_refused_before_the_work(
    ready: list[str], texts: list[str], tmp_path: Path
) -> None:
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    size |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=48, **size))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dense")
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "dense")
    given = ["--dataset", chat_file(tmp_path, texts), "--answers-only"]
    message = "Mixtral.* deals its tokens to experts, .* leave out --answers-only"
    assert_one_error(prune(tmp_path, *given), message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["--dataset", "a.txt", "--text", "a.txt"],
            "are two ways to say the same",
        ),
        (["--dataset", "a.txt", "--images", "."], "are for different models"),
        (
            ["--text", "a.txt", "--text-column", "x"],
            "--text-column is for --dataset, and",
        ),
        (["--images", ".", "--answers-only"], "for conversations, not for --images"),
        (
            ["--text", "a.txt", "--answers-only"],
            "for conversations, but there is plain",
        ),
        (["--dataset", "none.jsonl"], "none.jsonl does not exist; give a file"),
        (["--dataset", "a.txt=0"], "0 behind = is no positive number"),
        (["--dataset", "org/name"], "the Hugging Face hub cannot be reached"),
        (["--dataset", "bad.parquet"], "bad.parquet cannot be read: "),
        (
            ["--dataset", "b.csv"],
            "no column messages, .*; its columns are story, n: name",
        ),
        (
            ["--dataset", "b.csv", "--text-column", "n"],
            "b.csv row 0: n is a int, neither",
        ),
        (
            ["--dataset", "a.txt=1", "--dataset", "a.txt=0.0001"],
            "is less than one; give",
        ),
    ],
)
def test_what_does_not_go_is_one_line_before_the_work(
    given: list[str],
    message: str,
    ready: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("w05 " * 400)
    Path("b.csv").write_text("story,n\nw05,1\n")
    Path("bad.parquet").write_bytes(b"PAR1 but damaged")
    before = listing(tmp_path)
    result = prune(tmp_path, *given)
    assert_one_error(result, message)
    assert "Failed to read" not in result.stderr  # what the library says of it as well
    assert listing(tmp_path) == before
