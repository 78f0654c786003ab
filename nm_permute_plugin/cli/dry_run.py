# SPDX-License-Identifier: Apache-2.0
"""``nm-permute prune --dry-run``: what a run would do, take, and not fit into."""

import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from nm_permute_plugin._words import file_size, memory_size
from nm_permute_plugin.cli.common import print_table
from nm_permute_plugin.cli.logs import HostLog, nothing_misleading

if TYPE_CHECKING:
    import torch

    from nm_permute_plugin.pruning.estimate.probe import Estimate


def dry_run(
    model: str,
    recipe: Path,
    out: Path,
    batches: Callable[[], Iterable[dict[str, Any]]],
    samples: int,
    device: str,
    free: "Callable[[torch.device], int] | None" = None,
) -> None:
    """
    Print what a run will do and take, measured with a few steps of each of its stages.

    :param batches: gives the calibration data, as ``read_samples`` takes them
    :param samples: how many rows, or images, there are
    :param free: tells the free bytes of a device; by default those that it has
    :raises ValueError: for a run that is certain to fail, and for one that does not fit
        into the memory of the device or onto the disk, with what would fit
    """
    import torch

    # From its import on, llm-compressor logs to what is stdout then.
    with redirect_stdout(cast("Any", HostLog())):
        from llmcompressor.modeling.moe.linearize import linearize_moe
        from llmcompressor.recipe import Recipe
    from nm_permute_plugin.checkpoint.disk import nearest
    from nm_permute_plugin.evaluation.pretrained import empty_model, load_model
    from nm_permute_plugin.modifiers.disk import bytes_of_a_save
    from nm_permute_plugin.modifiers.fields import PermutationFields
    from nm_permute_plugin.modifiers.preflight import look_before_loading
    from nm_permute_plugin.modifiers.recipe import read_recipe
    from nm_permute_plugin.pruning.estimate.meter import Took, free_memory
    from nm_permute_plugin.pruning.estimate.probe import StageEstimate, estimate
    from nm_permute_plugin.pruning.findings import refuse
    from nm_permute_plugin.pruning.reading import read_samples
    from nm_permute_plugin.pruning.run import PrunePlan
    from nm_permute_plugin.pruning.running.forecast import duration
    from nm_permute_plugin.specs.fold import write_in_place

    out, free = out.resolve(), free or free_memory
    look_before_loading(partial(empty_model, model), model, recipe, out, samples)
    modifiers = Recipe.create_instance(read_recipe(recipe)).modifiers
    ours: Any = next(each for each in modifiers if isinstance(each, PermutationFields))
    settings = ours.settings()
    there = torch.device(device)
    refuse(list(too_large(Path(model), there, free(there))))
    started, cpu = time.perf_counter(), time.process_time()
    with nothing_misleading():
        loaded = linearize_moe(load_model(model).to(there))
    load = Took(time.perf_counter() - started, time.process_time() - cpu)
    plan = PrunePlan.of(loaded, settings)
    data = read_samples(
        loaded,
        batches(),
        settings.batch_size,
        settings.validation.share,
        settings.seed,
    )
    typer.echo("\n".join(plan.lines(settings)))
    typer.echo(
        f"{samples} samples on {there}: {data} to learn from; batches to train on: "
        f"{len(data.train)}, for validation: {len(data.validation)}"
    )
    plan.try_spec(loaded, settings, data, write_in_place)
    folder = nearest(out)
    beside = free(there)
    found = estimate(
        loaded, plan, data, settings, folder, free, partial(typer.echo, err=True)
    )
    found.stages.insert(0, StageEstimate("load", load, found.held))
    print_table(table(found))
    saved, stored = bytes_of_a_save(loaded, settings, ours, modifiers)
    typer.echo(
        f"disk: the weights take {file_size(stored or saved)}, "
        f"{file_size(saved + stored)} until they are stored; {folder} has "
        f"{file_size(shutil.disk_usage(folder).free)} free"
    )
    others = [type(each).__name__ for each in modifiers if each is not ours]
    if others:
        typer.echo(f"not measured: {', '.join(others)}")
    refuse(found.unfit)
    total, spent = found.took.seconds, found.spent.seconds + load.seconds
    typer.echo(
        f"about {duration(total)}, and at most {memory_size(found.peak)} on {there} "
        f"({memory_size(beside)} were free beside the model); measuring took "
        f"{duration(spent)}, {spent / max(total, 1e-9):.0%} of the run, and wrote nothing"
    )


def too_large(folder: Path, device: "torch.device", free: int) -> Iterable[str]:
    """
    Yield that the weights of a folder do not fit on a device.

    :param free: bytes of the device
    """
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if weights > free:
        offload = (
            "prune it by llmcompressor.oneshot, which can offload it, with objective: "
            "layer_wise, or "
            if device.type != "cpu"
            else ""
        )
        yield (
            f"the weights take {memory_size(weights)}, and {device} has "
            f"{memory_size(free)} free: {offload}use a device with "
            f"{memory_size(weights - free)} more"
        )


def table(found: "Estimate") -> str:
    """Write a table of what each stage takes."""
    from nm_permute_plugin.pruning.running.forecast import duration

    where = "GPU memory" if found.device.type == "cuda" else "memory"
    lines = [f"| stage | time | {where} at most |", "|---|---|---|"]
    for stage in found.stages:
        lines.append(
            f"| {stage.name} | {duration(stage.took.seconds)} | {memory_size(stage.peak)} |"
        )
    return "\n".join(lines)
