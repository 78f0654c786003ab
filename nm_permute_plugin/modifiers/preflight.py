# SPDX-License-Identifier: Apache-2.0
"""
One look over recipe, model, data, folder and disk, before the model is run even once.

What is certain to fail is found here, all of it at once, and not after hours of work.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from llmcompressor.modeling.moe.linearize import get_non_linearized_moes
from llmcompressor.modifiers import Modifier
from llmcompressor.recipe import Recipe
from torch import nn

from nm_permute_plugin.checkpoint.transaction import is_unfinished
from nm_permute_plugin.modifiers.disk import (
    bytes_of_a_save,
    no_room,
    unfit_folder,
)
from nm_permute_plugin.modifiers.fields import PermutationFields
from nm_permute_plugin.modifiers.host import running_oneshot
from nm_permute_plugin.modifiers.neighbours import unfit_groups, unfit_neighbours
from nm_permute_plugin.modifiers.recipe import read_recipe
from nm_permute_plugin.pruning import ranks
from nm_permute_plugin.pruning.findings import refuse
from nm_permute_plugin.pruning.processes import started
from nm_permute_plugin.pruning.settings import Settings
from nm_permute_plugin.pruning.targets import linears_among
from nm_permute_plugin.specs.conv1d import weight_of


@dataclass(frozen=True)
class Look:
    """
    What is known before a run; what is None is not known, and nothing is said of it.

    :param ours: our modifier
    :param modifiers: all modifiers of the recipe, ``ours`` among them, in their order
    :param model: may be on the device meta
    :param samples: rows of calibration text at most, or images
    :param out: the folder of the checkpoint
    :param source: the folder of the dense model
    :param is_new: whether ``out`` must be new or empty
    """

    ours: Modifier
    modifiers: Sequence[Modifier]
    model: nn.Module | None = None
    samples: int | None = None
    out: Path | None = None
    source: Path | None = None
    is_new: bool = False

    def findings(self) -> list[str]:
        """Everything that is certain to fail, each in one line with its remedy."""
        settings = _settings(self.ours)
        found = list(unfit_neighbours(self.ours, self.modifiers, settings))
        if self.model is not None:
            found += unfit_widths(self.model, settings)
            found += unfit_groups(self.ours, self.modifiers, self.model)
            found += no_gradients(self.model, settings)
        if self.samples is not None:
            found += too_few(self.samples, settings)
        if self.out is not None:
            found += unfit_folder(self.out, self.source, self.is_new)
            if self.model is not None:
                parts = (self.model, settings, self.ours, self.modifiers)
                found += no_room(self.out, *bytes_of_a_save(*parts))
        return found

    def refuse(self) -> None:
        """
        Refuse a run that is certain to fail.

        :raises ValueError: with every finding in a line of its own
        """
        refuse(self.findings())


def refuse_strangers() -> None:
    """
    Refuse to run beside processes of ``torchrun`` that know nothing of each other.

    :raises ValueError: if there are such processes
    """
    if ranks.count() == 1 and started() > 1:
        raise ValueError(
            f"torchrun has started {started()} processes, but they have no process "
            "group, and each would write the same files: call "
            "compressed_tensors.distributed.init_dist() before the model is loaded (on "
            'CPUs torch.distributed.init_process_group("gloo")), or start the script '
            "without torchrun"
        )


def look_before_loading(
    empty_model: Callable[[], nn.Module],
    source: str | Path,
    recipe: Path,
    out: Path,
    samples: int,
) -> bool:
    """
    Refuse a run of the command that is certain to fail, before its weights are read.

    Tell whether its weights shall lie in shards, so that the model stays on the CPU.

    :param empty_model: makes the model on the device meta
    :param source: its folder, or its name on the hub
    :param out: the resolved folder of the checkpoint, which must be new or empty
    :param samples: rows of calibration text, or images
    :raises ValueError: with every finding in a line of its own
    """
    refuse_strangers()
    modifiers = Recipe.create_instance(read_recipe(recipe)).modifiers
    model = empty_model()
    # Packed experts become linears when oneshot unpacks them; the modifier sees them.
    whole = None if get_non_linearized_moes(model) else model
    for ours in modifiers:
        if isinstance(ours, PermutationFields):
            place = (out, Path(source), True)
            Look(ours, modifiers, whole, samples, *place).refuse()
    return any(
        _settings(ours).memory.shard
        for ours in modifiers
        if isinstance(ours, PermutationFields)
    )


def look_of(ours: Modifier, modifiers: Sequence[Modifier], state: Any) -> Look:
    """
    Gather what a modifier knows when llm-compressor initialises it.

    :param state: llm-compressor's
    """
    named = getattr(running_oneshot(), "output_dir", None)
    out = None if named is None else Path(named)
    if out is not None and is_unfinished(out):
        name = out.name.removeprefix(".").rsplit(".", 2)[0]
        out = out.with_name(name)
    source = Path(getattr(state.model, "name_or_path", "") or "none")
    samples = _rows(state.data.calib)
    return Look(ours, modifiers, state.model, samples, out, source)


def unfit_widths(model: nn.Module, settings: Settings) -> Iterator[str]:
    """Yield linears whose input channels cannot be cut into groups of M."""
    m = settings.pattern.m
    names = [
        name
        for name in linears_among(model, settings.targets, settings.ignore)
        if weight_of(model.get_submodule(name)).shape[1] % m
    ]
    if names:
        width = weight_of(model.get_submodule(names[0])).shape[1]
        yield (
            f"{_some(names)} of {width} input channels, which M={m} of mask_structure "
            f"{settings.pattern} does not divide: use another pattern, or add it to "
            "`ignore`"
        )


def no_gradients(model: nn.Module, settings: Settings) -> Iterator[str]:
    """Yield why learning or recovery could not compute a gradient."""
    if not trains(settings):
        return
    frozen = torch.is_inference_mode_enabled() or any(
        parameter.is_inference() for parameter in model.parameters()
    )
    if frozen:
        yield (
            "learning needs gradients, and the model was loaded, or is run, under "
            "torch.inference_mode(), which keeps none: load it and call oneshot outside "
            "of it, or take method: search without `recover`"
        )


def trains(settings: Settings) -> bool:
    """Whether a run takes optimizer steps."""
    stages = {"blocks", "end_to_end"} & set(settings.recover.stages)
    return settings.method == "learned" or bool(stages)


def too_few(samples: int, settings: Settings) -> Iterator[str]:
    """Yield what a number of samples is too small for."""
    if samples < 2:
        yield (
            f"the calibration data has {samples} row; at least 2 are needed, one to train "
            "on and one for validation: give more, or shorter rows"
        )
        return
    validating = min(max(1, round(settings.validation.share * samples)), samples - 1)
    left = samples - validating
    if trains(settings) and settings.batch_size > left:
        yield (
            f"batch_size: {settings.batch_size} is more than the {left} rows to train on "
            f"({samples} rows, of which validation takes {validating}): give more text or "
            f"shorter rows, or set batch_size: {left}"
        )


def _settings(modifier: Any) -> Settings:
    settings: Settings = modifier.settings()
    return settings


def _rows(calibration: Any) -> int | None:
    """Count rows of text; None for images, and for what does not tell its number."""
    dataset = getattr(calibration, "dataset", None)
    if getattr(calibration, "batch_size", None) is None or dataset is None:
        return None
    try:
        count = len(dataset)
        first = dataset[0]
    except (TypeError, LookupError, NotImplementedError):
        return None
    if not isinstance(first, dict) or set(first) & {"pixel_values", "images"}:
        return None
    row: Any = first.get("input_ids")
    is_row = row is not None and torch.as_tensor(row).dim() == 1
    return count if is_row else None


def _some(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"{names[0]} is a linear"
    return f"{names[0]} and {len(names) - 1} more are linears"
