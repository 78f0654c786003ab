# SPDX-License-Identifier: Apache-2.0
"""``nm-permute verify``: check that a checkpoint is whole and sparse."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from nm_permute_plugin.cli.common import print_table
from nm_permute_plugin.evaluation.model_names import must_be_folder


def verify(
    checkpoint: Annotated[Path, Argument(help="Folder of the checkpoint.")],
    pattern: Annotated[
        str | None,
        Option(
            help="Demand this pattern, '2:4' for example, of every matrix that the "
            "checkpoint says is sparse, or of every linear of the layers where it says "
            "nothing."
        ),
    ] = None,
    table: Annotated[bool, Option("--table", help="List every matrix.")] = False,
) -> None:
    """Check that a checkpoint is whole, and as sparse as its config promises.

    Of the matrices only those with a fault are listed; --table lists all of them.
    """
    must_be_folder(checkpoint)
    from nm_permute_plugin.checkpoint.verify import verify as verify_checkpoint
    from nm_permute_plugin.maths.pattern import NMPattern

    demanded = NMPattern.parse(pattern) if pattern else None
    report = verify_checkpoint(checkpoint, pattern=demanded)
    faulty = {fault.tensor for fault in report.faults}
    rows = [row for row in report.rows if table or row.module in faulty]
    lines = [
        "| module | format | dtype | shape | zeros | sparse |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        shape = " x ".join(map(str, row.shape))
        dtype = str(row.dtype).removeprefix("torch.")
        sparse = "yes" if row.sparse else "no"
        cells = [row.module, row.format, dtype, shape, f"{row.zeros:.1%}", sparse]
        lines.append(f"| {' | '.join(cells)} |")
    if rows:
        print_table("\n".join(lines))
    for fault in report.faults:
        place = f"{fault.file} {fault.tensor}".strip()
        typer.echo(f"fault: {place}: {fault.message}", err=True)
    if not report.checksums:
        typer.echo(
            f"{checkpoint} has no checksums (nm_permute/checksums.json): changed bytes "
            "that leave numbers behind are not seen"
        )
    if not report.good:
        raise typer.Exit(1)
    promised = sum(row.promised for row in report.rows)
    said = (
        f"{promised} of them sparse as they must be"
        if promised
        else "none of which has to be sparse (--pattern 2:4 demands it)"
    )
    typer.echo(f"{checkpoint}: {len(report.rows)} matrices, {said}, no fault")
