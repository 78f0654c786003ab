# SPDX-License-Identifier: Apache-2.0
"""
Run ``oneshot`` in forks of this process, which kill themselves while it saves.

``python killed_saves.py FOLDER COUNT``: FOLDER holds ``dense``. A run into ``whole`` is
left alone, and counts how often it changes the disk beside it. COUNT runs into an empty
place, and as many into an older checkpoint, are killed before one of these changes, spread
over all of them. What each left is printed as JSON.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from llmcompressor import oneshot, reset_session
from transformers import AutoModelForCausalLM, AutoTokenizer

import nm_permute_plugin  # noqa: F401
from nm_permute_plugin.checkpoint.transaction import clear_abandoned

RECIPE = (
    "prune_stage:\n  permutation_modifiers:\n    LearnablePermutationModifier:\n"
    "      method: identity\n      batch_size: 4\n"
)
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate")


def watch(folder: Path, kill_at: int | None, changes: list[str]) -> None:
    """Note each change of the disk below a folder, and die before one of them."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if not (writes or event in CHANGES) or not isinstance(arguments[0], str | Path):
            return
        if not str(arguments[0]).startswith(str(folder)):
            return
        if len(changes) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        changes.append(f"{event} {str(arguments[0]).removeprefix(str(folder))}")

    sys.addaudithook(hook)


def run(dense: Path, out: Path, kill_at: int | None) -> list[str]:
    """Prune a model, and die; returns what changed the disk if it did not."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        changes: list[str] = []
        rows = [[(7 * i + j) % 40 + 3 for j in range(32)] for i in range(12)]
        reset_session()
        model = AutoModelForCausalLM.from_pretrained(dense)
        tokenizer = AutoTokenizer.from_pretrained(dense)
        tokenizer.model_max_length = 77  # so that it is another than the folder's
        watch(out.parent, kill_at, changes)
        oneshot(
            model=model,
            tokenizer=tokenizer,
            recipe=RECIPE,
            dataset=Dataset.from_dict({"input_ids": rows}),
            max_seq_length=32,
            num_calibration_samples=12,
            shuffle_calibration_samples=False,
            output_dir=str(out),
        )
        os.write(send, json.dumps(changes).encode())
        os._exit(0)
    os.close(send)
    with open(receive) as stream:
        content = stream.read()
    os.waitpid(child, 0)
    return json.loads(content) if content else []


def look(folder: Path) -> dict[str, str]:
    """The files below a folder, with all that they hold but times."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    timed = ("report.json", "checksums.json", "report.html", ".png", ".svg")
    return {
        str(path.relative_to(folder)): ""
        if path.name.endswith(timed)
        else path.read_bytes().hex()
        for path in files
    }


def main(folder: Path, count: int) -> dict[str, Any]:
    dense, whole = folder / "dense", folder / "place" / "whole"
    changes = run(dense, whole, None)
    right, ends = look(whole), []
    older = folder / "older"
    shutil.copytree(dense, older)
    (older / "notes.txt").write_text("mine")
    over = run(dense, shutil.copytree(older, folder / "second" / "whole"), None)
    replaced = look(folder / "second" / "whole")
    for there, of in (("nothing", changes), ("older", over)):
        for i in range(count):
            moment = round(i * (len(of) - 1) / max(1, count - 1))
            place = folder / f"{there}-{i}"
            place.mkdir()
            out = place / "out"
            if there == "older":
                shutil.copytree(older, out)
            run(dense, out, moment)
            before = {"nothing": None, "older": look(older)}[there]
            after = {"nothing": right, "older": replaced}[there]
            ends.append(
                {"there": there, "before": of[moment]} | _end(out, before, after)
            )
    return {"changes": len(changes), "over": len(over), "ends": ends}


def _end(out: Path, before: Any, after: dict[str, str]) -> dict[str, Any]:
    """What is in the place of a checkpoint, and what when the next run begins."""
    found = []
    for _ in range(2):
        content = look(out) if out.exists() else None
        kind = "before" if content == before else "after" if content == after else "odd"
        found.append("gone" if kind == "odd" and content is None else kind)
        clear_abandoned(out)
    beside = [path.name for path in out.parent.iterdir() if path != out]
    return {"found": found, "beside": beside}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]).resolve(), int(sys.argv[2]))))
