# SPDX-License-Identifier: Apache-2.0
"""Runs of Python that are interrupted go on, and folders that hold something else stay."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from loguru import logger
from torch import nn
from whole_runs import assert_same, weights_of

import nm_permute_plugin as nmp
from nm_permute_plugin.pruning import solving, state_files, state_folder
from nm_permute_plugin.pruning.running import backward

LEARN = {"stages": ["soft", "multipliers"], "steps": 3, "published": {"block_size": 16}}


@pytest.fixture
def said() -> Iterator[list[str]]:
    """The lines of the log."""
    lines: list[str] = []
    number = logger.add(lines.append, format="{message}")
    yield lines
    logger.remove(number)


@contextmanager
def stopping_in(step: int) -> Iterator[None]:
    """Let an interrupt come in the middle of a step, after its backward pass."""
    real, steps = backward._micro_batch, 0

    def counted(*arguments: object) -> object:
        nonlocal steps
        steps += 1
        loss = real(*arguments)
        if steps == step:
            raise KeyboardInterrupt
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backward, "_micro_batch", counted)
        with pytest.raises(KeyboardInterrupt):
            yield


def learned(go: Callable, model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that learning gives a copy of a model."""
    ours = deepcopy(model)
    go(ours, method="learned", learn=LEARN, validation={"every": 2})
    return weights_of(ours)


@pytest.mark.parametrize("step", [3, 4], ids=["ends a stage", "begins one"])
def test_an_interrupted_run_goes_on_with_the_same_weights(
    tiny_model, go, tmp_path: Path, said: list[str], step: int
) -> None:
    model = tiny_model("llama")
    expected = learned(go, model)
    folder = tmp_path / "state"
    with stopping_in(step), nmp.resuming(folder):
        learned(go, model)
    assert f"The same command goes on from step {step - 1} of the learning" in said[-1]
    with nmp.resuming(folder):
        assert_same(learned(go, model), expected)
    assert not folder.exists()


def test_what_was_found_is_kept_where_the_disk_has_room(
    tiny_model, go, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_folder.shutil, "disk_usage", lambda _: _Full())
    model, folder = tiny_model("llama"), tmp_path / "state"
    monkeypatch.setattr(solving, "learn", _interrupt)
    with pytest.raises(KeyboardInterrupt), nmp.resuming(folder):
        learned(go, model)
    warnings = [line for line in said if "is not kept any more" in line]
    assert len(warnings) == 1
    assert "the disk has 0 kB free" in warnings[0]
    assert not folder.exists()


def test_what_cannot_be_read_or_is_in_use_is_refused_and_stays(
    tiny_model, go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = tiny_model("llama"), tmp_path / "state"
    monkeypatch.setattr(solving, "learn", _interrupt)
    with pytest.raises(KeyboardInterrupt), nmp.resuming(folder):
        learned(go, model)
    held = sorted(folder.rglob("*"))
    busy = "another process prunes with the state"
    with (
        pytest.raises(FileExistsError, match=busy),
        nmp.resuming(folder),
        nmp.resuming(folder),
    ):
        pass
    assert sorted(folder.rglob("*")) == held
    for file in folder.rglob("*.safetensors"):
        file.write_bytes(b"damaged")
    cause = r"found_\w+ cannot be read: .*; start anew with --fresh"
    with pytest.raises(ValueError, match=cause), nmp.resuming(folder):
        learned(go, model)


def test_a_folder_that_holds_something_else_is_refused_and_stays(
    tmp_path: Path,
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with (
        pytest.raises(ValueError, match=r"no state of a run \(mine.txt\)"),
        nmp.resuming(tmp_path, fresh=True),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_values_come_back_as_they_were(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    value = {
        "views": [whole, whole[1:], whole.T, whole],
        "kinds": (torch.tensor(3), torch.ones(4, dtype=torch.bool), torch.empty(0)),
        "numbers": {0: 0.1, 1: float("inf"), "none": None, "word": "a"},
        "parameter": nn.Parameter(torch.randn(5).bfloat16()),
    }
    for _ in range(2):  # the second takes the place of the first
        state_files.write_value(tmp_path / "value", value, {"what": "it"})
    back = state_files.read_value(tmp_path / "value")
    assert [path.name for path in tmp_path.iterdir()] == ["value"]
    assert back["numbers"] == value["numbers"]
    assert torch.equal(back.pop("parameter"), value.pop("parameter"))
    for name in ("views", "kinds"):
        assert type(back[name]) is type(value[name])
        assert all(map(torch.equal, back[name], value[name]))
        assert [x.dtype for x in back[name]] == [x.dtype for x in value[name]]


class _Full:
    """What a full disk has free."""

    free = 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """The folder of a value with tensors and words."""
    value = {"a": torch.arange(64.0), "b": [torch.ones(3), ("word", 1)]}
    state_files.write_value(tmp_path / "value", value, {"what": "it", "key": "k"})
    return tmp_path / "value"


def test_a_changed_bit_anywhere_is_seen(written: Path) -> None:
    for file in sorted(written.iterdir()):
        content = file.read_bytes()
        for at in range(0, len(content), 97):
            changed = bytearray(content)
            changed[at] ^= 4
            file.write_bytes(changed)
            with pytest.raises(ValueError, match="value cannot be read"):
                state_files.read_value(written)
        file.write_bytes(content)
    assert state_files.read_value(written)["b"][1] == ("word", 1)


def test_a_hostile_value_imports_nothing(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own way to write trees would import the module."""
    code = f"import os; os.mkdir({str(tmp_path / 'mark')!r})"
    (tmp_path / "hostile_module.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    enum = {"__enum__": True, "fqn": "hostile_module:X", "name": "x"}
    context = json.dumps([enum])
    leaf = {"type": None, "context": None, "children_spec": []}
    tree = {"type": "builtins.dict", "context": context, "children_spec": [leaf]}
    for value in (enum, {"dict": [["a", enum]]}, {"tree": json.dumps([1, tree])}):
        said = {
            "about": {},
            "value": value,
            "tree": json.dumps([1, tree]),
            "leaves": [],
        }
        (written / "value.json").write_text(json.dumps(said))
        digest = hashlib.sha256((written / "value.json").read_bytes()).hexdigest()
        (written / "sums.json").write_text(
            json.dumps({"files": {"value.json": digest}})
        )
        with pytest.raises(ValueError, match="value cannot be read"):
            state_files.read_value(written)
    assert not (tmp_path / "mark").exists()


def test_the_bar_of_a_run_that_goes_on_begins_where_it_stands(
    tiny_model, go, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder = tiny_model("llama"), tmp_path / "state"
    with stopping_in(6), nmp.resuming(folder):  # the third of the second stage
        learned(go, model)
    capsys.readouterr()
    with nmp.resuming(folder):
        learned(go, model)
    shown = capsys.readouterr().err
    counts = re.findall(r"Learning (\w+): +\d+%\|[^|]*\| (\d+)/(\d+) ", shown)
    assert counts[0] == ("multipliers", "2", "3")
    assert counts[-1] == ("multipliers", "3", "3")
