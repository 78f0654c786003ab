# SPDX-License-Identifier: Apache-2.0
"""``nm-permute spec``: fold random orders in float64, and compare the outputs."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from nm_permute_plugin.cli.common import print_table


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
) -> None:
    """Check a permutation spec: which channels move together, and that it is exact."""
    ignored = ["lm_head"] if ignore is None else ignore
    report = check_spec(model, file, pattern, ignored, layers, seed)
    print_table(report.table())
    for line in report.unordered():
        typer.echo(f"no space orders the inputs of {line}")
    if report.varied:
        typer.echo(f"{len(report.varied)} constant parameters had random values")
    found = f"random orders change the outputs by {report.change:.1e} (float64)"
    if not report.exact:
        raise ValueError(f"{found}: more than {TOLERANCE:.0e}, the spec is wrong")
    tensors = len(report.resolved.parameters)
    typer.echo(f"{report.architecture}: {tensors} tensors, {found}: exact")


TOLERANCE = 1e-9
"""Largest relative change of an output that rounding in float64 explains."""


@dataclass(frozen=True)
class SpecReport:
    """
    What the check found.

    :param architecture: the model's class
    :param resolved: the ``ResolvedSpec`` of the model
    :param change: the largest relative change of an output
    :param varied: parameters that were constant, and got random values for the check
    """

    architecture: str
    resolved: Any
    change: float
    varied: list[str]

    @property
    def exact(self) -> bool:
        return self.change <= TOLERANCE

    def table(self) -> str:
        """Spaces, their sizes and their consumers, in Markdown; layers in one row."""
        rows: dict[tuple[str, ...], int] = {}
        for space in self.resolved.spaces.values():
            inside = (
                "all" if space.segment == space.size else f"heads of {space.segment}"
            )
            consumers = ", ".join(_kinds(consumer.name for consumer in space.consumers))
            row = (
                _kind(space.name),
                str(space.size),
                inside,
                consumers or "none is pruned",
            )
            rows[row] = rows.get(row, 0) + 1
        lines = [
            "| space | times | channels | move within | linears that read it |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {name} | {count} | {' | '.join(rest)} |"
            for (name, *rest), count in rows.items()
        ]
        return "\n".join(lines)

    def unordered(self) -> list[str]:
        """The linears whose inputs no space orders, layers in one line, and why."""
        found = self.resolved.unordered
        return _kinds(
            f"{name} ({reason})" if reason else name for name, reason in found.items()
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
    Fold a model by random orders of all spaces, on random tokens or pixels.

    :param model: folder with a config; without weights beside it they are random
    :param spec: YAML file of lines and words; by default the known one of the class
    :param ignore: linears that are not pruned, names or `re:` patterns
    :param layers: check a model of random weights and so many layers instead
    :raises ValueError: for a spec that does not fit, naming the parameter
    """
    from nm_permute_plugin.maths.pattern import NMPattern
    from nm_permute_plugin.specs.architectures import head_dim_of, spec_of
    from nm_permute_plugin.specs.conv1d import is_linear
    from nm_permute_plugin.specs.exactness import (
        change_by_fold,
        random_perms,
        to_float64,
        vary_constants,
    )
    from nm_permute_plugin.specs.probe import random_batch
    from nm_permute_plugin.specs.spec import resolve

    loaded = to_float64(_load(model, layers, seed))
    varied = vary_constants(loaded, seed)
    linears = [
        name
        for name, module in loaded.named_modules()
        if is_linear(module) and not _matches(name, ignore)
    ]
    resolved = resolve(
        loaded,
        spec_of(loaded) if spec is None else read_spec(spec),
        NMPattern.parse(pattern),
        linears,
        head_dim_of(loaded.config),
    )
    perms = random_perms(resolved, seed)
    change = change_by_fold(loaded, resolved, perms, random_batch(loaded, seed))
    return SpecReport(type(loaded).__name__, resolved, change, varied)


def read_spec(file: Path) -> Mapping[str, str]:
    """
    Read a spec from a YAML file.

    :raises ValueError: if it is no mapping of lines to words
    """
    import yaml

    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no YAML: {error}".replace("\n", " ")) from error
    if not isinstance(content, dict) or not content:
        raise ValueError(
            f"{file} holds no spec; write a line a parameter, for example "
            "'model.layers.{i}.mlp.down_proj.weight: residual hidden.{i}'"
        )
    for line, words in content.items():
        if not isinstance(line, str) or not isinstance(words, str):
            raise ValueError(f"{file}: {line!r}: {words!r} is no line of a spec")
    return content


def _load(folder: Path, layers: int | None, seed: int) -> Any:
    import torch
    import transformers

    from nm_permute_plugin.evaluation.pretrained import model_class

    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no model (no config.json)")
    kind = model_class(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    if layers is None and any(folder.glob("*.safetensors")):
        return kind.from_pretrained(folder, dtype=torch.float64)
    if layers is not None:
        _cut(config, layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config)


def _cut(config: Any, layers: int) -> None:
    """Leave a config so many layers, in every tower."""
    towers = [getattr(config, f"{name}_config", None) for name in ("text", "vision")]
    for part in (config, *towers):
        for key in ("num_hidden_layers", "depth"):
            if isinstance(getattr(part, key, None), int):
                setattr(part, key, min(layers, getattr(part, key)))
        if isinstance(getattr(part, "layer_types", None), list):
            part.layer_types = part.layer_types[:layers]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(
        re.match(pattern[3:], name) if pattern.startswith("re:") else name == pattern
        for pattern in patterns
    )


def _kinds(names: Iterable[str]) -> list[str]:
    """The names, once for all layers."""
    return list(dict.fromkeys(map(_kind, names)))


def _kind(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$| )", ".{i}", name)
