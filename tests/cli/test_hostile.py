# SPDX-License-Identifier: Apache-2.0
"""A hostile or damaged folder: nothing of it is run, and one line says which file it is."""

import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from commands import assert_one_error, listing, nm_permute, prune
from safetensors.torch import load_file, save_file

EVIL = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class EvilConfig(LlamaConfig):
    model_type = "evil"
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
class EvilProcessor:
    pass
"""
DEEP = '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"
ENDLESS = r"re:((.|\w)+)+\d\d$"


@pytest.fixture
def dense(ready: list[str], tmp_path: Path) -> Path:
    """The folder of the model, beside recipe and text."""
    return tmp_path / "dense"


@pytest.fixture
def answering_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A person, or ``yes |``, who would say y to any question."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")


@pytest.fixture
def with_code(dense: Path, tmp_path: Path, answering_yes) -> Path:
    """The folder, and code in it that leaves a file ``mark`` when it is run."""
    code = EVIL.format(mark=str(tmp_path / "mark"))
    (dense / "evil.py").write_text(code)
    return dense


def change(file: Path, **fields: object) -> None:
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(known | fields))


def run(command: str, folder: Path, text: Path):
    if command == "prune":
        return prune(folder.parent, "--text", text)
    if command == "sample":
        out = folder.parent / "own.txt"
        return nm_permute("sample", folder, out, "--rows", 2, "--device", "cpu")
    return nm_permute("evaluate", folder, "--text", text, "--device", "cpu")


@pytest.mark.parametrize("command", ["prune", "evaluate", "sample"])
@pytest.mark.parametrize("place", ["config", "tokenizer"])
def test_code_beside_a_model_is_never_run(
    with_code: Path, tmp_path: Path, text_file: Path, command: str, place: str
) -> None:
    if place == "config":
        reference = {"AutoConfig": "evil.EvilConfig"}
        change(with_code / "config.json", model_type="evil", auto_map=reference)
    else:
        reference = {"AutoTokenizer": [None, "evil.EvilTokenizer"]}
        file = with_code / "tokenizer_config.json"
        change(file, tokenizer_class="EvilTokenizer", auto_map=reference)
    result = run(command, with_code, text_file)
    assert_one_error(
        result, "dense wants code of its own to be run, which is never run"
    )
    assert not (tmp_path / "mark").exists()
    assert not (tmp_path / "out").exists()


def test_a_spec_never_runs_code(with_code: Path, tmp_path: Path) -> None:
    reference = {"AutoConfig": "evil.EvilConfig"}
    change(with_code / "config.json", model_type="evil", auto_map=reference)
    assert_one_error(nm_permute("spec", with_code), "wants code of its own")
    assert not (tmp_path / "mark").exists()


class _Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("content", ["hostile", "damaged"])
def test_pickled_weights_are_not_run(
    dense: Path, tmp_path: Path, text_file: Path, content: str
) -> None:
    (dense / "model.safetensors").unlink()
    weights = dense / "pytorch_model.bin"
    if content == "hostile":
        torch.save({"x": _Evil(tmp_path / "mark")}, weights)
    else:
        weights.write_bytes(b"hello" * 100)
    for command in ("prune", "evaluate"):
        result = run(command, dense, text_file)
        assert_one_error(result, r"pytorch_model\.bin: these pickled weights")
    assert not (tmp_path / "mark").exists()


def test_pickled_weights_that_hold_tensors_are_read(
    dense: Path, tmp_path: Path, text_file: Path
) -> None:
    torch.save(load_file(dense / "model.safetensors"), dense / "pytorch_model.bin")
    (dense / "model.safetensors").unlink()
    result = prune(tmp_path, "--text", text_file)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("command", ["prune", "evaluate"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_json_that_is_nested_deeply_is_one_error(
    dense: Path, text_file: Path, command: str, name: str
) -> None:
    (dense / name).write_text(DEEP)
    message = rf"{name}.*(maximum recursion|is no JSON)"
    assert_one_error(run(command, dense, text_file), message)


def test_a_recipe_that_is_nested_deeply_is_one_error(
    dense: Path, tmp_path: Path, recipe: Path, text_file: Path
) -> None:
    recipe.write_text("a: " + "[" * 5000 + "]" * 5000)
    assert_one_error(prune(tmp_path, "--text", text_file), r"recipe\.yaml")


@pytest.mark.parametrize(
    ("entry", "message"),
    [("re:.*[proj", "'re:.*\\[proj' is no regular expression"), (ENDLESS, "repeats")],
    ids=["broken", "endless"],
)
def test_a_bad_pattern_in_a_recipe_is_one_error(
    dense: Path, tmp_path: Path, recipe: Path, text_file: Path, entry: str, message: str
) -> None:
    for field in ("targets", "ignore"):
        body = f"{{method: search, {field}: {json.dumps([entry])}}}"
        recipe.write_text(
            "prune_stage:\n  permutation_modifiers:\n    LearnablePermutationModifier: "
            f"{body}\n"
        )
        assert_one_error(prune(tmp_path, "--text", text_file), message)


@pytest.fixture
def sparse(dense: Path, tmp_path: Path, text_file: Path) -> Path:
    """A checkpoint of ours."""
    assert prune(tmp_path, "--text", text_file).exit_code == 0
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", DEEP),
        ("nm_permute/report.json", DEEP),
        ("model.safetensors", (len(DEEP)).to_bytes(8, "little").decode() + DEEP),
    ],
)
def test_a_nested_file_of_a_checkpoint_is_a_fault_of_that_file(
    sparse: Path, name: str, content: str
) -> None:
    (sparse / name).write_text(content)
    result = nm_permute("verify", sparse)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert name in result.stderr


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("re:.*[proj", "is no regular expression"),
        (ENDLESS, "repeats inside of repeats"),
    ],
    ids=["broken", "endless"],
)
def test_a_bad_pattern_in_a_checkpoint_is_a_fault_of_its_config(
    sparse: Path, entry: str, message: str
) -> None:
    config = json.loads((sparse / "config.json").read_text())
    config["quantization_config"]["sparsity_config"]["targets"] = [entry]
    (sparse / "config.json").write_text(json.dumps(config))
    (sparse / "nm_permute" / "checksums.json").unlink()  # it would find any change
    result = nm_permute("verify", sparse)
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("fault: config.json")
    assert message in line


SHAPES = {
    "floats": torch.tensor([[32.5], [32.0]]),
    "not finite": torch.tensor([[float("nan")], [32.0]]),
    "negative": torch.tensor([[-1], [32]]),
    "huge": torch.tensor([[1 << 62], [1 << 62]]),
    "another": torch.tensor([[16], [64]]),
    "empty": torch.zeros(0, dtype=torch.int64),
    "one number": torch.tensor(32),
    "flags": torch.tensor([[True], [True]]),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("command", ["verify", "convert", "evaluate"])
def test_a_damaged_shape_is_told_with_its_file(
    sparse: Path, tmp_path: Path, text_file: Path, shape: torch.Tensor, command: str
) -> None:
    file = sparse / "model.safetensors"
    tensors = load_file(file)  # and with them the checksums go
    name = next(name for name in tensors if name.endswith(".shape"))
    save_file(tensors | {name: shape}, file, {"format": "pt"})
    before = listing(tmp_path)
    options = {
        "verify": [],
        "convert": [tmp_path / "new", "--format", "dense"],
        "evaluate": ["--text", text_file, "--device", "cpu"],
    }
    result = nm_permute(command, sparse, *options[command])
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert (
        "model.safetensors" in result.stderr
        or name.removesuffix(".shape") in result.stderr
    )
    assert listing(tmp_path) == before


def as_pipe(path: Path) -> None:
    os.mkfifo(path)


def as_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def as_loop(path: Path) -> None:
    path.symlink_to(path.name)


def as_folder(path: Path) -> None:
    path.mkdir()


ODD = [as_pipe, as_device, as_loop, as_folder]
READ = {
    "model.safetensors": ("verify", "convert", "evaluate"),
    "config.json": ("verify", "convert"),
    "nm_permute/report.json": ("verify", "convert", "report"),
    "nm_permute/checksums.json": ("verify", "convert", "evaluate"),
    "README.md": (),
    "tokenizer.json": (),
}
"""Files of a checkpoint, and the commands that cannot do without them."""


def test_what_is_no_file_is_told_at_once(
    sparse: Path, tmp_path: Path, text_file: Path
) -> None:
    options = {
        "verify": [],
        "convert": [tmp_path / "new", "--format", "dense"],
        "report": [],
        "evaluate": ["--text", text_file, "--device", "cpu"],
    }
    for name, make in itertools.product(READ, ODD):
        (sparse / name).rename(tmp_path / "kept")
        make(sparse / name)
        for command in READ[name]:
            result = nm_permute(command, sparse, *options[command])
            assert result.exit_code == 1, (make, command, result.output)
            assert isinstance(result.exception, SystemExit), repr(result.exception)
            assert name.rpartition("/")[2] in result.stderr, (make, command)
            assert not (tmp_path / "new").exists()
        if not READ[name]:  # it is no part of the weights, and does not travel
            result = nm_permute("convert", sparse, *options["convert"])
            assert result.exit_code == 0, (make, result.output)
            assert not (tmp_path / "new" / name).is_file()
            shutil.rmtree(tmp_path / "new")
        remove = Path.rmdir if make is as_folder else Path.unlink
        remove(sparse / name)
        (tmp_path / "kept").rename(sparse / name)
    assert nm_permute("verify", sparse).exit_code == 0


def test_a_block_that_nobody_understands_is_refused_before_the_work(
    sparse: Path, tmp_path: Path
) -> None:
    config = json.loads((sparse / "config.json").read_text())
    config["quantization_config"]["sparsity_config"]["format"] = 1
    (sparse / "config.json").write_text(json.dumps(config))
    (sparse / "nm_permute" / "checksums.json").unlink()  # it would find any change
    result = nm_permute("convert", sparse, tmp_path / "new", "--format", "dense")
    assert_one_error(result, r"config\.json: sparsity_config\.format is 1")
    assert not (tmp_path / "new").exists()


def test_a_changed_record_moves_no_adapter(sparse: Path, tmp_path: Path) -> None:
    from nm_permute_plugin.checkpoint.checksums import refuse_changed

    record = sparse / "nm_permute" / "permutations.safetensors"
    content = bytearray(record.read_bytes())
    content[-1] ^= 1
    record.write_bytes(content)
    refuse_changed(sparse, "model")
    with pytest.raises(ValueError, match=r"permutations\.safetensors: is not the file"):
        refuse_changed(sparse, "nm_permute")
