# SPDX-License-Identifier: Apache-2.0
"""``nm-permute convert``: write a checkpoint in another format, and say what changed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, cast, get_args

import typer
from typer import Argument, Option

from nm_permute_plugin._words import file_size


def convert(
    source: Annotated[Path, Argument(help="Folder of the checkpoint.")],
    target: Annotated[Path, Argument(help="Folder to write, new or empty.")],
    format: Annotated[
        str, Option(help="dense, sparse-24-bitmask or sparse-bitmask.")
    ] = "sparse-24-bitmask",
    pattern: Annotated[
        str, Option(help="N:M pattern that sparse-bitmask stores.")
    ] = "2:4",
    clear_zeros: Annotated[
        bool,
        Option(
            "--clear-zeros",
            help="Store +0.0 for -0.0, which a product with a mask leaves behind.",
        ),
    ] = False,
    dense_experts: Annotated[
        bool, Option("--dense-experts", help="Leave routed experts dense.")
    ] = False,
    legacy: Annotated[
        bool, Option(help="Write a config for transformers 4 and vLLM <= 0.18.1.")
    ] = False,
) -> None:
    """Write a checkpoint in another format, without changing a value."""
    from nm_permute_plugin.checkpoint import config, writer
    from nm_permute_plugin.maths.pattern import NMPattern

    formats = get_args(config.Format)
    if format not in formats:
        raise ValueError(f"format {format!r} is unknown; use {', '.join(formats)}")
    if format == "dense" and not legacy and not clear_zeros:
        _refuse_copy(source)
    done = writer.convert(
        source,
        target,
        cast("config.Format", format),
        pattern=NMPattern.parse(pattern),
        clear_zeros=clear_zeros,
        dense_experts=dense_experts,
        legacy=legacy,
    )
    before, after = file_size(done.bytes_before), file_size(done.bytes_after)
    typer.echo(f"{target}: {before} -> {after}")
    in_place = source.resolve() == target.resolve()
    if not (legacy or clear_zeros or in_place) and _stored(source) == _stored(target):
        typer.echo(
            f"nothing had to be done: every matrix of {source} was stored so already, and "
            f"{target} holds the same weights"
        )
    for line in _storage(format, pattern, done.compressed, done.dense):
        typer.echo(line)


def _refuse_copy(source: Path) -> None:
    """Refuse to write a dense checkpoint as a dense one, which changes nothing."""
    from nm_permute_plugin.checkpoint.directory import open_checkpoint

    if set(open_checkpoint(source).formats.values()) == {"dense"}:
        raise ValueError(
            f"{source} is not stored sparse: every matrix is dense already, and nothing "
            "is to be converted"
        )


def _stored(folder: Path) -> tuple[object, Mapping[str, str]]:
    """What config.json says of sparsity, and how each matrix is stored."""
    from nm_permute_plugin.checkpoint.config import read_sparsity_config
    from nm_permute_plugin.checkpoint.directory import open_checkpoint

    checkpoint = open_checkpoint(folder)
    said = read_sparsity_config(checkpoint.config)
    return said and said.format, checkpoint.formats


def _storage(
    format: str, pattern: str, sparse: Sequence[str], dense: Mapping[str, str]
) -> list[str]:
    """Say what is stored how, with a reason for every matrix that stays dense."""
    from nm_permute_plugin.checkpoint.plan import experts_of

    if format == "dense":
        return ["every matrix is stored dense"]
    lines = [f"dense: {module}: {reason}" for module, reason in dense.items()]
    if not sparse:
        return [
            *lines,
            f"no matrix is stored as {format}, for the reasons above: it takes a Linear "
            f"that is {pattern} along its inputs, as `nm-permute prune` leaves it",
        ]
    lines.append(f"{len(sparse)} modules are stored as {format}")
    experts = experts_of(sparse)
    if experts and format == "sparse-24-bitmask":
        lines.append(
            f"{len(experts)} of them are routed experts: vLLM with this plugin serves them "
            "sparse on a GPU where it measures that to be faster, and dense elsewhere. "
            "To have them stored dense, convert with --dense-experts"
        )
    return lines
