# SPDX-License-Identifier: Apache-2.0
"""``nm-permute report``: make the page on a run anew, or compare runs."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option


def report(
    checkpoints: Annotated[
        list[Path],
        Argument(
            help="Folder of a checkpoint; several are compared.", show_default=False
        ),
    ],
    out: Annotated[
        Path | None,
        Option(help="The page to write (nm_permute/report.html in the checkpoint)."),
    ] = None,
) -> None:
    """Write one HTML page on a run, from its record and its evaluations.

    Of several checkpoints, one page compares them: a table, and their curves.
    """
    from nm_permute_plugin.checkpoint.report import PAGE, make_page, subject_of
    from nm_permute_plugin.reporting.drawing import require_matplotlib
    from nm_permute_plugin.reporting.page import (
        refuse_foreign,
        write_comparison,
        write_page,
    )

    require_matplotlib()
    if out is None and len(checkpoints) > 1:
        raise ValueError(
            "several checkpoints are compared in one page: give --out FILE"
        )
    for folder in checkpoints:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder of a checkpoint")
    if out is None:
        make_page(checkpoints[0].resolve())
        typer.echo(checkpoints[0] / PAGE)
        return
    refuse_foreign(out)
    if len(checkpoints) > 1:
        write_comparison([subject_of(each, str(each)) for each in checkpoints], out)
    else:
        write_page(subject_of(checkpoints[0].resolve()), out)
    typer.echo(out)
