# SPDX-License-Identifier: Apache-2.0
"""``nm-permute spec``: fold random permutations in float64, and compare the outputs."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from nm_permute_plugin.cli.common import print_table


def _print_known(asked: bool) -> bool:
    if asked:
        from nm_permute_plugin.specs.architectures import SPECS

        typer.echo("\n".join(SPECS))
        raise typer.Exit
    return asked


def spec(
    model: Annotated[
        Path, Argument(help="Folder of the model; a config.json is enough.")
    ],
    file: Annotated[
        Path | None, Option("--spec", help="YAML file; the known spec if left out.")
    ] = None,
    pattern: Annotated[
        str, Option(help="N:M pattern that the widths must fit.")
    ] = "2:4",
    ignore: Annotated[
        list[str] | None,
        Option(
            help="Linear not to prune, or 're:' and a pattern; repeatable (lm_head)."
        ),
    ] = None,
    layers: Annotated[
        int | None,
        Option(min=1, help="Check this many layers of random weights instead."),
    ] = None,
    seed: Annotated[int, Option(help="Seed of permutations, inputs, weights.")] = 0,
    known: Annotated[
        bool,
        Option(
            "--list",
            is_eager=True,
            callback=_print_known,
            help="Print the model classes with a known spec, and exit.",
        ),
    ] = False,
) -> None:
    """Check a permutation spec: which channels move together, and that it is exact."""
    ignored = ["lm_head"] if ignore is None else ignore
    report = check_spec(model, file, pattern, ignored, layers, seed)
    print_table(report.table())
    for line in report.unordered():
        typer.echo(f"no space permutes the inputs of {line}")
    if report.varied:
        typer.echo(f"{len(report.varied)} constant parameters had random values")
    found = f"random permutations change the outputs by {report.change:.1e} (float64)"
    if not report.exact:
        raise ValueError(f"{found}: more than rounding explains, the spec is wrong")
    tensors = len(report.resolved.parameters)
    typer.echo(f"{report.architecture}: {tensors} tensors, {found}: exact")


@dataclass(frozen=True)
class SpecReport:
    """
    What the check found.

    :param architecture: the name of the model's class
    :param resolved: the ``ResolvedSpec`` of the model
    :param change: how far the outputs moved, relative to their norm
    :param varied: the parameters that were constant, and got random values for the check
    """

    architecture: str
    resolved: Any
    change: float
    varied: list[str]

    @property
    def exact(self) -> bool:
        """Whether rounding explains the change."""
        from nm_permute_plugin.specs.exactness import TOLERANCE

        return self.change <= TOLERANCE

    def table(self) -> str:
        """Write spaces, their sizes and consumers in Markdown; layers share a row."""
        from nm_permute_plugin.specs.layer_names import counted

        rows: Counter[tuple[str, ...]] = Counter()
        for space in self.resolved.spaces.values():
            (kind,) = counted([space.name])
            inside = (
                "all" if space.segment == space.size else f"heads of {space.segment}"
            )
            consumers = ", ".join(
                counted(consumer.name for consumer in space.consumers)
            )
            rows[kind, str(space.size), inside, consumers or "none is pruned"] += 1
        lines = [
            "| space | times | channels | move within | linears that read it |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {kind} | {count} | {' | '.join(rest)} |"
            for (kind, *rest), count in rows.items()
        ]
        return "\n".join(lines)

    def unordered(self) -> list[str]:
        """List the linears whose inputs no space orders, and why; layers share a line."""
        from nm_permute_plugin.specs.layer_names import counted

        return list(
            counted(
                f"{name} ({reason})" if reason else name
                for name, reason in self.resolved.unordered.items()
            )
        )


def check_spec(
    model: Path,
    spec: Path | None = None,
    pattern: str = "2:4",
    ignore: Sequence[str] = ("lm_head",),
    layers: int | None = None,
    seed: int = 0,
) -> SpecReport:
    """
    Fold a model by random permutations of all spaces, on random tokens or pixels.

    :param model: a folder with a config; without weights beside it they are random
    :param spec: a YAML file of lines and words; by default the known spec of the class
    :param ignore: the linears that are not pruned, as names or `re:` patterns
    :param layers: check a model of random weights with this many layers instead
    :raises ValueError: if the spec does not fit; the error names the parameter
    :raises FileNotFoundError: if the folder holds no model, or the file does not exist
    """
    from nm_permute_plugin.maths.pattern import NMPattern
    from nm_permute_plugin.pruning.targets import match_linears
    from nm_permute_plugin.specs.architectures import head_dim_of, spec_of
    from nm_permute_plugin.specs.exactness import (
        fold_checked,
        outputs_of,
        random_batch,
        random_perms,
        vary_constants,
    )
    from nm_permute_plugin.specs.spec import resolve
    from nm_permute_plugin.specs.spec_file import read_spec

    loaded = _load(model, layers, seed)
    varied = vary_constants(loaded, seed)
    linears = match_linears(loaded, ["Linear"], ignore)
    lines = spec_of(loaded) if spec is None else read_spec(spec)
    known = (NMPattern.parse(pattern), linears, head_dim_of(loaded.config))
    try:
        resolved = resolve(loaded, lines, *known)
    except ValueError as error:
        if spec is None:
            raise
        raise ValueError(f"{spec}: {error}") from error
    perms, batch = random_perms(resolved, seed), random_batch(loaded, seed)
    change = fold_checked(
        loaded, resolved, perms, lambda: outputs_of(loaded, batch), math.inf
    )
    return SpecReport(type(loaded).__name__, resolved, change, varied)


def _load(folder: Path, layers: int | None, seed: int) -> Any:
    import torch

    from nm_permute_plugin.evaluation.pretrained import (
        config_of,
        load_model,
        model_class,
    )
    from nm_permute_plugin.specs.exactness import random_model, to_float64

    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no model (no config.json)")
    kind = model_class(folder)
    if layers is None and any(folder.glob("*.safetensors")):
        return to_float64(load_model(folder, dtype=torch.float64))
    return random_model(kind, config_of(folder), seed, layers)
