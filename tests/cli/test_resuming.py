# SPDX-License-Identifier: Apache-2.0
"""A run that died goes on, and ends with the bytes of one that nobody disturbed."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import assert_one_error, listing, prune
from helpers import ours
from loguru import logger

from nm_permute_plugin.modifiers import save as modifiers_save

SCRIPT = Path(__file__).with_name("kill_runs.py")

RECIPES = {
    "recovered": ours(
        batch_size=4,
        learn={"stages": ["swaps", "multipliers"], "steps": [3, 5]},
        search={"rounds": 2},
        validation={"every": 2},
        recover={"stages": ["blocks", "end_to_end"], "end_to_end": {"steps": 5}},
    ),
    "layers": ours(
        batch_size=4,
        objective="layer_wise",
        learn={"stages": ["straight_through", "multipliers"], "steps": 3},
        search={"rounds": 2},
        validation={"every": 2},
    ),
}

MOMENTS = {
    "recovered search:1:SIGKILL": "the finished output sensitivity",
    "recovered step:6:SIGKILL": "step 5 of the learning",
    "recovered validation:7:SIGTERM": "step 2 of the learning",
    "recovered window:2:SIGKILL": "the finished rebuilding of layer 0",
    "recovered step:12:SIGKILL": "step 3 of the distilling",
    "recovered save:1:SIGKILL": "the finished recovery end_to_end",
    "layers layer_step:9:SIGHUP": "step 2 of the learning of model.layers.1",
}
"""When a run dies, and from where it goes on."""


@pytest.fixture(scope="module")
def ends(
    trained_checkpoint: Path, chain_rows, words, tmp_path_factory: Any
) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """The folder of all runs, and how they ended: see ``kill_runs.py``."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "dense").symlink_to(trained_checkpoint)
    (folder / "text.txt").write_text(words(chain_rows(40, 32, seed=3)))
    given: list[str] = []
    for name, recipe in RECIPES.items():
        (folder / f"{name}.yaml").write_text(recipe)
        given += [name, *(m.split()[1] for m in MOMENTS if m.startswith(name))]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), str(folder), *given],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a checkpoint, less what tells of time and memory."""
    files = {name: out / name for name in listing(out) if (out / name).is_file()}
    found = {name: path.read_bytes() for name, path in files.items()}
    del found["nm_permute/report.html"]  # made from the report
    report, sums = "nm_permute/report.json", "nm_permute/checksums.json"
    untimed = json.dumps(timeless(json.loads(found[report])))
    others = json.loads(found[sums])
    del others["files"][report]
    return found | {report: untimed.encode(), sums: json.dumps(others).encode()}


def timeless(value: Any) -> Any:
    """A report without seconds and memory, and that it went on."""
    if isinstance(value, dict):
        spent = ("seconds", "memory", "resumed")
        return {key: timeless(of) for key, of in value.items() if key not in spent}
    return [timeless(of) for of in value] if isinstance(value, list) else value


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_died_ends_with_the_same_bytes(ends, moment: str) -> None:
    folder, runs = ends
    (undisturbed,), (died, went_on) = runs[moment.split()[0]], runs[moment]
    assert undisturbed["status"] == 0, undisturbed["log"]
    assert undisturbed["beside"] == []
    out = died["out"]
    state = f".{out}.nm_permute_state"
    assert died["status"] != 0, died["log"]
    assert state in died["beside"], died["log"]
    assert f"The run goes on from {MOMENTS[moment]}" in went_on["log"]
    if MOMENTS[moment].startswith("step"):
        assert f"Going on from {MOMENTS[moment]}" in went_on["log"]
    assert went_on["status"] == 0, went_on["log"]
    assert went_on["beside"] == []
    expected, found = contents(folder / undisturbed["out"]), contents(folder / out)
    assert found.keys() == expected.keys()
    assert [file for file in found if found[file] != expected[file]] == []
    if not moment.endswith("SIGKILL"):
        assert f"The same command goes on from {MOMENTS[moment]}" in died["log"]
        assert died["beside"] == [state]


def stopping(monkeypatch: pytest.MonkeyPatch, what: str, error: Exception) -> None:
    """Let a run end in an error where it begins something; stands for a real failure."""

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(what, fail)


LEARN = "nm_permute_plugin.pruning.solving.learn"


@pytest.fixture
def said() -> Iterator[list[str]]:
    """The lines of the log."""
    lines: list[str] = []
    number = logger.add(lines.append, format="{message}")
    yield lines
    logger.remove(number)


@pytest.fixture
def died(
    ready: list[str], recipe: Path, text_file: Path, tmp_path: Path
) -> Callable[..., Path]:
    """A factory: the state of a run that found all statistics, and died after them."""
    recipe.write_text(ours(batch_size=4, learn={"steps": 2}, search={"rounds": 2}))

    def die() -> Path:
        with pytest.MonkeyPatch.context() as patch:
            stopping(patch, LEARN, ValueError("it died"))
            assert_one_error(prune(tmp_path, "--text", text_file), "it died")
        return tmp_path / ".out.nm_permute_state"

    return die


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("recipe", "learn.steps 2 there, 3 here"),
        ("text", "calibration data 1152 tokens, .* there, 512 tokens, .* here"),
        ("model", "model LlamaForCausalLM of weights .* there, LlamaForCausalLM of"),
    ],
)
def test_the_state_of_another_run_is_refused_and_stays(
    died,
    said: list[str],
    tiny_checkpoint,
    recipe: Path,
    text_file: Path,
    tmp_path: Path,
    change: str,
    message: str,
) -> None:
    state = died()
    said.clear()
    held = listing(state)
    if change == "recipe":
        recipe.write_text(recipe.read_text().replace('"steps": 2', '"steps": 3'))
    elif change == "text":
        text_file.write_text(" ".join(text_file.read_text().split()[: 18 * 32]))
    else:
        tiny_checkpoint(seed=1)
    refused = prune(tmp_path, "--text", text_file)
    assert_one_error(refused, f"holds the state of another run: {message}.*--fresh")
    assert not [line for line in said if "The same command goes on" in line]
    assert listing(state) == held
    if change == "recipe":
        again = prune(tmp_path, "--text", text_file, "--fresh")
        assert again.exit_code == 0, again.output
        assert not [line for line in said if "Taken from" in line]
        assert not state.exists()


def test_a_save_that_failed_is_done_again_without_learning_again(
    ready: list[str],
    said: list[str],
    recipe: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe.write_text(ours(batch_size=4, learn={"steps": 2}, search={"rounds": 2}))
    out = tmp_path / "small" / "out"
    out.parent.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(out.parent)]
    try:
        made = subprocess.run(mount, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if made.returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        with monkeypatch.context() as patch:
            real = modifiers_save.save_checkpoint

            def fill_first(*arguments: Any, **options: Any) -> None:
                free = shutil.disk_usage(out.parent).free
                (out.parent / "filler").write_bytes(bytes(free - (16 << 10)))
                real(*arguments, **options)

            patch.setattr(modifiers_save, "save_checkpoint", fill_first)
            failed = prune(tmp_path, "--text", text_file, out=out)
        assert_one_error(failed, "No space left|os error 28")
        assert "The same command goes on from the finished learning" in said[-1]
        (out.parent / "filler").unlink()
        stopping(monkeypatch, LEARN, AssertionError("it learned again"))
        # What is found does not depend on how it is stored.
        recipe.write_text(recipe.read_text().replace("{", '{"format": "dense", ', 1))
        again = prune(tmp_path, "--text", text_file, out=out)
        assert again.exit_code == 0, again.output
        assert [path.name for path in out.parent.iterdir()] == ["out"]
    finally:
        subprocess.run(["umount", str(out.parent)], check=True)
