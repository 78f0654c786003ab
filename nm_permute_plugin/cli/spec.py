# SPDX-License-Identifier: Apache-2.0
"""Check a spec: resolve it, fold random orders in float64, compare the outputs."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import yaml
from torch import nn

from nm_permute_plugin.evaluation.loading import model_class
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.specs.architectures import head_dim_of, spec_of
from nm_permute_plugin.specs.conv1d import is_linear
from nm_permute_plugin.specs.exactness import TOLERANCE as TOLERANCE
from nm_permute_plugin.specs.exactness import (
    fold_checked,
    outputs_of,
    random_batch,
    random_model,
    random_perms,
    to_float64,
    vary_constants,
)
from nm_permute_plugin.specs.layer_names import counted
from nm_permute_plugin.specs.spec import ResolvedSpec, Spec, resolve


@dataclass(frozen=True)
class SpecReport:
    """
    What the check found.

    :param architecture: the name of the model's class
    :param change: how far the outputs moved, relative to their norm
    :param varied: the parameters that were constant, and got random values for the check
    """

    architecture: str
    resolved: ResolvedSpec
    change: float
    varied: list[str]

    @property
    def exact(self) -> bool:
        """Whether rounding explains the change."""
        return self.change <= TOLERANCE

    def table(self) -> str:
        """Write spaces, their sizes and consumers in Markdown; layers share a row."""
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
    Fold a model by random orders of all spaces, on random tokens or pixels.

    :param model: a folder with a config; without weights beside it they are random
    :param spec: a YAML file of lines and words; by default the known spec of the class
    :param ignore: the linears that are not pruned, as names or `re:` patterns
    :param layers: check a model of random weights with this many layers instead
    :raises ValueError: if the spec does not fit; the error names the parameter
    :raises FileNotFoundError: if the folder holds no model, or the file does not exist
    """
    loaded = _load(model, layers, seed)
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
    perms, batch = random_perms(resolved, seed), random_batch(loaded, seed)
    change = fold_checked(
        loaded, resolved, perms, lambda: outputs_of(loaded, batch), math.inf
    )
    return SpecReport(type(loaded).__name__, resolved, change, varied)


def read_spec(file: Path) -> Spec:
    """
    Read a spec from a YAML file.

    :raises ValueError: if it is no mapping of lines to words
    :raises FileNotFoundError: if it does not exist
    """
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


def _load(folder: Path, layers: int | None, seed: int) -> nn.Module:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no model (no config.json)")
    kind = model_class(folder)
    if layers is None and any(folder.glob("*.safetensors")):
        return to_float64(kind.from_pretrained(folder, dtype=torch.float64))
    config = transformers.AutoConfig.from_pretrained(folder)
    return random_model(kind, config, seed, layers)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(
        re.match(pattern[3:], name) if pattern.startswith("re:") else name == pattern
        for pattern in patterns
    )
