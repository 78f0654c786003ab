# SPDX-License-Identifier: Apache-2.0
"""The command prunes and evaluates; whatever is wrong is one clear line."""

import json
import math
import re
from importlib.metadata import version
from pathlib import Path

import pytest
from click.testing import Result
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from nm_permute_plugin.cli.app import app
from nm_permute_plugin.cli.demo import METHODS, Budget, run_demo
from nm_permute_plugin.cli.embedded import Parts
from nm_permute_plugin.evaluation import perplexity
from nm_permute_plugin.evaluation.perplexity import tokenize


def command(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def prune(tmp_path: Path, *more: object, out: Path | None = None) -> Result:
    """``prune`` of the model, the recipe and the text of the fixtures."""
    paths = [tmp_path / "dense", tmp_path / "recipe.yaml", out or tmp_path / "out"]
    length = ["--sequence-length", 32, "--device", "cpu"]
    return command("prune", *paths, *length, *more)


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def assert_one_error(result: Result, message: str) -> None:
    """The command failed with one line of ``error: ...``, not with a traceback."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    # Progress bars end in carriage returns.
    errors = re.findall(r"(?:^|[\r\n]) *(error: [^\r\n]*)", result.stderr)
    assert len(errors) == 1, result.stderr
    assert re.search(message, errors[0]), errors[0]
    assert "Traceback" not in result.output


@pytest.fixture
def ready(tiny_checkpoint, recipe: Path, text_file: Path, tmp_path: Path) -> list[str]:
    """Model, recipe and text lie in ``tmp_path``; what is there now."""
    tiny_checkpoint()
    return listing(tmp_path)


def test_prune_writes_a_checkpoint_and_nothing_beside_it(
    ready: list[str], tmp_path: Path, text_file: Path, assert_exactly
) -> None:
    result = prune(tmp_path, "--text", text_file, "--text", text_file)
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    # 2 x 1280 tokens fill 80 rows
    bytes_written = sum(
        path.stat().st_size for path in out.rglob("*") if path.is_file()
    )
    (line,) = result.stdout.splitlines()
    following = (
        f"nm-permute evaluate {out} --text TEST.txt --dense {tmp_path / 'dense'}"
    )
    assert re.fullmatch(
        rf"{out}: 2560 tokens, \d+\.\d minutes, {bytes_written / 1e6:.1f} MB; "
        rf"next: {following}",
        line,
    )
    assert [x for x in listing(tmp_path) if not x.startswith("out")] == ready
    assert_exactly(AutoModelForCausalLM.from_pretrained(out))


def test_prune_takes_no_more_samples_than_asked_for(
    ready: list[str], tmp_path: Path, text_file: Path
) -> None:
    result = prune(tmp_path, "--text", text_file, "--samples", 10)
    assert f"{tmp_path / 'out'}: 320 tokens, " in result.stdout


def test_prune_needs_text(ready: list[str], tmp_path: Path) -> None:
    assert_one_error(prune(tmp_path), "give calibration text: --text FILE")
    assert listing(tmp_path) == ready


def test_a_device_that_is_not_there_is_told_before_any_work(
    ready: list[str], tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    result = prune(tmp_path, "--text", text_file, "--device", "cuda")
    assert_one_error(result, "--device cuda: torch finds 0 CUDA devices here")
    assert listing(tmp_path) == ready


@pytest.mark.parametrize("missing", ["dense", "recipe.yaml"])
def test_prune_names_what_is_missing(
    ready: list[str], tmp_path: Path, text_file: Path, missing: str
) -> None:
    (tmp_path / missing).rename(tmp_path / "elsewhere")
    result = prune(tmp_path, "--text", text_file)
    assert_one_error(result, rf"{re.escape(str(tmp_path / missing))} does not exist")
    assert not (tmp_path / "out").exists()


def bad_text(tmp_path: Path, content: bytes | None) -> Path:
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    return path


TEXTS = {
    "missing": (None, r"text file .*bad\.txt does not exist"),
    "empty": (b"", r"text file .*bad\.txt is empty"),
    "blank": (b" \n\n\t ", r"text file .*bad\.txt is empty"),
    "binary": (b"\xff\xfe\x00w1", r"text file .*bad\.txt is no UTF-8"),
    "too short": (b"w01 w02 w03", "has 3 tokens, fewer than two rows of 32"),
}


@pytest.mark.parametrize(("content", "message"), TEXTS.values(), ids=TEXTS)
def test_bad_text_is_one_error_and_nothing_is_written(
    ready: list[str], tmp_path: Path, content: bytes | None, message: str
) -> None:
    text = bad_text(tmp_path, content)
    before = listing(tmp_path)
    assert_one_error(prune(tmp_path, "--text", text), message)
    assert listing(tmp_path) == before


def test_a_folder_of_text_is_one_error(ready: list[str], tmp_path: Path) -> None:
    assert_one_error(prune(tmp_path, "--text", tmp_path), "text file")


def test_a_folder_that_is_not_empty_is_one_error(
    ready: list[str], tmp_path: Path, text_file: Path
) -> None:
    result = prune(tmp_path, "--text", text_file, out=tmp_path / "dense")
    assert_one_error(result, "dense exists and is not an empty folder")
    assert listing(tmp_path) == ready


def test_a_folder_that_cannot_be_made_is_one_error(
    ready: list[str], tmp_path: Path, text_file: Path
) -> None:
    # Root may write anywhere, but not below a regular file.
    result = prune(tmp_path, "--text", text_file, out=text_file / "out")
    assert_one_error(result, r"cannot write to .*text\.txt")
    assert listing(tmp_path) == ready


def test_a_full_disk_is_one_error(
    ready: list[str], tmp_path: Path, text_file: Path, full_disk: Path
) -> None:
    result = prune(tmp_path, "--text", text_file, out=full_disk / "out")
    assert_one_error(result, "No space left|os error 28")
    assert list(full_disk.iterdir()) == []


def test_a_foreign_tokenizer_is_one_error_and_leaves_nothing(
    ready: list[str], tmp_path: Path
) -> None:
    tokenizer = tmp_path / "dense" / "tokenizer.json"
    stored = json.loads(tokenizer.read_text())
    stored["model"]["vocab"]["strange"] = 48
    tokenizer.write_text(json.dumps(stored))
    text = tmp_path / "strange.txt"
    text.write_text("w03 strange " * 300)
    before = listing(tmp_path)
    result = prune(tmp_path, "--text", text)
    assert_one_error(result, "token 48, but the model knows only 48 tokens")
    assert listing(tmp_path) == before


def test_a_recipe_of_others_is_one_error(
    ready: list[str], tmp_path: Path, recipe: Path, text_file: Path
) -> None:
    recipe.write_text("prune_stage: {}\n")
    result = prune(tmp_path, "--text", text_file)
    assert_one_error(result, "holds no LearnablePermutationModifier")
    assert listing(tmp_path) == ready


def test_a_wrong_spec_is_one_error_and_leaves_nothing(
    ready: list[str], tmp_path: Path, recipe: Path, text_file: Path
) -> None:
    from nm_permute_plugin.specs.architectures import LLAMA

    spec = json.dumps({**LLAMA, "model.norm.weight": "_"})
    recipe.write_text(recipe.read_text() + f"      spec: {spec}\n")
    result = prune(tmp_path, "--text", text_file)
    assert_one_error(result, "the permutation spec is wrong")
    assert listing(tmp_path) == ready


@pytest.mark.parametrize(
    "option", ["--samples", "--sequence-length"], ids=["samples", "length"]
)
@pytest.mark.parametrize("value", [0, -1])
def test_numbers_that_make_no_sense_are_refused(
    ready: list[str], tmp_path: Path, text_file: Path, option: str, value: int
) -> None:
    result = prune(tmp_path, "--text", text_file, option, value)
    assert result.exit_code in (1, 2)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert option in result.stderr
    assert listing(tmp_path) == ready


@pytest.fixture
def test_text(tmp_path: Path, chain_rows, words) -> Path:
    path = tmp_path / "test.txt"
    path.write_text(words(chain_rows(20, 32, seed=55)))
    return path


def evaluate(*words: object) -> Result:
    return command("evaluate", *words, "--sequence-length", 32, "--device", "cpu")


def figures(result: Result) -> list[float]:
    return [float(x) for x in re.findall(r"perplexity (\d+\.\d+)", result.stdout)]


def test_evaluate_prints_the_perplexity(
    trained_checkpoint: Path, test_text: Path
) -> None:
    result = evaluate(trained_checkpoint, "--text", test_text)
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    assert line.startswith(f"{trained_checkpoint}: perplexity ")
    assert line.endswith("(windows of 32 tokens, 640 tokens)")
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


def test_evaluate_puts_its_row_into_the_card(
    ready: list[str], text_file: Path, test_text: Path, tmp_path: Path
) -> None:
    assert prune(tmp_path, "--text", text_file, "--text", text_file).exit_code == 0
    out, dense = tmp_path / "out", tmp_path / "dense"
    before = (out / "README.md").read_text()
    assert evaluate(out, "--text", test_text).exit_code == 0
    assert (out / "README.md").read_text() == before
    result = evaluate(out, "--text", test_text, "--card")
    assert result.exit_code == 0, result.output
    found = re.search(r"perplexity ([\d.]+) ", result.stdout)
    assert found
    after = (out / "README.md").read_text()
    assert f"| {test_text.name} | 32 | " in after
    assert f" | {found[1]} |  |" in after
    assert_one_error(
        evaluate(dense, "--text", test_text, "--card"), r"README\.md has no place"
    )


def test_evaluate_says_when_there_is_no_gap(
    trained_checkpoint: Path, test_text: Path
) -> None:
    result = evaluate(
        trained_checkpoint, "--text", test_text, "--base", trained_checkpoint,
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

    def counted(folder: str, text: str) -> Tensor:
        read.append(Path(folder))
        return tokenize(folder, text)

    monkeypatch.setattr(perplexity, "tokenize", counted)
    out, dense = tmp_path / "out", tmp_path / "dense"
    result = evaluate(out, "--text", test_text, "--dense", dense, "--card")
    assert result.exit_code == 0, result.output
    assert read == [out, dense]


@pytest.mark.parametrize("which", ["checkpoint", "base", "dense"])
def test_evaluate_refuses_a_folder_that_is_no_checkpoint(
    trained_checkpoint: Path, test_text: Path, tmp_path: Path, which: str
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    folders = dict.fromkeys(("checkpoint", "base", "dense"), trained_checkpoint)
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
    short = bad_text(tmp_path, b"w01 w02 w03")
    result = evaluate(trained_checkpoint, "--text", short)
    assert_one_error(result, "has 3 tokens, less than one window of 32")
    empty = bad_text(tmp_path, b"")
    assert_one_error(evaluate(trained_checkpoint, "--text", empty), "is empty")


def test_evaluate_refuses_batches_of_nothing(
    trained_checkpoint: Path, test_text: Path
) -> None:
    result = evaluate(trained_checkpoint, "--text", test_text, "--batch-size", 0)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert "--batch-size" in result.stderr


@pytest.mark.slow
def test_the_demo_measures_every_method_from_disk(
    trained_checkpoint: Path, tmp_path: Path, chain_rows, words
) -> None:
    # The demo leaves a dense model that is there alone: here a tiny one.
    (tmp_path / "dense").symlink_to(trained_checkpoint)
    parts = Parts(words(chain_rows(40, 32, seed=3)), words(chain_rows(20, 32, seed=55)))
    budget = Budget(rows=30, sequence_length=32, windows=20, steps=3, batch_size=4)
    rows = run_demo(tmp_path, parts, budget, "cpu")
    assert [row.method for row in rows] == ["dense", *METHODS]
    by_name = {row.method: row.perplexity for row in rows}
    assert by_name["dense"] == min(by_name.values())
    assert by_name["search"] < by_name["wanda"]
    assert all((Path(row.where) / "config.json").exists() for row in rows)
    stored = json.loads((tmp_path / "results.json").read_text())
    assert [row["perplexity"] for row in stored["rows"]] == list(by_name.values())
    assert stored["budget"]["rows"] == 30
    leftovers = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert leftovers == []


COMMANDS = ["demo", "prune", "sample", "evaluate", "verify", "spec", "convert"]


def test_help_names_the_commands() -> None:
    result = command("--help")
    assert result.exit_code == 0
    assert [x for x in [*COMMANDS, "bench-serve"] if x not in result.stdout] == []


def test_the_version_is_printed() -> None:
    result = command("--version")
    assert result.exit_code == 0
    assert result.stdout == f"nm-permute-plugin {version('nm-permute-plugin')}\n"
