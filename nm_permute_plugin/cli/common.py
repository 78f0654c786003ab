# SPDX-License-Identifier: Apache-2.0
"""What several commands share: options, reading text, printing tables, errors."""

import dis
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option
from typer.core import TyperGroup

from nm_permute_plugin._words import install
from nm_permute_plugin.cli.torchrun import hold_back, refuse_many
from nm_permute_plugin.pruning.processes import rank

Device = Annotated[
    str | None, Option(help="Where the model runs: cpu or cuda; a GPU if there is one.")
]
Model = Annotated[
    str,
    Argument(
        metavar="MODEL",
        help="Folder of the dense model, or its name on the Hugging Face hub.",
    ),
]

MENDABLE = (ValueError, OSError, ModuleNotFoundError)
"""Errors of these classes come from what was given, so one line says all."""

EXTRAS = {
    "transformers": "transformers",
    "compressed_tensors": "transformers",
    "yaml": "transformers",
    "llmcompressor": "compress",
    "datasets": "compress",
    "PIL": "compress",
    "accelerate": "demo",
    "gguf": "demo",
}
"""The extra of this package that brings a module."""

TAKES_TEXT = ("prune", "evaluate")
"""The commands that read text, which a person may give without its option."""

_LONGEST = 2000
"""Characters of a line of an error."""

OUT_OF_MEMORY = "use a smaller --batch-size, or --device cpu"
PRUNE_OUT_OF_MEMORY = (
    "write memory: {micro_batch_size: 1, gradient_checkpointing: true} or objective: "
    "layer_wise into the recipe; a model that fills the device by itself is pruned by "
    "llmcompressor.oneshot, which can offload it"
)
LM_EVAL_OUT_OF_MEMORY = (
    "use a smaller --batch_size, or --device cpu"  # as lm-eval spells
)
_REMEDIES = {"prune": PRUNE_OUT_OF_MEMORY, "lm-eval": LM_EVAL_OUT_OF_MEMORY}


class Commands(TyperGroup):
    """Commands whose mendable errors are one line, unless ``--debug`` is given."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command of the first word, if it is one for all the processes."""
        found = super().resolve_command(ctx, args)
        refuse_many(found[0])
        return found

    def invoke(self, ctx: Any) -> Any:  # a class that typer keeps to itself
        try:
            quiet = ctx.params.get("quiet") or rank() > 0
            telling = nullcontext() if quiet else telling_of_imports()
            with stopped_cleanly(), telling:
                return super().invoke(ctx)
        except Exception as error:
            _hint_at_text(error, ctx.invoked_subcommand)
            line = _one_line(error, ctx.invoked_subcommand)
            if line is None or ctx.params["debug"]:
                raise
            typer.echo(f"error: {hold_back()}{_shortened(line)}", err=True)
            raise typer.Exit(1) from error


def _hint_at_text(error: Any, command: str | None) -> None:
    """Have the error about an argument too many say how text is given."""
    said = re.fullmatch(
        r"Got unexpected extra argument\S* \((.*)\)", getattr(error, "message", "")
    )
    if said and command in TAKES_TEXT:
        error.message += f"; text is given as --text {said[1].split()[0]}"


@contextmanager
def stopped_cleanly() -> Iterator[None]:
    """
    Have Ctrl-C (SIGINT), SIGTERM and SIGHUP end the block so that it cleans up.

    The exit status is the shell's for a signal: 130, 143 and 129. A signal that is
    ignored, as ``nohup`` does, stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return
    owner, stderr = os.getpid(), sys.stderr  # which the block may replace for a while

    def stop(number: int, frame: object) -> None:
        for each in before:  # a second one must not interrupt the cleaning up
            signal.signal(each, signal.SIG_IGN)
        if os.getpid() != owner:
            os._exit(128 + number)  # a process that we started, and must not clean up
        name = signal.Signals(number).name
        if rank() == 0:
            begin = "\n" * stderr.isatty()  # below a bar
            said = f"{begin}error: stopped by {name}; no unfinished folder is left"
            typer.echo(said, file=stderr)
        raise SystemExit(128 + number)

    before = {
        number: signal.signal(number, stop)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def telling_of_imports(after: float = 5.0) -> Iterator[None]:
    """
    Say once what is being imported where that takes long, as on a busy machine.

    :param after: seconds of the block
    """
    stderr, ended = sys.stderr, threading.Event()

    def watch() -> None:
        wait = after
        while not ended.wait(wait):
            wait = 1.0
            for name, module in list(sys.modules.items()):
                root = name.partition(".")[0]
                spec = getattr(module, "__spec__", None)
                # A module is in this state while its own lines run.
                initializing = getattr(spec, "_initializing", False)
                if initializing and root != "nm_permute_plugin":
                    typer.echo(f"Still importing {root} ...", file=stderr)
                    return

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _one_line(error: Exception, command: str | None) -> str | None:
    """Say what a person can mend; None for an internal error, which needs a traceback."""
    text = str(error)
    # By its name: torch may not be imported yet.
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator" in text
    ):
        remedy = _REMEDIES.get(command or "", OUT_OF_MEMORY)
        said = ". ".join(text.split(". ")[:2]) or "out of memory"
        return f"{said}: {remedy}"
    if isinstance(error, ModuleNotFoundError) and text.startswith("No module named"):
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is not None:
            extra = {"prune": "compress", "demo": "demo"}.get(command or "", extra)
            return f"{text}: {install(extra)}"
    return text if isinstance(error, MENDABLE) or _is_refusal(error) else None


def _shortened(text: str) -> str:
    """Cut lines that repeat what a file holds, however much that is."""
    lines = text.split("\n")
    return "\n".join(x if len(x) <= _LONGEST else f"{x[:_LONGEST]}..." for x in lines)


def _is_refusal(error: Exception) -> bool:
    """
    Whether a ``raise`` in this package refused the work with a RuntimeError.

    Inside of an operator of torch, the last frame is this package's as well, but does not
    stand at a ``raise``.
    """
    trace = error.__traceback__
    if trace is None or type(error) not in (RuntimeError, NotImplementedError):
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "")
    instruction = trace.tb_frame.f_code.co_code[trace.tb_lasti]
    ours = module.partition(".")[0] == __name__.partition(".")[0]
    return ours and dis.opname[instruction] == "RAISE_VARARGS"


def find_device(asked: str | None) -> str:
    """
    Return the device that was asked for, or a GPU if there is one, or the CPU.

    :raises ValueError: if there is no such device
    """
    import torch

    if asked is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise ValueError(f"--device {asked} is no device; give cpu or cuda") from error
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(
            f"--device {asked}: torch finds {count} CUDA devices here; leave out "
            "--device, or give cpu"
        )
    return asked


def must_be_device(asked: str | None) -> None:
    """
    See that there is a device that was asked for; the CPU always is.

    :raises ValueError: if there is none
    """
    if asked not in (None, "cpu"):
        find_device(asked)


def one_kind(text: list[Path] | None, images: Path | None, what: str) -> None:
    """
    See that there is text, or images, and not both.

    :raises ValueError: if it is not so
    """
    if not text and images is None:
        raise ValueError(
            f"{what}: --text FILE or --dataset FILE_OR_NAME, once or more, or --images "
            "FOLDER"
        )
    if text and images is not None:
        raise ValueError(
            "--text and --images are for different models; give one of them"
        )


def print_table(table: str) -> None:
    """Draw a Markdown table on a terminal, and print it as it is to a program."""
    if not sys.stdout.isatty():
        typer.echo(table)
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(table))
