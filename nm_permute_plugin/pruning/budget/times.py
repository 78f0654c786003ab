# SPDX-License-Identifier: Apache-2.0
"""What serving linears sparse saves, by the kernel tables that serving has measured."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from nm_permute_plugin._files import read_json
from nm_permute_plugin.pruning.budget.fused import FusedLinears
from nm_permute_plugin.reporting.reading import Read, read_as

DENSE = "dense"
"""What a kernel table calls the product of dense weights."""

_NAME = re.compile(r".+-(\d+)x(\d+)-([a-z0-9-]+)-[0-9a-f]{16}\.json")
_Choice = tuple[str, list[int], Annotated[float, Field(gt=0, allow_inf_nan=False)]]


class _Table(Read):
    """A kernel table as serving keeps it: see ``serving.kernel_table``."""

    buckets: list[tuple[int, _Choice, list[_Choice]]] = Field(min_length=1)

    def times(self, tokens: int) -> tuple[float, float] | None:
        """The microseconds of the dense kernel and of the fastest; None without both."""
        fitting = [bucket for bucket in self.buckets if bucket[0] >= tokens]
        _, _, fastest = fitting[0] if fitting else self.buckets[-1]
        taken = {name: microseconds for name, _, microseconds in fastest}
        if DENSE not in taken:
            return None
        return taken[DENSE], min(taken.values())


def measured_times(
    folder: Path, groups: Sequence[FusedLinears], dtype: str, tokens: int
) -> list[tuple[float, float]]:
    """
    The microseconds of one product of each group, dense and by the fastest kernel.

    Serving keeps a table for every shape of weight in the folder ``NM_PERMUTE_CACHE``;
    of several tables for one shape the newest is read.

    :param dtype: of the weights, as ``bfloat16``
    :param tokens: of the product
    :raises OSError: if the folder is missing
    :raises ValueError: for groups without a table, naming their shapes, and for a file that
        is no table
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"`budget.kernels`: {folder} is no folder; give the one in which serving keeps "
            "its kernel tables, ~/.cache/nm-permute or NM_PERMUTE_CACHE"
        )
    newest: dict[tuple[int, int], Path] = {}
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime):
        if (found := _NAME.fullmatch(path.name)) and found[3] == dtype:
            newest[int(found[1]), int(found[2])] = path
    times = [
        None if group.shape not in newest else _read(newest[group.shape], tokens)
        for group in groups
    ]
    missing = sorted(
        {
            "routed experts" if group.shape is None else "{} x {}".format(*group.shape)
            for group, found in zip(groups, times, strict=True)
            if found is None
        }
    )
    if missing:
        raise ValueError(
            f"`budget.kernels`: {folder} has no table that times {', '.join(missing)} in "
            f"{dtype}, dense and sparse. Serve any 2:4 checkpoint of this model once on "
            "the GPU that shall serve it, which measures them, or give dense_share"
        )
    return [found for found in times if found is not None]


def _read(path: Path, tokens: int) -> tuple[float, float] | None:
    remedy = "remove it, and let serving measure it again"
    content = read_json(path)
    table = content if isinstance(content, dict) else {}
    return read_as(_Table, table, str(path), remedy).times(tokens)
