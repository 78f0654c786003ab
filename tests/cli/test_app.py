# SPDX-License-Identifier: Apache-2.0
"""The command prunes and evaluates; whatever is wrong is one clear line."""

import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest
from commands import assert_one_error, listing, nm_permute, prune
from helpers import modifier, ours, quantize
from transformers import AutoModelForCausalLM

from nm_permute_plugin._words import file_size
from nm_permute_plugin.cli.demo import METHODS, Budget, run_demo
from nm_permute_plugin.cli.embedded import Parts


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
        rf"{out}: calibrated on 2560 tokens, \d+\.\d minutes, "
        rf"{file_size(bytes_written)}, "
        rf"\d\d\.\d% of the wanda score kept \(\d\d\.\d% without a permutation\), "
        rf"validation loss \d\.\d+ -> \d\.\d+ "
        rf"\(KL divergence from the dense model, nats a token\)"
        rf"(?:; report: {out}/nm_permute/report\.html)?; next: {following}",
        line,
    )
    assert [x for x in listing(tmp_path) if not x.startswith("out")] == ready
    assert_exactly(AutoModelForCausalLM.from_pretrained(out))


def test_prune_takes_no_more_samples_than_asked_for(
    ready: list[str], tmp_path: Path, text_file: Path
) -> None:
    result = prune(tmp_path, "--text", text_file, "--samples", 10)
    assert f"{tmp_path / 'out'}: calibrated on 320 tokens, " in result.stdout


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
    result = prune(tmp_path, "--text", text_file, out=tmp_path)
    assert_one_error(result, "exists and is not an empty folder")
    assert listing(tmp_path) == ready


@pytest.mark.parametrize(
    ("out", "said"), [("dense", "is the"), ("dense/sparse", "lies inside of the")]
)
def test_the_folder_of_the_model_is_one_error(
    ready: list[str], tmp_path: Path, text_file: Path, out: str, said: str
) -> None:
    result = prune(tmp_path, "--text", text_file, out=tmp_path / out)
    assert_one_error(result, f"{said} folder of the dense model")
    assert listing(tmp_path) == ready


def test_all_that_must_fail_is_told_at_once_before_weights_are_read(
    ready: list[str], tmp_path: Path, recipe: Path, text_file: Path
) -> None:
    (tmp_path / "dense" / "model.safetensors").write_bytes(b"not read")
    recipe.write_text(
        ours(batch_size=64)
        + quantize("W4A16")
        + modifier("rotation", "QuIPModifier", ignore=["lm_head"])
    )
    result = prune(tmp_path, "--text", text_file, out=tmp_path)
    assert_one_error(result, "4 things would make this run fail:")
    lines = [line for line in result.stderr.splitlines() if line.startswith("- ")]
    words = ["QuIPModifier", "groups of 128", "batch_size: 64", "not an empty folder"]
    assert len(lines) == 4
    assert all(word in line for word, line in zip(words, lines, strict=True))


def test_several_processes_are_one_error(
    ready: list[str], tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = prune(tmp_path, "--text", text_file)
    assert_one_error(result, "2 processes.*without torchrun")
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
    assert_one_error(result, "the disk of .*small has 33 kB free")
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


@pytest.mark.slow
def test_the_demo_measures_every_method_from_disk(
    trained_checkpoint: Path, tmp_path: Path, chain_rows, words
) -> None:
    # The demo leaves a dense model that is there alone: here a tiny one.
    (tmp_path / "dense").symlink_to(trained_checkpoint)
    parts = Parts(words(chain_rows(40, 32, seed=3)), words(chain_rows(20, 32, seed=55)))
    budget = Budget(rows=30, sequence_length=32, windows=20, steps=3)
    rows = run_demo(tmp_path, parts, budget, "cpu")
    assert [row.method for row in rows] == ["dense", *METHODS]
    by_name = {row.method: row.perplexity for row in rows}
    assert by_name["dense"] == min(by_name.values())
    assert by_name["search"] < by_name["wanda"]
    assert all((Path(row.where) / "config.json").exists() for row in rows)
    stored = json.loads((tmp_path / "results.json").read_text())
    assert [row["perplexity"] for row in stored["rows"]] == list(by_name.values())
    assert stored["budget"]["rows"] == 30
    page = (tmp_path / "report.html").read_text()
    for row in rows[1:]:
        assert f"{row.perplexity:.2f}" in page
        own = Path(row.where, "nm_permute", "report.html").read_text()
        assert f"{row.perplexity:.2f}" in own
    leftovers = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert leftovers == []


COMMANDS = [
    "demo",
    "prune",
    "fields",
    "sample",
    "evaluate",
    "report",
    "verify",
    "spec",
    "convert",
    "adapt",
]


def test_help_names_the_commands() -> None:
    result = nm_permute("--help")
    assert result.exit_code == 0
    assert [x for x in [*COMMANDS, "bench-serve"] if x not in result.stdout] == []


def test_the_version_is_printed() -> None:
    result = nm_permute("--version")
    assert result.exit_code == 0
    assert result.stdout == f"nm-permute-plugin {version('nm-permute-plugin')}\n"


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["prune", "a", "b", "c", "--txt", "d"], "--text"),
        (["prune", "a", "b", "c", "--seqence-length", "8"], "--sequence-length"),
        (["verfy", "a"], "verify"),
        (["--debg", "verify", "a"], "--debug"),
    ],
)
def test_a_misspelt_option_or_command_is_told_the_near_one(
    words: list[str], offered: str
) -> None:
    result = nm_permute(*words)
    assert result.exit_code == 2
    assert re.search(rf"(Possible options:|Did you mean) .?{offered}", result.stderr)


def test_an_adapter_is_told_to_be_merged(ready: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    result = nm_permute("evaluate", folder, "--text", tmp_path / "text.txt")
    assert_one_error(result, "holds a PEFT adapter and no model.*merge_and_unload")
