# SPDX-License-Identifier: Apache-2.0
"""Whether a folder can take a checkpoint, and its disk what a save writes."""

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from llmcompressor.modifiers import Modifier
from torch import nn

from nm_permute_plugin._words import file_size
from nm_permute_plugin.checkpoint.disk import nearest, refuse_occupied
from nm_permute_plugin.checkpoint.plan import TWO_FOUR
from nm_permute_plugin.modifiers.neighbours import is_pruned_later, weight_bits
from nm_permute_plugin.pruning.settings import Settings
from nm_permute_plugin.pruning.targets import linears_among
from nm_permute_plugin.specs.conv1d import is_transposed, weight_of


def unfit_folder(out: Path, source: Path | None, is_new: bool) -> Iterator[str]:
    """
    Yield why a folder cannot take the checkpoint.

    :param source: the folder of the dense model, if it is one
    :param is_new: whether ``out`` must be new or empty
    """
    out = out.resolve()
    if source is not None and (source / "config.json").is_file():
        source = source.resolve()
        if out == source or source in out.parents:
            where = "is" if out == source else "lies inside of"
            yield (
                f"{out} {where} the folder of the dense model, {source}: name a folder "
                "outside of it"
            )
            return
    parent = nearest(out)
    try:
        if is_new or out.is_file():
            refuse_occupied(out)
    except OSError as error:
        yield str(error)
        return
    if not parent.is_dir():
        yield f"cannot write to {out}: {parent} is no folder; name another"
    elif not os.access(parent, os.W_OK | os.X_OK):
        yield f"cannot write to {parent}: it is read-only for you; name another folder"


def no_room(out: Path, saved: int, stored: int) -> Iterator[str]:
    """
    Yield that the disk cannot hold what a save writes until it is finished.

    :param saved: bytes of the weights as llm-compressor saves them
    :param stored: bytes of the sparse weights that are then written beside them
    """
    parent = nearest(out.resolve())
    if not parent.is_dir():
        return
    free = shutil.disk_usage(parent).free
    if free < saved + stored:
        both = (
            f", and {file_size(stored)} more until it is stored sparse"
            if stored
            else ""
        )
        yield (
            f"the disk of {parent} has {file_size(free)} free, and the checkpoint takes "
            f"{file_size(saved)} as it is saved{both}: make room, or name a folder on "
            "another disk"
        )


def bytes_of_a_save(
    model: nn.Module,
    settings: Settings,
    ours: Modifier,
    modifiers: Sequence[Modifier],
) -> tuple[int, int]:
    """
    Estimate the bytes of the weights as llm-compressor saves them, and as they are stored.

    :return: the second is 0 where the checkpoint stays as it is saved
    """
    bits = weight_bits(ours, modifiers, model)
    pattern = settings.pattern
    pruned = settings.prune or is_pruned_later(ours, modifiers)
    sparse = settings.format != "dense" and pruned
    if settings.format == "auto":
        sparse = sparse and pattern == TWO_FOUR
    saved = sum(p.numel() * p.itemsize for p in model.parameters())
    names = set(linears_among(model, settings.targets, settings.ignore))
    gained = 0
    for name in names | bits.keys():
        module = model.get_submodule(name)
        weight = weight_of(module)
        kept = bits.get(name, 8 * weight.itemsize)
        saved -= weight.numel() * (8 * weight.itemsize - kept) // 8
        if name in names:
            sparse = sparse and kept >= 8 and not is_transposed(module)
            # n of m values stay, and a bit for each
            gained += int(weight.numel() * (kept * (1 - pattern.density) - 1) / 8)
    return saved, saved - gained if sparse else 0
