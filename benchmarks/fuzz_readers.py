# SPDX-License-Identifier: Apache-2.0
"""Who reads what `fuzz.py` changed, and whether what they made of it is right."""

import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten
from typer.testing import CliRunner

from fuzz_subjects import found_of_state
from nm_permute_plugin.checkpoint.directory import open_checkpoint
from nm_permute_plugin.checkpoint.report import subject_of
from nm_permute_plugin.cli.app import app
from nm_permute_plugin.cli.common import _one_line
from nm_permute_plugin.evaluation.pretrained import load_checkpoint
from nm_permute_plugin.pruning.resuming import resuming
from nm_permute_plugin.serving import kernel_table

Digests = dict[str, str]


@dataclass(frozen=True)
class Read:
    """
    What a reader did.

    :param status: 0 if it took the files as good
    :param said: what it printed
    :param error: what ended it that no person can make anything of
    :param made: digests of what it read, where that must not depend on the change
    :param left: what it should not have left behind
    """

    status: int
    said: str
    error: str = ""
    made: Digests | None = None
    left: tuple[str, ...] = ()


def command(*words: object) -> Read:
    """Run the command ``nm-permute`` in this process."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    error = done.exception
    internal = None if isinstance(error, SystemExit) else error
    said = f"{done.stdout}\n{done.stderr}"
    return Read(done.exit_code, said, "" if internal is None else _told(internal))


def called(read: Callable[[], Digests | None]) -> Read:
    """Call a function as a command would, which says errors in one line."""
    try:
        return Read(0, "", made=read())
    except Exception as error:
        line = _one_line(error, None)
        return Read(1, f"error: {line}", "" if line is not None else _told(error))


def _told(error: BaseException) -> str:
    import traceback

    return "".join(traceback.format_exception(error))[-3000:]


def _verify(folder: Path, scratch: Path) -> Read:
    read = command("verify", folder)
    if read.status or "has no checksums" in read.said:
        return read
    return Read(0, read.said, read.error, weights(folder))


def _convert(folder: Path, scratch: Path) -> Read:
    out = scratch / "out"
    sparse = any(folder.glob("*.safetensors")) and b".bitmask" in _heads(folder)
    wanted = ("--format", "dense") if sparse else ()
    read = command("convert", folder, out, *wanted)
    return _with_out(read, out, lambda: weights(out))


def _heads(folder: Path) -> bytes:
    found = b""
    for file in folder.glob("*.safetensors"):
        if file.is_file():
            with file.open("rb") as stream:
                found += stream.read(1 << 16)
    return found


def _load(folder: Path, scratch: Path) -> Read:
    def read() -> Digests:
        model = load_checkpoint(folder, "cpu")
        return {name: digest(tensor) for name, tensor in model.state_dict().items()}

    return called(read)


def _evaluate(folder: Path, scratch: Path) -> Read:
    text = scratch.parent / "text.txt"
    return command("evaluate", folder, "--text", text, "--sequence-length", 16)


def _report(folder: Path, scratch: Path) -> Read:
    def read() -> None:
        subject_of(folder)

    return called(read)


def _spec(folder: Path, scratch: Path) -> Read:
    return command("spec", folder)


def _spec_file(folder: Path, scratch: Path) -> Read:
    dense = scratch.parent / "dense"
    return command("spec", dense, "--spec", folder / "spec.yaml")


def _recipe_check(folder: Path, scratch: Path) -> Read:
    dense = scratch.parent / "dense"
    return command("recipe", "check", folder / "recipe.yaml", "--model", dense)


def _recipe_show(folder: Path, scratch: Path) -> Read:
    return command("recipe", "show", folder / "recipe.yaml")


def _check(folder: Path, scratch: Path) -> Read:
    return command("recipe", "check", scratch.parent / "search.yaml", "--model", folder)


def _prune(folder: Path, scratch: Path) -> Read:
    out, text = scratch / "out", scratch.parent / "text.txt"
    given = ("--text", text, "--sequence-length", 16, "--samples", 18)
    read = command("prune", folder, scratch.parent / "search.yaml", out, *given)
    state = scratch / ".out.nm_permute_state"
    if state.exists():  # what was found is kept, as it should be
        shutil.rmtree(state)
    return _with_out(read, out, lambda: None)


def _adapt(folder: Path, scratch: Path) -> Read:
    out = scratch / "out"
    read = command("adapt", folder / "adapter", folder / "folded", out)
    name = "adapter_model.safetensors"

    def made() -> Digests:
        return {name: hashlib.sha256((out / name).read_bytes()).hexdigest()}

    return _with_out(read, out, made)


def _with_out(read: Read, out: Path, made: Callable[[], Digests | None]) -> Read:
    """What was made of the folder that a command wrote, or what it left of it."""
    beside = tuple(sorted(path.name for path in out.parent.iterdir()))
    if read.status == 0 and not read.error:
        left = tuple(name for name in beside if name != out.name)
        return Read(0, read.said, "", made(), left)
    return Read(read.status, read.said, read.error, None, beside)


def _plan(folder: Path, scratch: Path) -> Read:
    lines: list[str] = []
    path = folder / "plan.json"
    with _heard(kernel_table.logger, lines):
        read = called(lambda: _load_plan(path))
    if lines:
        return Read(1, "\n".join(f"error: {line}" for line in lines), read.error)
    return read


def _load_plan(path: Path) -> None:
    table = kernel_table.load(path, 64, ["mma_sp", "dense"])
    if table is not None:
        assert {table.choice(n).kernel for n in (1, 50, 10**9)} <= {"mma_sp", "dense"}
        table.as_text()


@contextmanager
def _heard(logger: logging.Logger, lines: list[str]) -> Iterator[None]:
    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Lines()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _resume(folder: Path, scratch: Path) -> Read:
    def read() -> Digests:
        anew: list[Any] = []

        def make(value: Any) -> Any:
            anew.append(value)
            return value

        with resuming(folder / "state"):
            found = found_of_state(make)[:3]
        return {str(i): _digest_of(value) for i, value in enumerate(found)}

    return called(read)


def _digest_of(value: Any) -> str:
    leaves, tree = tree_flatten(value)
    words = [digest(x) if isinstance(x, Tensor) else repr(x) for x in leaves]
    return hashlib.sha256(f"{tree} {words}".encode()).hexdigest()


def weights(folder: Path) -> Digests:
    """Digests of all tensors of a checkpoint as they are once they are dense."""
    checkpoint = open_checkpoint(folder)
    found: Digests = {}
    for name in checkpoint.where:
        module, _, part = name.rpartition(".")
        stored = checkpoint.formats.get(module, "dense")
        if stored == "dense":
            found[name] = digest(checkpoint.read(name))
        elif part == "compressed":
            found[f"{module}.weight"] = digest(checkpoint.weight(module))
    return found


def digest(tensor: Tensor) -> str:
    """A digest of a tensor's dtype, shape and bits."""
    words = tensor.detach().contiguous().view(-1).view(torch.uint8)
    told = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return hashlib.sha256(told + words.numpy().tobytes()).hexdigest()


READERS: dict[str, Callable[[Path, Path], Read]] = {
    "verify": _verify,
    "convert": _convert,
    "load": _load,
    "evaluate": _evaluate,
    "report": _report,
    "spec": _spec,
    "spec file": _spec_file,
    "recipe check": _recipe_check,
    "recipe show": _recipe_show,
    "check": _check,
    "prune": _prune,
    "adapt": _adapt,
    "plan": _plan,
    "resume": _resume,
}
"""By name: reads a folder, may write into a scratch folder, whose parent holds a dense
model, a text and a recipe."""

CHECKSUMMED = ("verify", "convert", "load", "adapt", "resume")
"""What these take as good must be what was written."""
