# SPDX-License-Identifier: Apache-2.0
"""A linear layer's 2:4 weight, multiplied by whichever kernel is fastest."""

import logging
import os
from contextlib import suppress
from functools import cache
from importlib.resources import files

import torch
from torch import Tensor

from nm_permute_plugin.checkpoint.codec import clear_negative_zeros, compress
from nm_permute_plugin.serving import kernel_table
from nm_permute_plugin.serving.detect import Mode
from nm_permute_plugin.serving.kernel_table import Bucket, Choice, KernelTable
from nm_permute_plugin.serving.kernels.kernel import DTYPES_16
from nm_permute_plugin.serving.kernels.scaling import scaled
from nm_permute_plugin.serving.measuring import Asked, Process, measure, start
from nm_permute_plugin.serving.ops import KERNELS, TABLES, sparse24_linear, unpack
from nm_permute_plugin.serving.tune import fault_of, warm_up

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM shows what is under its name

FORCED = "NM_PERMUTE_KERNEL"
"""This environment variable restricts the kernels to those it names, comma-separated."""


_EXPECTED: dict[str, tuple[Asked, torch.device]] = {}
"""Weights that ``expect`` announced and that have no kernel table yet, by their table."""

_WAITING: list[Process] = []
"""The process that will measure them: it gets ready while the weights are loaded."""

_MEASURED: dict[str, KernelTable | str] = {}
"""Kernel tables that were measured and are not used yet, or why there is none."""


class SparseLinear:
    """
    One layer's weight, packed for each kernel of its kernel table.

    Make it with ``prepare``; the dense weight may be freed afterwards.
    """

    def __init__(self, weight: Tensor, table_name: str) -> None:
        self.table_name = table_name
        self.kernels = TABLES[table_name].kernels
        self.packed = [KERNELS[name].prepare(weight) for name in self.kernels]

    @classmethod
    def prepare(
        cls, weight: Tensor, mode: Mode, *, is_checked: bool = False
    ) -> "SparseLinear | str":
        """
        Return the layer ready to multiply, or the reason why it should stay dense.

        The first weight of each shape and dtype is measured on a card, together with
        those that ``expect`` announced, which takes seconds; the kernel table is logged
        and kept on disk.

        :param weight: [out, in], dense values on the final device; bfloat16, float16,
            float8_e4m3fn or int8
        :param is_checked: whether the weight is known to be 2:4; else it is checked
        """
        if reason := _unsupported(weight, mode):
            return reason
        if not is_checked:
            try:
                compress(clear_negative_zeros(weight))
            except ValueError as error:
                return str(error)
        allowed = _allowed(weight, mode)
        name = _name(weight, allowed)
        is_first = name not in TABLES
        if is_first:
            TABLES[name] = _table(weight, allowed)
        if TABLES[name].kernels == ["dense"]:
            return f"no sparse kernel is faster for its shape, {tuple(weight.shape)}"
        layer = cls(weight, name)
        if is_first:
            warm_up(weight, layer)
        return layer

    def refill(self, other: "SparseLinear") -> None:
        """
        Take over the weight of another layer in place, as captured CUDA graphs need it.

        :param other: of the same shape, dtype and kernels
        """
        for mine, theirs in zip(self.packed, other.packed, strict=True):
            mine.copy_(theirs)

    def unpack(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Return the dense weight [out, in], see ``Kernel.unpack``."""
        return unpack(self.packed, self.kernels, shape, dtype)

    @property
    def signature(self) -> str:
        """What a graph compiled with the layer depends on: table, kernels, our source."""
        return f"{self.table_name}: {' '.join(self.kernels)}, {_source()}"

    def __call__(self, x: Tensor) -> Tensor:
        """
        Compute ``x @ weight.T``.

        :param x: [tokens, in], of the weight's dtype
        :return: [tokens, out], of ``output_dtype``
        """
        out: Tensor = sparse24_linear(x, self.packed, self.table_name)
        return out

    def scaled_mm(
        self,
        x_q: Tensor,
        scale_x: Tensor,
        scale_w: Tensor,
        bias: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """
        Compute ``(x_q @ weight.T) * scale_x * scale_w + bias`` for an 8-bit weight.

        :param x_q: [tokens, in], of the weight's dtype
        :param scale_x: float32, one number or [tokens, 1]
        :param scale_w: float32 or bfloat16, one number or [out, 1]
        :param bias: [out]
        :param out_dtype: bfloat16 or float16
        :return: [tokens, out]
        """
        return scaled(self(x_q), scale_x, scale_w, bias, out_dtype)


def expect(weight: Tensor, mode: Mode) -> bool:
    """
    Announce a weight: all that are announced are measured together, in one process.

    :param weight: as for ``SparseLinear.prepare``; shape, dtype and device count
    :return: whether it will have to be measured
    """
    if _unsupported(weight, mode) is not None:
        return False
    allowed = _allowed(weight, mode)
    name = _name(weight, allowed)
    if name in _EXPECTED:
        return True
    # exists: False too where it cannot be looked for
    known = name in TABLES or name in _MEASURED
    if known or os.path.exists(kernel_table.path_of(weight, allowed)):
        return False
    _EXPECTED[name] = Asked.of(weight, allowed), weight.device
    if not _WAITING:
        with suppress(OSError):  # it is started again when it is needed
            _WAITING.append(start())
    return True


@cache
def _source() -> str:
    """Hash the source of this package, kernels included, once a process."""
    return kernel_table.source_digest(files(__package__))


def _unsupported(weight: Tensor, mode: Mode) -> str | None:
    """Return why no sparse kernel may run, whichever is fastest; None if one may."""
    if mode == "dense":
        return "the mode is dense"
    if not weight.is_cuda:
        return f"it is on {weight.device}; the sparse kernels need a CUDA device"
    if set(_allowed(weight, mode)) - {"dense"}:
        return None
    reasons = {name: kernel.unsupported(weight) for name, kernel in KERNELS.items()}
    told = [f"{name}: {reason}" for name, reason in reasons.items() if reason]
    return "; ".join(told) or f"{FORCED} allows no sparse kernel"


def _allowed(weight: Tensor, mode: Mode) -> list[str]:
    """
    List the kernels to choose from.

    :raises ValueError: if the environment names a kernel that does not exist
    """
    names = [name for name, k in KERNELS.items() if k.unsupported(weight) is None]
    if forced := os.environ.get(FORCED):
        wanted = [word.strip() for word in forced.split(",")]
        if unknown := set(wanted) - set(KERNELS):
            raise ValueError(
                f"{FORCED}={forced} names {', '.join(sorted(unknown))}; known are "
                f"{', '.join(KERNELS)}"
            )
        names = [name for name in names if name in wanted]
    elif "mma_sp" in names and "triton" in names:
        names.remove("triton")  # never the faster of the two
    if mode == "memory":  # one copy: of the kernel that multiplies any number of tokens
        names = [name for name in names if name == "cusparselt"]
    return names


def _table(weight: Tensor, allowed: list[str]) -> KernelTable:
    """Read the kernel table from disk, or measure it now and keep it there."""
    path = kernel_table.path_of(weight, allowed)
    table = kernel_table.load(path, len(weight), allowed)
    if table is not None and (fault := fault_of(table, weight, KERNELS)):
        logger.warning("ignored the kernel table in %s: %s", path, fault)
        table = None
    if table is None:
        measured = _measured(weight, allowed)
        if isinstance(measured, str):
            logger.warning("no sparse kernels run for this shape: %s", measured)
            return KernelTable(len(weight), [Bucket(1, Choice("dense", (), 0.0), [])])
        table = measured
        kernel_table.save(table, path)
    logger.info(
        "kernels for weights of shape %s, %s, by tokens (microseconds):\n%s\n%s",
        tuple(weight.shape),
        weight.dtype,
        table.as_text(),
        _memory(weight, table),
    )
    return table


def _measured(weight: Tensor, allowed: list[str]) -> KernelTable | str:
    """Return a weight's kernel table, measured now or before, or why there is none."""
    name = _name(weight, allowed)
    if name not in _MEASURED:
        _EXPECTED[name] = Asked.of(weight, allowed), weight.device
        asked = {n: a for n, (a, on) in _EXPECTED.items() if on == weight.device}
        process = _WAITING.pop() if _WAITING else None
        found = measure(asked, weight.device, process)
        for each in asked:
            del _EXPECTED[each]
        _MEASURED.update(found.faults)
        for each, table in found.tables.items():
            _MEASURED[each] = table
    measured = _MEASURED.pop(name)
    if isinstance(measured, str):
        return measured
    return fault_of(measured, weight, KERNELS) or measured


def _name(weight: Tensor, allowed: list[str]) -> str:
    """Name the kernel table of a weight."""
    return f"{tuple(weight.shape)} {weight.dtype} {' '.join(allowed)}"


def _memory(weight: Tensor, table: KernelTable) -> str:
    """Say what the packed copies of a weight cost."""
    kept = 9 / 16 if weight.dtype in DTYPES_16 else 5 / 8
    copies = ", ".join(f"{n} {1 if n == 'dense' else kept:.2f}" for n in table.kernels)
    return (
        f"copies kept of each weight, in shares of its {weight.nbytes / 2**20:.0f} MiB: "
        f"{copies}; memory mode keeps no dense one"
    )
