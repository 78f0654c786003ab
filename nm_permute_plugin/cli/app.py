# SPDX-License-Identifier: Apache-2.0
"""The command ``nm-permute``: one file a command, put together here."""

from typing import Annotated

import typer
from typer import Option

from nm_permute_plugin.cli.adapt import adapt
from nm_permute_plugin.cli.bench_serve import bench_serve
from nm_permute_plugin.cli.common import Commands
from nm_permute_plugin.cli.convert import convert
from nm_permute_plugin.cli.demo import demo
from nm_permute_plugin.cli.evaluate import evaluate
from nm_permute_plugin.cli.fields import fields
from nm_permute_plugin.cli.lm_eval import PASSED_ON, lm_eval
from nm_permute_plugin.cli.logs import be_plain, be_quiet
from nm_permute_plugin.cli.prune import prune
from nm_permute_plugin.cli.recipe import recipe
from nm_permute_plugin.cli.report import report
from nm_permute_plugin.cli.sample import sample
from nm_permute_plugin.cli.spec import spec
from nm_permute_plugin.cli.verify import verify
from nm_permute_plugin.pruning.processes import rank

app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False)
for command in (
    demo,
    prune,
    fields,
    sample,
    evaluate,
    report,
    verify,
    spec,
    convert,
    adapt,
    bench_serve,
):
    app.command()(command)
app.command("lm-eval", context_settings=PASSED_ON)(lm_eval)
app.add_typer(recipe, name="recipe")


def _print_version(asked: bool) -> bool:
    if asked:
        from importlib.metadata import version

        typer.echo(f"nm-permute-plugin {version('nm-permute-plugin')}")
        raise typer.Exit
    return asked


@app.callback()
def main(
    debug: Annotated[
        bool,
        Option(
            "--debug",
            envvar="NM_PERMUTE_DEBUG",
            help="Show tracebacks; stands before the command.",
        ),
    ] = False,
    quiet: Annotated[
        bool,
        Option(
            "--quiet", help="Show errors and results only; stands before the command."
        ),
    ] = False,
    version: Annotated[
        bool,
        Option(
            "--version",
            is_eager=True,
            callback=_print_version,
            help="Print the version and exit.",
        ),
    ] = False,
) -> None:
    """Permute channels so that N:M (2:4) pruning of a model loses less.

    Results are written to stdout, logs to stderr.
    """
    be_plain()
    if quiet or rank() > 0:
        be_quiet()
