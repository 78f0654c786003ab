# SPDX-License-Identifier: Apache-2.0
"""The command ``nm-permute``: parse, call, print."""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer
from rich.console import Console
from rich.markdown import Markdown

if TYPE_CHECKING:
    from nm_permute_plugin.checkpoint.config import Format

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Orders of channels that make N:M (2:4) pruning of language models lose less.",
)

TextFiles = Annotated[
    list[Path] | None,
    typer.Option("--text", help="Plain text to calibrate and train on; repeatable."),
]
Device = Annotated[
    str | None, typer.Option(help="cpu or cuda; the GPU if there is one.")
]


@app.command()
def demo(
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results; a new one if left out.")
    ] = None,
    text: TextFiles = None,
    device: Device = None,
) -> None:
    """Prune a real model that comes with a package, by every method; print the table."""
    with _clear_errors():
        from nm_permute_plugin.cli.demo import Budget, run_demo
        from nm_permute_plugin.cli.embedded import embedded_text, split_parts

        folder = out or Path(tempfile.mkdtemp(prefix="nm-permute-demo-"))
        parts = split_parts(_read(text)) if text else embedded_text()
        rows = run_demo(folder, parts, Budget(), device or _device())
    from nm_permute_plugin.evaluation.report import markdown

    _print_table(markdown(rows))
    typer.echo(f"All files are in {folder}")


@app.command()
def prune(
    model: Annotated[Path, typer.Argument(help="Folder of the dense model.")],
    recipe: Annotated[Path, typer.Argument(help="YAML recipe.")],
    out: Annotated[
        Path, typer.Argument(help="Folder of the checkpoint, new or empty.")
    ],
    text: TextFiles = None,
    samples: Annotated[
        int, typer.Option(min=2, help="Rows of calibration text.")
    ] = 512,
    sequence_length: Annotated[
        int, typer.Option(min=2, help="Tokens of a row.")
    ] = 1024,
    device: Device = None,
) -> None:
    """Run a recipe with LearnablePermutationModifier on a model."""
    with _clear_errors():
        if not text:
            raise ValueError("give calibration text: --text FILE, once or more")
        texts = [_read([file]) for file in text]
        for path in (model, recipe):
            if not path.exists():
                raise FileNotFoundError(f"{path} does not exist")
        from nm_permute_plugin.cli.prune import calibration_rows, prune_checkpoint

        rows = calibration_rows(model, texts, samples, sequence_length)
        minutes = prune_checkpoint(model, recipe, out, rows, device)
    typer.echo(f"{out}: {len(rows) * sequence_length} tokens, {minutes:.1f} minutes")


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of the checkpoint.")],
    text: TextFiles = None,
    sequence_length: Annotated[
        int, typer.Option(min=2, help="Tokens of a window.")
    ] = 2048,
    base: Annotated[
        Path | None,
        typer.Option(help="Checkpoint of the same score and pattern, order as it is."),
    ] = None,
    dense: Annotated[
        Path | None, typer.Option(help="The model before pruning, for the gap closed.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows at a time.")] = 1,
    card: Annotated[
        bool, typer.Option("--card", help="Put the result into the model card.")
    ] = False,
    device: Device = None,
) -> None:
    """Perplexity of a checkpoint on a text; with --base and --dense the gap closed."""
    with _clear_errors():
        if not text:
            raise ValueError("give text to evaluate on: --text FILE, once or more")
        if (base is None) != (dense is None):
            raise ValueError("the gap closed needs both --base and --dense")
        content = _read(text)
        folders = {"checkpoint": checkpoint}
        if base is not None and dense is not None:
            folders |= {"base": base, "dense": dense}
        for folder in folders.values():
            if not (folder / "config.json").exists():
                raise FileNotFoundError(
                    f"{folder} holds no checkpoint (no config.json)"
                )
        from nm_permute_plugin.evaluation.perplexity import (
            evaluate_checkpoint,
            gap_closed,
            tokenize,
        )

        values = {}
        for name, folder in folders.items():
            tokens = tokenize(folder, content)
            values[name] = evaluate_checkpoint(
                folder, tokens, sequence_length, device or _device(), batch_size
            )
            typer.echo(
                f"{folder}: perplexity {values[name]:.2f} "
                f"(windows of {sequence_length} tokens, {len(tokens)} tokens)"
            )
        gap = None
        if base is not None:
            gap = gap_closed(values["checkpoint"], values["base"], values["dense"])
            typer.echo(f"gap closed: {gap:.1%}")
        if card:
            from nm_permute_plugin.checkpoint.model_card import (
                Evaluation,
                add_evaluation,
            )

            name = " + ".join(file.name for file in text)
            used = len(tokenize(checkpoint, content)) // sequence_length
            row = Evaluation(
                name, sequence_length, used * sequence_length, values["checkpoint"], gap
            )
            add_evaluation(checkpoint, row)


@app.command()
def verify(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of the checkpoint.")],
    pattern: Annotated[
        str | None,
        typer.Option(help="Demand this pattern of every matrix, '2:4' for example."),
    ] = None,
) -> None:
    """Check that a checkpoint is whole and as sparse as its config promises."""
    with _clear_errors():
        from nm_permute_plugin.checkpoint.verify import verify as verify_checkpoint
        from nm_permute_plugin.maths.pattern import NMPattern

        demanded = NMPattern.parse(pattern) if pattern else None
        report = verify_checkpoint(checkpoint, pattern=demanded)
    lines = [
        "| module | format | dtype | shape | zeros | sparse |",
        "|---|---|---|---|---|---|",
    ]
    for row in report.rows:
        shape = " x ".join(map(str, row.shape))
        dtype = str(row.dtype).removeprefix("torch.")
        cells = [row.module, row.format, dtype, shape, f"{row.zeros:.1%}"]
        cells.append("yes" if row.sparse else "no")
        lines.append(f"| {' | '.join(cells)} |")
    _print_table("\n".join(lines))
    for fault in report.faults:
        typer.echo(f"fault: {fault.file} {fault.tensor}: {fault.message}", err=True)
    if not report.good:
        raise typer.Exit(1)
    typer.echo(f"{checkpoint}: {len(report.rows)} matrices, no fault")


@app.command()
def spec(
    model: Annotated[
        Path, typer.Argument(help="Folder of the model; a config.json is enough.")
    ],
    file: Annotated[
        Path | None,
        typer.Option(
            "--spec", help="YAML file of the spec; the known one if left out."
        ),
    ] = None,
    pattern: Annotated[str, typer.Option(help="N:M, for the widths.")] = "2:4",
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            help="Linears not pruned, 're:' for patterns; lm_head by default."
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(min=1, help="Check so many layers of random weights instead."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of orders, inputs and weights.")] = 0,
) -> None:
    """Check a permutation spec: which channels move together, and that it is exact."""
    with _clear_errors():
        from nm_permute_plugin.cli.spec import TOLERANCE, check_spec

        ignored = ["lm_head"] if ignore is None else ignore
        report = check_spec(model, file, pattern, ignored, layers, seed)
    _print_table(report.table())
    for line in report.unordered():
        typer.echo(f"no space orders the inputs of {line}")
    if report.varied:
        typer.echo(f"{len(report.varied)} constant parameters had random values")
    found = f"random orders change the outputs by {report.change:.1e} (float64)"
    if not report.exact:
        typer.echo(
            f"error: {found}: more than {TOLERANCE:.0e}, the spec is wrong", err=True
        )
        raise typer.Exit(1)
    tensors = len(report.resolved.parameters)
    typer.echo(f"{report.architecture}: {tensors} tensors, {found}: exact")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Folder of the checkpoint.")],
    target: Annotated[Path, typer.Argument(help="Folder to write, new or empty.")],
    format: Annotated[
        str, typer.Option(help="dense, sparse-24-bitmask or sparse-bitmask.")
    ] = "sparse-24-bitmask",
    pattern: Annotated[str, typer.Option(help="For sparse-bitmask.")] = "2:4",
    legacy: Annotated[
        bool, typer.Option(help="Config as transformers 4 and vLLM <= 0.18.1 read it.")
    ] = False,
) -> None:
    """Write a checkpoint in another format, without changing a value."""
    with _clear_errors():
        from nm_permute_plugin.checkpoint.config import Format
        from nm_permute_plugin.checkpoint.writer import convert as convert_checkpoint
        from nm_permute_plugin.maths.pattern import NMPattern

        if format not in get_args(Format):
            raise ValueError(
                f"format {format!r} is unknown; use {', '.join(get_args(Format))}"
            )
        done = convert_checkpoint(
            source,
            target,
            cast("Format", format),
            pattern=NMPattern.parse(pattern),
            legacy=legacy,
        )
        _tell_the_card(target, done.format if done.compressed else "dense")
    typer.echo(
        f"{target}: {done.bytes_before / 1e6:.1f} -> {done.bytes_after / 1e6:.1f} MB"
    )
    if done.format == "dense":
        typer.echo("every matrix is stored dense")
        return
    typer.echo(f"{len(done.compressed)} modules are stored as {done.format}")
    for module, reason in done.dense.items():
        typer.echo(f"dense: {module}: {reason}")


@app.command(name="bench-serve")
def bench_serve(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a 2:4 checkpoint.")],
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Sequences at a time; repeatable. 1, 8 and 32."),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 512,
    output_tokens: Annotated[int, typer.Option(min=2)] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="The median counts.")] = 3,
    tensor_parallel_size: Annotated[int, typer.Option(min=1)] = 1,
    enforce_eager: Annotated[
        bool, typer.Option("--enforce-eager", help="Without compiled graphs.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for serve.json and serve.png.")
    ] = None,
) -> None:
    """Time vLLM with a checkpoint, on sparse kernels and without them; needs vLLM."""
    with _clear_errors():
        from nm_permute_plugin.cli.bench_serve import bench_serve as run
        from nm_permute_plugin.serving.bench import Workload

        workload = Workload(
            batches=tuple(batch or Workload.batches),
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            repeats=repeats,
            tensor_parallel=tensor_parallel_size,
            eager=enforce_eager,
        )
        table = run(checkpoint, workload, out)
    _print_table(table)
    typer.echo("dense: the same checkpoint, with NM_PERMUTE_SERVE=dense")
    if _device() == "cpu":
        typer.echo("There is no CUDA device: both sides were served dense.")


def _tell_the_card(folder: Path, format: str) -> None:
    """A card of ours says how the checkpoint is stored now."""
    from nm_permute_plugin.checkpoint.model_card import is_ours, write_storage
    from nm_permute_plugin.checkpoint.record import read_promise

    promise = read_promise(folder)
    if promise is not None and is_ours(folder):
        write_storage(folder, promise, cast("Format", format), "converted")


def _read(files: list[Path]) -> str:
    """The files' text; an empty or unreadable one is an error that names it."""
    texts = []
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"text file {file} does not exist")
        try:
            content = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"text file {file} is no UTF-8 text: {error}") from error
        if not content.strip():
            raise ValueError(f"text file {file} is empty")
        texts.append(content)
    return "\n\n".join(texts)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _print_table(table: str) -> None:
    """A drawn table on a terminal, Markdown where the output is read by a program."""
    if sys.stdout.isatty():
        Console().print(Markdown(table))
    else:
        typer.echo(table)


@contextmanager
def _clear_errors() -> Iterator[None]:
    """One line an error that the user can mend, and a non-zero exit."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
