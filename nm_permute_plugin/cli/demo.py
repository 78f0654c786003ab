# SPDX-License-Identifier: Apache-2.0
"""``nm-permute demo``: prune a real model by every method, and print one table."""

import json
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from nm_permute_plugin._words import memory_size
from nm_permute_plugin.cli.common import Device, find_device, print_table
from nm_permute_plugin.cli.embedded import (
    Parts,
    embedded_text,
    split_parts,
    write_embedded_model,
)
from nm_permute_plugin.cli.prune import calibration_rows, prune_checkpoint
from nm_permute_plugin.evaluation.corpus import Corpus, plain_text
from nm_permute_plugin.evaluation.report import Result, gap_of, markdown


def demo(
    out: Annotated[
        Path | None, Option(help="Folder of the results; a new one if left out.")
    ] = None,
    text: Annotated[
        list[Path] | None,
        Option(
            "--text",
            help="Text of which nine tenths train and one tests; "
            "repeatable (Python's language reference).",
        ),
    ] = None,
    device: Device = None,
) -> None:
    """Prune a real model that comes with a package, by every method; print the table."""
    parts = split_parts(plain_text(text)) if text else embedded_text()
    where = find_device(device)
    folder = out or Path(tempfile.mkdtemp(prefix="nm-permute-demo-"))
    typer.echo(f"The demo prunes SmolLM2-135M-Instruct 2:4: {Budget()}.", err=True)
    print_table(markdown(run_demo(folder, parts, Budget(), where)))
    best = folder / "learned"
    page = f", and all methods in {folder / PAGE}" if (folder / PAGE).exists() else ""
    typer.echo(
        f"All files are in {folder}{page}; next:\n"
        f"  nm-permute verify {best}\n"
        f"  vllm serve {best}   # where vLLM is, with this plugin\n"
        f"  nm-permute prune YOUR_MODEL recipes/2of4_learned.yaml OUT --text TEXT.txt"
    )


PAGE = "report.html"
"""Names the page on all methods, in the folder of the results."""

FIXED_SECONDS = 60
"""What loading, folding and saving take, beside the passes over windows of text."""


@dataclass(frozen=True)
class Budget:
    """
    How much text the demo uses: sized for two CPU cores.

    :param rows: how many rows of text calibrate and train, validation included
    :param sequence_length: the tokens of a row, and of a window of the test
    :param windows: how many windows test
    :param search_rounds: the rounds of assignment, for search and as learned's start
    :param steps: how many steps learn
    """

    rows: int = 44
    sequence_length: int = 512
    windows: int = 12
    search_rounds: int = 3
    steps: int = 20

    @property
    def passes(self) -> int:
        """How many windows pass forward through the model; a backward counts as two."""
        validation = self.rows // 10
        search, learning = 5 * validation, (4 + 2) * self.steps + 3 * validation
        tests = len(METHODS) * self.windows
        return self.rows + 3 * 16 + search + learning + tests

    def __str__(self) -> str:
        n = self.sequence_length
        return (
            f"{self.rows * n} tokens to calibrate and train on, {self.windows * n} to "
            f"test, learning {self.steps} steps of {n} tokens"
        )


METHODS: dict[str, dict[str, object]] = {
    "magnitude": {"score": "magnitude", "method": "identity"},
    "wanda": {"score": "wanda", "method": "identity"},
    "ria": {"score": "ria", "method": "identity"},
    "search": {"score": "wanda", "method": "search"},
    "learned": {"score": "wanda", "method": "learned"},
}
"""The demo's rows; search and learned reorder what wanda prunes."""


def run_demo(out: Path, text: Parts, budget: Budget, device: str) -> list[Result]:
    """
    Prune the embedded model by every method and measure each checkpoint from disk.

    :param out: the folder that takes the dense model, the checkpoints, ``results.json``
        and a page on all of them
    """
    from loguru import logger

    from nm_permute_plugin.evaluation.perplexity import evaluate_checkpoint
    from nm_permute_plugin.evaluation.text import TextTokenizer

    logger.info(f"demo: {budget}, seed 0, on {device}")
    started = time.perf_counter()
    dense = write_embedded_model(out / "dense")
    length = budget.sequence_length
    rows = calibration_rows(dense, Corpus(text.train), budget.rows, length)
    cut = TextTokenizer(dense).windows(Corpus(text.test), length)
    test = cut.windows[: budget.windows]

    results: list[Result] = []
    for method, folder, minutes in _checkpoints(out, dense, rows, budget, device):
        before = time.perf_counter()
        value = evaluate_checkpoint(folder, test, device)
        if method == "dense":
            window = (time.perf_counter() - before) / budget.windows
            about = (FIXED_SECONDS + window * budget.passes) / 60
            logger.info(f"demo: about {about:.0f} more minutes on this machine")
        base = None if method == "dense" else method
        if method in ("search", "learned"):
            base = "wanda"
        results.append(Result(method, value, minutes, str(folder), base))
        gap = gap_of(results[-1], results)
        closed = "" if gap is None else f", gap closed {gap:.1%}"
        logger.info(f"{method}: perplexity {value:.2f}{closed}")
    _write_pages(out, results, cut.form, sum(map(len, test)))
    minutes = (time.perf_counter() - started) / 60
    # Kilobytes on Linux: the only unit that the system gives.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    logger.info(f"demo: {minutes:.1f} minutes, peak memory {memory_size(peak)}")
    record = {"budget": asdict(budget), "rows": [asdict(row) for row in results]}
    (out / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    return results


def _write_pages(out: Path, results: Sequence[Result], form: str, tokens: int) -> None:
    """Put what was measured on the pages of all checkpoints, and all on one."""
    from loguru import logger

    from nm_permute_plugin.checkpoint.report import make_page_if_possible, subject_of
    from nm_permute_plugin.evaluation.results import (
        Evaluations,
        TextResult,
        write_evaluations,
    )
    from nm_permute_plugin.reporting.page import write_comparison

    by_name = {result.method: result for result in results}
    dense = by_name["dense"].perplexity
    pruned = [result for result in results if result.method != "dense"]
    for result in pruned:
        base = None if result.base in (None, result.method) else by_name[result.base]
        text = TextResult(
            text="the test text of the demo",
            form=form,
            tokens=tokens,
            perplexity=result.perplexity,
            dense=dense,
            base=None if base is None else base.perplexity,
        )
        folder = Path(result.where)
        write_evaluations(folder, Evaluations().with_text(text))
        make_page_if_possible(folder)
    subjects = [subject_of(Path(result.where)) for result in pruned]
    try:
        write_comparison(subjects, out / PAGE)
    except ModuleNotFoundError as error:
        logger.warning(f"{out / PAGE} was not made: {error}")


def _checkpoints(
    out: Path, dense: Path, rows: list[list[int]], budget: Budget, device: str
) -> Iterator[tuple[str, Path, float]]:
    """Yield each method's folder as it is finished, with the minutes it took."""
    from nm_permute_plugin.pruning.session import session

    yield "dense", dense, 0.0
    with session():  # the dense model is measured once, and searched once
        for method, fields in METHODS.items():
            recipe = out / f"{method}.yaml"
            recipe.write_text(_recipe(fields, budget))
            folder = out / method
            yield method, folder, prune_checkpoint(dense, recipe, folder, rows, device)


def _recipe(fields: dict[str, object], budget: Budget) -> str:
    import yaml

    # One row a step, and so in every recipe: what is measured for one serves all.
    body = {"mask_structure": "2:4", "batch_size": 1, **fields}
    if fields["method"] != "identity":
        body["search"] = {"rounds": budget.search_rounds}
    if fields["method"] == "learned":
        body |= {"learn": {"steps": budget.steps}, "validation": {"every": 10}}
    modifiers = {"LearnablePermutationModifier": body}
    return yaml.safe_dump({"prune_stage": {"permutation_modifiers": modifiers}})
