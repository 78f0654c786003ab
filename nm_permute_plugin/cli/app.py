# SPDX-License-Identifier: Apache-2.0
"""The command ``nm-permute``: parse, call, print."""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Orders of channels that make N:M (2:4) pruning of language models lose less.",
)

TextFiles = Annotated[
    list[Path] | None,
    typer.Option("--text", help="Plain text to calibrate and train on; repeatable."),
]
Images = Annotated[
    Path | None,
    typer.Option("--images", help="Folder of pictures, for a model of images."),
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
    images: Images = None,
    samples: Annotated[
        int, typer.Option(min=2, help="Rows of calibration text, or pictures.")
    ] = 512,
    sequence_length: Annotated[
        int, typer.Option(min=2, help="Tokens of a row.")
    ] = 1024,
    device: Device = None,
) -> None:
    """Run a recipe with LearnablePermutationModifier on a model."""
    with _clear_errors():
        _one_kind(text, images, "give calibration text")
        texts = [_read([file]) for file in text or []]
        _must_exist(model, recipe)
        from nm_permute_plugin.cli import prune as run
        from nm_permute_plugin.evaluation import loading
        from nm_permute_plugin.evaluation.images import image_files

        if images is not None:
            loading.refuse_images_for(model)
            files = run.spread(image_files(images), samples)
            minutes = run.prune_with_images(model, recipe, out, files, device)
            amount = f"{len(files)} images"
        else:
            loading.refuse_text_for(model)
            rows = run.calibration_rows(model, texts, samples, sequence_length)
            minutes = run.prune_checkpoint(model, recipe, out, rows, device)
            amount = f"{len(rows) * sequence_length} tokens"
    typer.echo(f"{out}: {amount}, {minutes:.1f} minutes")


@app.command()
def sample(
    model: Annotated[Path, typer.Argument(help="Folder of the dense model.")],
    out: Annotated[Path, typer.Argument(help="The text file, new.")],
    rows: Annotated[int, typer.Option(min=1, help="Texts.")] = 768,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each text.")] = 1024,
    start: Annotated[
        str | None,
        typer.Option(help="Token that begins a document; the tokenizer's by default."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts at a time.")] = 128,
    device: Device = None,
) -> None:
    """Write text that the model itself says, for --text: it covers what the model knows."""
    with _clear_errors():
        _must_exist(model)
        if out.exists():
            raise FileExistsError(f"{out} exists; give a new file")
        from nm_permute_plugin.cli.sample import sample_text

        where = device or _device()
        texts = sample_text(model, rows, tokens, start, seed, batch_size, where)
        out.write_text("\n\n".join(texts))
    typer.echo(f"{out}: {rows} texts of {tokens} tokens")


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of the checkpoint.")],
    text: TextFiles = None,
    images: Images = None,
    sequence_length: Annotated[
        int, typer.Option(min=2, help="Tokens of a window.")
    ] = 2048,
    base: Annotated[
        Path | None,
        typer.Option(help="Checkpoint of the same score and pattern, order as it is."),
    ] = None,
    dense: Annotated[
        Path | None,
        typer.Option(
            help="The model before pruning, for the gap closed; with --images for the "
            "cosine of the features."
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="At a time: 1 window or 32 pictures by default."),
    ] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Put the result into the model card.")
    ] = False,
    device: Device = None,
) -> None:
    """Perplexity of a checkpoint on a text; with --base and --dense the gap closed.

    With --images, the accuracy of a model of images on a folder of CLASS/*.jpg: of its
    classifier, or of the nearest neighbours of its features where it has none.
    """
    with _clear_errors():
        _one_kind(text, images, "give text to evaluate on")
        if images is not None and (base is not None or card):
            raise ValueError("--base and --card are for --text, not for --images")
        if text and (base is None) != (dense is None):
            raise ValueError("the gap closed needs both --base and --dense")
        content = _read(text or [])
        from nm_permute_plugin.cli import evaluate as run

        where = device or _device()
        if images is not None:
            lines = run.evaluate_on_images(
                checkpoint, images, where, batch_size or 32, dense
            )
        else:
            lines = run.evaluate_on_text(
                checkpoint,
                content,
                sequence_length,
                where,
                batch_size or 1,
                compared=(base, dense) if base and dense else None,
                card_row=" + ".join(file.name for file in text or []) if card else None,
            )
        for line in lines:
            typer.echo(line)


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
    dense_experts: Annotated[
        bool,
        typer.Option(
            "--dense-experts",
            help="Routed experts stay dense: vLLM has no sparse ones.",
        ),
    ] = False,
    legacy: Annotated[
        bool, typer.Option(help="Config as transformers 4 and vLLM <= 0.18.1 read it.")
    ] = False,
) -> None:
    """Write a checkpoint in another format, without changing a value."""
    with _clear_errors():
        from nm_permute_plugin.cli.convert import convert_checkpoint

        said = convert_checkpoint(
            source, target, format, pattern, dense_experts, legacy
        )
    typer.echo(said)


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
    engine: Annotated[
        str, typer.Option(help="Further arguments of vllm.LLM, as a JSON object.")
    ] = "{}",
    out: Annotated[
        Path | None, typer.Option(help="Folder for serve.json and serve.png.")
    ] = None,
) -> None:
    """Time vLLM with a checkpoint, on sparse kernels and without them; needs vLLM."""
    with _clear_errors():
        from nm_permute_plugin.cli.bench_serve import bench_serve as run
        from nm_permute_plugin.serving.bench import Workload, engine_arguments

        workload = Workload(
            batches=tuple(batch or Workload.batches),
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            repeats=repeats,
            tensor_parallel=tensor_parallel_size,
            eager=enforce_eager,
            engine=engine_arguments(engine),
        )
        table = run(checkpoint, workload, out)
    _print_table(table)
    typer.echo("dense: the same checkpoint, with NM_PERMUTE_SERVE=dense")
    if _device() == "cpu":
        typer.echo("There is no CUDA device: both sides were served dense.")


def _one_kind(text: list[Path] | None, images: Path | None, what: str) -> None:
    """See that there is text, or images, and not both."""
    if not text and images is None:
        raise ValueError(f"{what}: --text FILE, once or more, or --images FOLDER")
    if text and images is not None:
        raise ValueError(
            "--text and --images are for different models; give one of them"
        )


def _must_exist(*paths: Path) -> None:
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")


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
