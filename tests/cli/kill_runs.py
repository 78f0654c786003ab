# SPDX-License-Identifier: Apache-2.0
"""
Run ``nm-permute prune`` in forks of this process, which kill themselves at given moments.

``python kill_runs.py FOLDER RECIPE MOMENT... [RECIPE MOMENT...]``: for every recipe a run
is left alone, and for every moment a run is begun, killed there, and begun again. FOLDER
holds ``dense``, ``RECIPE.yaml`` and ``text.txt``, and gets the checkpoints; how each run
ended is printed as JSON. A moment is ``FUNCTION:CALL:SIGNAL``.
"""

import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import llmcompressor  # noqa: F401  (once, not in every fork)
import torch.distributed.checkpoint.hf_storage  # noqa: F401
from transformers import LlamaForCausalLM  # noqa: F401

from nm_permute_plugin.cli.app import app
from nm_permute_plugin.pruning import state_folder

PLACES = {
    "statistics": ("nm_permute_plugin.pruning.problem", "output_sensitivity"),
    "search": ("nm_permute_plugin.pruning.search", "search"),
    "step": ("nm_permute_plugin.pruning.running.backward", "_micro_batch"),
    "layer_step": ("nm_permute_plugin.pruning.learn.layerwise", "check_finite"),
    "validation": ("nm_permute_plugin.pruning.running.teacher", "check_finite"),
    "window": ("nm_permute_plugin.pruning.recover.blocks", "_rebuild"),
    "save": ("nm_permute_plugin.modifiers.save", "save_checkpoint"),
}


def dying(place: str, call: int, number: signal.Signals) -> None:
    """Let a function get a signal at one of its calls."""
    module, name = PLACES[place]
    holder = importlib.import_module(module)
    real = getattr(holder, name)
    calls = 0
    if number != signal.SIGKILL:  # which nobody can switch off, as nohup does others
        signal.signal(number, signal.SIG_DFL)

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), number)
        return real(*arguments, **options)

    setattr(holder, name, counted)


def run(folder: Path, recipe: str, out: str, moment: str | None) -> dict[str, Any]:
    """Run the command in a fork, which may die."""
    log = folder / f"{out}.log"
    child = os.fork()
    if child == 0:
        with open(log, "w") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        # The state is written at every step, however long that takes.
        state_folder.EVERY, state_folder.SHARE = 0.0, 1e9
        if moment is not None:
            place, call, name = moment.split(":")
            dying(place, int(call), signal.Signals[name])
        paths = [folder / name for name in ("dense", f"{recipe}.yaml", out)]
        options = ["--text", folder / "text.txt", "--sequence-length", 32]
        status = 1
        try:
            app([*map(str, ["prune", *paths, *options, "--device", "cpu"])])
        except SystemExit as ended:
            status = int(ended.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, status = os.waitpid(child, 0)
    beside = sorted(path.name for path in folder.glob(f".{out}.*"))
    ended = {"status": os.waitstatus_to_exitcode(status), "beside": beside}
    return ended | {"out": out, "log": log.read_text()}


def main(folder: Path, words: list[str]) -> dict[str, list[dict[str, Any]]]:
    ends, recipe = {}, ""
    for word in words:
        if ":" not in word:
            recipe = word
            ends[recipe] = [run(folder, recipe, f"{recipe}-undisturbed", None)]
            continue
        out = f"{recipe}-{word}".replace(":", "-")
        both = [run(folder, recipe, out, moment) for moment in (word, None)]
        ends[f"{recipe} {word}"] = both
    return ends


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2:])))
