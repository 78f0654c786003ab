# SPDX-License-Identifier: Apache-2.0
"""Write a checkpoint in another format, and say what is stored how, and why."""

from pathlib import Path
from typing import cast, get_args

from nm_permute_plugin.checkpoint.config import Format
from nm_permute_plugin.checkpoint.model_card import is_ours, write_storage
from nm_permute_plugin.checkpoint.plan import experts_of
from nm_permute_plugin.checkpoint.record import read_promise
from nm_permute_plugin.checkpoint.writer import Conversion, convert
from nm_permute_plugin.maths.pattern import NMPattern


def convert_checkpoint(
    source: Path,
    target: Path,
    format: str,
    pattern: str,
    dense_experts: bool,
    legacy: bool,
) -> str:
    """
    Convert as ``writer.convert`` does; a model card of ours says so too.

    :return: what was done, a line for every matrix that is not stored sparse
    :raises ValueError: for an unknown format, and as ``writer.convert``
    """
    if format not in get_args(Format):
        raise ValueError(
            f"format {format!r} is unknown; use {', '.join(get_args(Format))}"
        )
    done = convert(
        source,
        target,
        cast(Format, format),
        pattern=NMPattern.parse(pattern),
        dense_experts=dense_experts,
        legacy=legacy,
    )
    promise = read_promise(target)
    if promise is not None and is_ours(target):
        stored = done.format if done.compressed else "dense"
        write_storage(target, promise, stored, "converted")
    return "\n".join([f"{target}: {_sizes(done)}", *_lines(done, pattern)])


def _sizes(done: Conversion) -> str:
    return f"{done.bytes_before / 1e6:.1f} -> {done.bytes_after / 1e6:.1f} MB"


def _lines(done: Conversion, pattern: str) -> list[str]:
    if done.format == "dense":
        return ["every matrix is stored dense"]
    lines = [f"dense: {module}: {reason}" for module, reason in done.dense.items()]
    if not done.compressed:
        return [
            *lines,
            f"no matrix is stored as {done.format}, for the reasons above: it takes a "
            f"Linear that is {pattern} along its inputs, as `nm-permute prune` leaves it",
        ]
    lines.append(f"{len(done.compressed)} modules are stored as {done.format}")
    experts = experts_of(done.compressed)
    if experts:
        lines.append(
            f"{len(experts)} of them are routed experts: transformers reads them, vLLM "
            "refuses them. For vLLM convert with --dense-experts"
        )
    return lines
