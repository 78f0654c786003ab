# SPDX-License-Identifier: Apache-2.0
"""
Whether `nm-permute prune` that is killed goes on to the same bytes, and what it loses.

    python benchmarks/kills.py                       # a tiny random model, 40 kills
    python benchmarks/kills.py --kills 6 --model MODEL --recipe RECIPE.yaml --text FILE
    python benchmarks/kills.py --kept                # what keeping the state costs

A run is left alone. Then runs are killed, by SIGKILL and SIGTERM in turn, at random moments
of learning, of recovery and of saving, and the same command is given again. What it leaves
must be the bytes of the first run, less what tells of time and memory. A folder OUT that is
there after a kill must be complete, and nothing may lie beside it in the end.
"""

import argparse
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import llmcompressor  # noqa: E402, F401 - once, not in every fork
import torch  # noqa: E402
import torch.distributed.checkpoint.hf_storage  # noqa: E402, F401
from tqdm import tqdm  # noqa: E402
from transformers import LlamaForCausalLM  # noqa: E402, F401

from fuzz_subjects import make_dense, text  # noqa: E402
from nm_permute_plugin.cli.app import app  # noqa: E402
from nm_permute_plugin.pruning import state_folder  # noqa: E402

PHASES = {
    "learning": ("nm_permute_plugin.pruning.solving", "learn"),
    "recovery": ("nm_permute_plugin.pruning.pipeline", "recover"),
    "saving": ("nm_permute_plugin.modifiers.save", "save_checkpoint"),
}
"""The functions that last as long as the phases do."""

RECIPE = """\
prune_stage:
  permutation_modifiers:
    LearnablePermutationModifier:
      batch_size: 4
      learn: {steps: 40}
      search: {rounds: 2}
      validation: {every: 10}
      recover: {stages: [end_to_end], end_to_end: {steps: 40}}
"""


@dataclass(frozen=True)
class Kill:
    """
    A run that was killed, and went on.

    :param seconds: from the phase's beginning to the kill
    :param lost: seconds of work that nobody had written down
    :param startup: seconds of the second run until the phase began again, or it ended
    :param faults: what must not be; empty if all is well
    """

    phase: str
    number: str
    seconds: float
    lost: float
    startup: float
    faults: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """
    How a run ended; phases by name, seconds from its start.

    :param writes: of its state, of which ``written`` bytes took ``writing`` seconds
    """

    status: int
    began: dict[str, float]
    ended: dict[str, float]
    seconds: float
    log: str
    writes: int
    writing: float
    written: int


class Runs:
    """Runs of one command into folders of one folder."""

    def __init__(
        self, folder: Path, words: list[str], every: float | None, pages: bool = True
    ) -> None:
        self.folder, self.words, self.every = folder, words, every
        self.pages = pages

    def run(
        self,
        out: str,
        kill: tuple[str, float, signal.Signals] | None = None,
    ) -> Run:
        """Run the command in a fork, and kill it so many seconds into a phase."""
        log, started = self.folder / f"{out}.log", time.monotonic()
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(receive)
            self._child(send, log, out)
        os.close(send)
        marks: dict[str, dict[str, float]] = {"began": {}, "ended": {}}
        due, writes = None, []
        with open(receive, "rb", buffering=0) as stream:
            while True:
                wait = None if due is None else max(0.0, due - time.monotonic())
                if not select.select([stream], [], [], wait)[0]:
                    os.kill(child, kill[2] if kill else signal.SIGKILL)
                    due = None
                    continue
                line = stream.readline()
                if not line:
                    break
                for mark in line.decode().split():
                    what, phase, *more = mark.split(":")
                    if what == "wrote":
                        writes.append((float(phase), int(more[0])))
                        continue
                    marks[what][phase] = time.monotonic() - started
                    if kill and what == "began" and phase == kill[0]:
                        due = time.monotonic() + kill[1]
        _, status = os.waitpid(child, 0)
        took = time.monotonic() - started
        code = os.waitstatus_to_exitcode(status)
        writing, written = (sum(of) for of in zip((0.0, 0), *writes, strict=True))
        told = (marks["began"], marks["ended"], took, log.read_text())
        return Run(code, *told, len(writes), writing, int(written))

    def _child(self, send: int, log: Path, out: str) -> None:
        with open(log, "w") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)  # nohup may have switched them off
        # Its own lock is shared by all forks, and one that is killed may hold it.
        tqdm.set_lock(threading.RLock())
        for phase, (module, name) in PHASES.items():
            holder = import_module(module)
            setattr(holder, name, _marked(getattr(holder, name), phase, send))
        if self.every is not None:
            state_folder.EVERY, state_folder.SHARE = self.every, 1e9
        if not self.pages:
            finish = import_module("nm_permute_plugin.checkpoint.finish")
            finish.make_page_if_possible = lambda folder: None
        folder = state_folder.StateFolder
        folder.write = _timed(folder.write, send)
        words = [word.replace("OUT", str(self.folder / out)) for word in self.words]
        status = 1
        try:
            app(words)
        except SystemExit as ended:
            status = int(ended.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def killed(
        self, name: str, phase: str, at: float, number: signal.Signals, right: Any
    ) -> Kill:
        """Kill a run at a moment, go on, and look at what there is."""
        out, state = self.folder / name, self.folder / f".{name}.nm_permute_state"
        died = self.run(name, (phase, at, number))
        now = time.time()
        faults = []
        if died.status == 0:
            return Kill(phase, f"{number.name}, it was faster", at, 0, 0, ())
        if out.exists() and _contents(out) != right:
            faults.append("OUT looked finished and was not")
        if number == signal.SIGTERM and (left := _unfinished(self.folder, name)):
            faults.append(f"left after SIGTERM: {', '.join(left)}")
        kept = [path.stat().st_mtime for path in state.glob("*/value.json")]
        since = max(kept, default=now - died.began.get(phase, 0.0) - at)
        again = self.run(name)
        if again.status:
            faults.append(f"did not go on: {again.log[-2000:]}")
        elif _contents(out) != right:
            faults.append("other bytes")
        if left := _unfinished(self.folder, name):
            faults.append(f"left after the next run: {', '.join(left)}")
        for path in (out, state):
            shutil.rmtree(path, ignore_errors=True)
        startup = again.began.get(phase, again.seconds)
        lost = max(0.0, now - since)
        return Kill(phase, number.name, at, lost, startup, tuple(faults))


def _marked(real: Callable[..., Any], phase: str, send: int) -> Callable[..., Any]:
    """A function that writes into a pipe when it begins, and when it has ended."""

    def marked(*arguments: Any, **options: Any) -> Any:
        os.write(send, f"began:{phase}\n".encode())
        try:
            return real(*arguments, **options)
        finally:
            with suppress(OSError):
                os.write(send, f"ended:{phase}\n".encode())

    return marked


def _timed(real: Callable[..., Any], send: int) -> Callable[..., Any]:
    """The writing of a run's state, which tells how long it took."""

    def timed(self: Any, name: str, what: str, key: str, value: object) -> Any:
        started = time.monotonic()
        try:
            return real(self, name, what, key, value)
        finally:
            took, size = time.monotonic() - started, state_folder.bytes_of(value)
            os.write(send, f"wrote:{took:.6f}:{size}\n".encode())

    return timed


def _unfinished(folder: Path, name: str) -> list[str]:
    """What lies beside a checkpoint, the state of its run aside."""
    kept = (f"{name}.log", f".{name}.nm_permute_state")
    return [path.name for path in folder.glob(f".{name}.*") if path.name not in kept]


def _contents(out: Path) -> dict[str, bytes]:
    """Every file of a checkpoint, less what tells of time, memory and the kill."""
    files = {str(path.relative_to(out)): path for path in out.rglob("*")}
    found = {n: path.read_bytes() for n, path in files.items() if path.is_file()}
    for name in [name for name in found if "report" in name and "json" not in name]:
        del found[name]  # the page and its pictures, made of the report
    report, sums = "nm_permute/report.json", "nm_permute/checksums.json"
    if report in found and sums in found:
        told = _timeless(json.loads(found[report]))
        others = json.loads(found[sums])
        others["files"].pop(report, None)
        found[report], found[sums] = (json.dumps(x).encode() for x in (told, others))
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        spent = ("seconds", "memory", "resumed")
        return {key: _timeless(of) for key, of in value.items() if key not in spent}
    return [_timeless(of) for of in value] if isinstance(value, list) else value


def _prepare(folder: Path, asked: argparse.Namespace) -> list[str]:
    """The words of the command, for a model and a recipe that are made if need be."""
    model, recipe, texts = asked.model, asked.recipe, asked.text
    if model is None:
        torch.manual_seed(0)
        model = make_dense(folder / "dense", 64, torch.float32)
    if recipe is None:
        recipe = folder / "recipe.yaml"
        recipe.write_text(RECIPE)
    if not texts:
        texts = [folder / "text.txt"]
        texts[0].write_text(text(64))
    words = ["prune", str(model), str(recipe), "OUT", "--device", asked.device]
    words += ["--sequence-length", str(asked.sequence_length)]
    words += ["--samples", str(asked.samples)]
    return words + [word for file in texts for word in ("--text", str(file))]


def _kills(runs: Runs, count: int, seed: int) -> list[Kill]:
    first = runs.run("undisturbed")
    if first.status:
        raise RuntimeError(f"the run that nobody disturbs failed: {first.log[-3000:]}")
    right = _contents(runs.folder / "undisturbed")
    phases = [phase for phase in PHASES if phase in first.ended]
    lasts = {phase: first.ended[phase] - first.began[phase] for phase in phases}
    said = ", ".join(f"{phase} {lasts[phase]:.1f}" for phase in phases)
    print(f"undisturbed: {first.seconds:.1f} s, of which {said}", flush=True)
    rng, found = Random(seed), []
    for i in range(count):
        phase = phases[i // 2 % len(phases)]
        number = (signal.SIGKILL, signal.SIGTERM)[i % 2]
        at = rng.uniform(0, lasts[phase])
        found.append(runs.killed(f"out{i}", phase, at, number, right))
        told = "; ".join(found[-1].faults) or "the same bytes"
        print(
            f"{i}: {found[-1].number}, {at:.2f} s into {phase}: {told}; "
            f"{found[-1].lost:.1f} s of work lost",
            flush=True,
        )
    return found


def summary(kills: list[Kill]) -> str:
    """A row for each phase and signal."""
    lines = ["| killed in | by | went on to the same bytes | most work lost, s |"]
    lines.append("|---|---|---|---|")
    for phase, number in dict.fromkeys((kill.phase, kill.number) for kill in kills):
        of = [k for k in kills if (k.phase, k.number) == (phase, number)]
        good = sum(not kill.faults for kill in of)
        lost = max(kill.lost for kill in of)
        lines.append(f"| {phase} | {number} | {good} of {len(of)} | {lost:.1f} |")
    good = sum(not kill.faults for kill in kills)
    return "\n".join([*lines, f"{good} of {len(kills)} went on to the same bytes"])


def _cost(runs: Runs) -> str:
    """What keeping the state costs: the time of all writing in a whole run."""
    ended = runs.run("cost")
    if ended.status:
        raise RuntimeError(ended.log[-3000:])
    whole = ended.ended["saving"] - ended.began["learning"]
    return (
        f"{ended.writes} writes of {ended.written / 1e6:.1f} MB in all took "
        f"{ended.writing:.2f} s of the {whole:.1f} s from learning to the end of saving: "
        f"{ended.writing / whole:.2%}"
    )


def main(words: list[str] | None = None) -> int:
    """Do what the command line asks for; 1 if a run did not go on as it should."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="a tiny random one if left out")
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--text", type=Path, nargs="+")
    parser.add_argument("--sequence-length", type=int, default=16)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--every", type=float, help="seconds between states (120)")
    parser.add_argument("--no-pages", dest="pages", action="store_false")
    parser.add_argument("--kept", action="store_true", help="what the state costs")
    parser.add_argument("--folder", type=Path, help="where runs write")
    asked = parser.parse_args(words)
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        runs = Runs(
            Path(folder), _prepare(Path(folder), asked), asked.every, asked.pages
        )
        if asked.kept:
            print(_cost(runs))
            return 0
        kills = _kills(runs, asked.kills, asked.seed)
    print(summary(kills))
    return 1 if any(kill.faults for kill in kills) else 0


if __name__ == "__main__":
    sys.exit(main())
