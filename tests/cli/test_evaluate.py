# SPDX-License-Identifier: Apache-2.0
"""The command ``evaluate``: the perplexity, the gap closed, and one error a mistake."""

import json
import math
import re
from pathlib import Path

import pytest
from click.testing import Result
from commands import assert_one_error, listing, nm_permute, prune
from helpers import TURNS, begin_texts_with, give_template
from loguru import logger

from nm_permute_plugin.evaluation import text
from nm_permute_plugin.evaluation.results import read_evaluations
from nm_permute_plugin.evaluation.text import TextTokenizer


@pytest.fixture
def test_text(tmp_path: Path, chain_rows, words) -> Path:
    path = tmp_path / "test.txt"
    path.write_text(words(chain_rows(20, 32, seed=55)))
    return path


def evaluate(*words: object) -> Result:
    return nm_permute("evaluate", *words, "--sequence-length", 32, "--device", "cpu")


def figures(result: Result) -> list[float]:
    return [float(x) for x in re.findall(r"perplexity (\d+\.\d+)", result.stdout)]


def test_evaluate_prints_the_perplexity(
    trained_checkpoint: Path, test_text: Path
) -> None:
    result = evaluate(trained_checkpoint, "--text", test_text)
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    assert line.startswith(f"{trained_checkpoint}: perplexity ")
    assert line.endswith("(windows of 32 tokens, 620 tokens predicted)")
    several = evaluate(trained_checkpoint, "--text", test_text, "--batch-size", 7)
    assert figures(several) == figures(result)


@pytest.mark.slow
def test_evaluate_prints_the_gap_that_a_search_closes(
    trained_checkpoint: Path,
    test_text: Path,
    recipe: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "dense").symlink_to(trained_checkpoint)
    assert prune(tmp_path, "--text", text_file).exit_code == 0
    text = recipe.read_text().replace("method: search\n", "method: identity\n")
    recipe.write_text(text.replace("      search: {rounds: 2}\n", ""))
    base = tmp_path / "base"
    assert prune(tmp_path, "--text", text_file, out=base).exit_code == 0
    result = evaluate(
        tmp_path / "out", "--text", test_text, "--base", base,
        "--dense", trained_checkpoint,
    )  # fmt: skip
    ours, identity, dense = figures(result)
    assert dense < ours < identity
    gap = (math.log(identity) - math.log(ours)) / (math.log(identity) - math.log(dense))
    printed = re.fullmatch(r"gap closed: (-?\d+\.\d)%", result.stdout.splitlines()[-1])
    assert printed
    # The perplexities are printed to two digits.
    assert float(printed[1]) / 100 == pytest.approx(gap, abs=0.02)


def test_evaluate_keeps_its_results_beside_the_checkpoint(
    ready: list[str], text_file: Path, test_text: Path, tmp_path: Path
) -> None:
    assert prune(tmp_path, "--text", text_file, "--text", text_file).exit_code == 0
    out, dense = tmp_path / "out", tmp_path / "dense"
    before = (out / "README.md").read_text()
    assert evaluate(out, "--text", test_text).exit_code == 0
    (first,) = read_evaluations(out).texts
    assert first.text == test_text.name
    assert first.form == "windows of 32 tokens"
    assert first.tokens == 620
    assert first.divergence is None
    assert (out / "README.md").read_text() == before
    result = evaluate(out, "--text", test_text, "--dense", dense, "--card")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == f"added to {out / 'README.md'}"
    (second,) = read_evaluations(out).texts
    assert second.perplexity == pytest.approx(first.perplexity, rel=1e-5)
    assert second.divergence is not None
    shown = (
        f"KL divergence {second.divergence:.4f} nats a token, top-1 agreement "
        f"{second.agreement:.2%}, flips {second.flips:.2%}"
    )
    assert f"beside the dense model: {shown}" in result.stdout.splitlines()
    row = (
        f"| {test_text.name} | windows of 32 tokens | 620 | {second.perplexity:.2f} | "
        f"{second.dense:.2f} |  | {second.divergence:.4f} | {second.agreement:.2%} | "
        f"{second.flips:.2%} |"
    )
    assert row in (out / "README.md").read_text().splitlines()
    assert nm_permute("verify", out).exit_code == 0


def test_evaluate_writes_nothing_beside_other_models(
    ready: list[str], test_text: Path, tmp_path: Path
) -> None:
    dense = tmp_path / "dense"
    before = listing(dense)
    assert evaluate(dense, "--text", test_text).exit_code == 0
    refused = evaluate(dense, "--text", test_text, "--card")
    assert_one_error(refused, r"README\.md has no place")
    assert refused.stdout == ""  # before anything is measured
    assert listing(dense) == before


def test_evaluate_refuses_a_dense_model_of_another_vocabulary(
    trained_checkpoint: Path, tiny_checkpoint, test_text: Path
) -> None:
    other = tiny_checkpoint(vocab_size=64)
    result = evaluate(trained_checkpoint, "--text", test_text, "--dense", other)
    assert_one_error(result, "one of 48 tokens and the dense model one of 64")
    begin_texts_with(tiny_checkpoint(), "w03")
    result = evaluate(trained_checkpoint, "--text", test_text, "--dense", other)
    assert_one_error(result, "turn the text into different tokens")


def test_evaluate_says_when_there_is_no_gap(
    trained_checkpoint: Path, tiny_checkpoint, test_text: Path
) -> None:
    result = evaluate(
        tiny_checkpoint(), "--text", test_text, "--base", trained_checkpoint,
        "--dense", trained_checkpoint,
    )  # fmt: skip
    assert_one_error(result, "no gap to close")
    assert len(figures(result)) == 3


def test_evaluate_needs_the_dense_model_for_the_gap(
    trained_checkpoint: Path, test_text: Path
) -> None:
    base = ["--base", trained_checkpoint]
    result = evaluate(trained_checkpoint, "--text", test_text, *base)
    assert_one_error(result, "--base needs --dense")
    base += ["--dense", trained_checkpoint]
    result = evaluate(trained_checkpoint, "--text", test_text, *base)
    assert_one_error(result, "--base .* is the checkpoint itself")


def test_evaluate_compares_with_the_dense_model_alone(
    trained_checkpoint: Path, tiny_checkpoint, test_text: Path
) -> None:
    result = evaluate(
        tiny_checkpoint(), "--text", test_text, "--dense", trained_checkpoint
    )
    assert result.exit_code == 0, result.output
    ours, dense = figures(result)
    last = result.stdout.splitlines()[-1]
    ratio = re.fullmatch(r"(\d+\.\d{3}) times the dense model's perplexity", last)
    assert ratio
    assert float(ratio[1]) == pytest.approx(ours / dense, rel=0.01)


def test_evaluate_tokenises_a_text_once(
    ready: list[str],
    text_file: Path,
    test_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert prune(tmp_path, "--text", text_file).exit_code == 0
    read: list[Path] = []

    class Counted(TextTokenizer):
        def __init__(self, folder: str) -> None:
            read.append(Path(folder))
            super().__init__(folder)

    monkeypatch.setattr(text, "TextTokenizer", Counted)
    out, dense = tmp_path / "out", tmp_path / "dense"
    result = evaluate(out, "--text", test_text, "--dense", dense, "--card")
    assert result.exit_code == 0, result.output
    assert read == [out, dense]


@pytest.mark.parametrize("which", ["checkpoint", "base", "dense"])
def test_evaluate_refuses_a_folder_that_is_no_checkpoint(
    trained_checkpoint: Path, tiny_checkpoint, test_text, tmp_path: Path, which: str
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    folders = dict.fromkeys(("checkpoint", "base", "dense"), trained_checkpoint)
    folders["base"] = tiny_checkpoint()
    folders[which] = empty
    result = evaluate(
        folders["checkpoint"], "--text", test_text, "--base", folders["base"],
        "--dense", folders["dense"],
    )  # fmt: skip
    assert_one_error(result, r"empty holds no checkpoint \(no config\.json\)")
    assert figures(result) == []


def test_evaluate_refuses_a_checkpoint_without_weights(
    tiny_checkpoint, test_text: Path
) -> None:
    folder = tiny_checkpoint()
    (folder / "model.safetensors").unlink()
    assert_one_error(evaluate(folder, "--text", test_text), r"dense")


def test_evaluate_needs_text_that_fills_a_window(
    trained_checkpoint: Path, tmp_path: Path
) -> None:
    assert_one_error(evaluate(trained_checkpoint), "give text to evaluate on")
    short, empty = tmp_path / "short.txt", tmp_path / "empty.txt"
    short.write_text("w01 w02 w03")
    empty.touch()
    result = evaluate(trained_checkpoint, "--text", short)
    assert_one_error(result, "has 3 tokens, less than one window of 32")
    assert_one_error(evaluate(trained_checkpoint, "--text", empty), "is empty")


def test_evaluate_refuses_batches_of_nothing(
    trained_checkpoint: Path, test_text: Path
) -> None:
    result = evaluate(trained_checkpoint, "--text", test_text, "--batch-size", 0)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert "--batch-size" in result.stderr


def test_windows_begin_as_the_tokenizer_begins_a_text(
    tiny_checkpoint, test_text: Path
) -> None:
    folder = tiny_checkpoint()
    before = evaluate(folder, "--text", test_text)
    begin_texts_with(folder, "w03")
    began = evaluate(folder, "--text", test_text)
    assert began.exit_code == 0, began.output
    assert (
        "(windows of 32 tokens that begin with w03, 620 tokens predicted)"
        in began.stdout
    )
    stream = evaluate(folder, "--text", test_text, "--stream")
    said = "(one stream that begins with w03 in windows of 32 tokens, 620 tokens predicted)"
    assert said in stream.stdout
    values = [figures(result) for result in (before, began, stream)]
    assert values[0] != values[1] != values[2]


def test_a_stream_of_a_tokenizer_that_adds_nothing_is_no_other_measure(
    trained_checkpoint: Path, test_text: Path
) -> None:
    plain = evaluate(trained_checkpoint, "--text", test_text)
    stream = evaluate(trained_checkpoint, "--text", test_text, "--stream")
    assert "(one stream in windows of 32 tokens, 620 tokens predicted)" in stream.stdout
    assert figures(plain) == figures(stream)


def test_the_card_says_how_the_text_was_cut(
    ready: list[str], text_file: Path, test_text: Path, tmp_path: Path
) -> None:
    assert prune(tmp_path, "--text", text_file).exit_code == 0
    result = evaluate(tmp_path / "out", "--text", test_text, "--card", "--stream")
    assert result.exit_code == 0, result.output
    begin = f"| {test_text.name} | one stream in windows of 32 tokens | 620 | "
    assert begin in (tmp_path / "out" / "README.md").read_text()


def test_conversations_are_measured_one_by_one(tiny_checkpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint()
    give_template(folder, TURNS)
    file = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "w20"}, {"role": "bot", "content": "w30 w31"}]
    file.write_text(json.dumps({"messages": turns}) + "\n" + '{"text": "w05 w06"}\n')
    result = evaluate(folder, "--text", file)
    assert result.exit_code == 0, result.output
    assert (
        "(2 documents in windows of up to 32 tokens, 5 tokens predicted)"
        in result.stdout
    )
    refused = evaluate(folder, "--text", file, "--stream")
    assert_one_error(refused, r"--stream is for plain text, but .*chat\.jsonl line 1")
    file.write_text('{"text": "w05 w06"}\n{"prompt": "w05"}\n')
    refused = evaluate(folder, "--text", file)
    assert_one_error(refused, r"chat\.jsonl line 2 holds prompt, but no messages")


def test_the_default_window_is_what_the_model_can_read(
    older_checkpoint, test_text: Path
) -> None:
    folder = older_checkpoint(positions=48)
    words = ["evaluate", folder, "--text", test_text, "--device", "cpu"]
    result = nm_permute(*words)
    assert result.exit_code == 0, result.output
    assert "(windows of 48 tokens, 611 tokens predicted)" in result.stdout
    refused = nm_permute(*words, "--sequence-length", 49)
    assert_one_error(
        refused,
        r"48 learned positions and cannot read rows of 49 tokens: give --sequence-length "
        "48 or less",
    )


def test_windows_beyond_rotary_positions_are_warned_of(
    trained_checkpoint: Path, test_text: Path
) -> None:
    words = ["evaluate", trained_checkpoint, "--text", test_text, "--device", "cpu"]
    said: list[str] = []
    sink = logger.add(said.append, level="WARNING")
    result = nm_permute(*words, "--sequence-length", 80)
    assert result.exit_code == 0, result.output
    assert "(windows of 80 tokens, 632 tokens predicted)" in result.stdout
    (warning,) = said
    assert "has 64 positions, and rows of 80 tokens go beyond" in warning
    default = nm_permute(*words)
    logger.remove(sink)
    assert said == [warning]
    assert "(windows of 64 tokens, 630 tokens predicted)" in default.stdout
