# SPDX-License-Identifier: Apache-2.0
"""Whether a stage fits into a device's memory, and what would make it fit."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from nm_permute_plugin._words import memory_size
from nm_permute_plugin.pruning.data import Data
from nm_permute_plugin.pruning.estimate.amounts import Amounts
from nm_permute_plugin.pruning.estimate.meter import Meter
from nm_permute_plugin.pruning.running.memory import activation_bytes, repeated_layers
from nm_permute_plugin.pruning.running.teacher import Teacher
from nm_permute_plugin.pruning.settings import Settings
from nm_permute_plugin.specs.conv1d import weight_of

MASTERS = 16
"""Bytes of a weight that AdamW trains in float32: itself, a gradient, and two moments."""


class DoesNotFit(Exception):
    """A stage needs more memory than there is; the message names the remedies."""


@dataclass(frozen=True)
class Room:
    """
    The memory of a device beside the model, and what each stage needs of it.

    :param held: bytes that were taken before the run
    :param free: bytes that were free then
    """

    model: nn.Module
    prunable: Sequence[str]
    amounts: Amounts
    device: torch.device
    held: int
    free: int

    @classmethod
    def of(
        cls,
        model: nn.Module,
        prunable: Sequence[str],
        data: Data,
        settings: Settings,
        meter: Meter,
        free: Callable[[torch.device], int],
    ) -> "Room":
        """Look at a device on which the model lies already."""
        amounts, device = Amounts(data, settings), meter.device
        return cls(model, prunable, amounts, device, meter.held(), free(device))

    def check(self, stage: str, peak: int | None = None) -> None:
        """
        Refuse a stage that needs more than there is.

        :param peak: bytes at most that were measured; None takes what is certain before
        :raises DoesNotFit: with the remedies
        """
        need = self.least(stage) if peak is None else peak - self.held
        if need > self.free:
            raise DoesNotFit(self._refusal(stage, need))

    @contextmanager
    def caught(self, stage: str) -> Iterator[None]:
        """Turn a failure to allocate into the refusal of a stage."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            text = str(error)
            # cuBLAS, which allocates for itself, has a failure of its own.
            full = "out of memory|ALLOC_FAILED|DefaultCPUAllocator"
            if not isinstance(error, MemoryError) and not re.search(full, text):
                raise
            need = max(self.least(stage), self.free + _asked(text))
            raise DoesNotFit(self._refusal(stage, need, "at least ")) from error

    def least(self, stage: str) -> int:
        """The bytes beside the model that a stage takes in any case."""
        trains = stage == "learn" and not self._settings.layer_wise
        trains |= stage == "budget"
        trains |= stage == "recover" and self._distils
        found = self._fixed(stage)
        return found + (self._activations() if trains else self._logits)

    def _fixed(self, stage: str) -> int:
        """What does not depend on how many rows go through the model at a time."""
        if stage == "recover" and self._distils:
            return (MASTERS + self._itemsize + 1) * self._weights
        if stage == "recover" or stage.startswith("fold"):
            return self._weights  # masks
        if self._settings.layer_wise and self.device.type != "cpu":
            return 0
        return (8 if stage == "search" else 4) * self._weights

    def _activations(self, rows: int | None = None, again: bool | None = None) -> int:
        """
        What a step keeps between forward and backward.

        :param rows: at a time; None takes what the settings say
        :param again: whether layers run again in backward; None takes what they say
        """
        rows = rows or self.amounts.rows_at_a_time
        if again is None:
            wanted = self._settings.memory.gradient_checkpointing
            again = self.device.type == "cuda" if wanted is None else wanted
        return self._of_row * rows // (self._layers if again else 1)

    def _refusal(self, stage: str, need: int, how: str = "") -> str:
        free, where = self.free, self.device
        ways = [text for text, bytes_ in self._ways(stage, need) if bytes_ <= free]
        ways.append(f"use a device with {memory_size(need - free)} more")
        return (
            f"{stage} needs {how}{memory_size(need)} of memory beside the model, and "
            f"{where} has {memory_size(free)} free: {', or '.join(ways)}"
        )

    def _ways(self, stage: str, need: int) -> Iterator[tuple[str, int]]:
        """Yield what could be changed, and the bytes that the stage would need then."""
        settings, amounts = self._settings, self.amounts
        learns = stage == "learn" and not settings.layer_wise
        if learns or stage == "budget" or (stage == "recover" and self._distils):
            kept = need - self._activations()
            if amounts.rows_at_a_time > 1:
                yield "write memory: {micro_batch_size: 1}", kept + self._activations(1)
            if settings.memory.gradient_checkpointing is None:
                text = "memory: {micro_batch_size: 1, gradient_checkpointing: true}"
                yield f"write {text}", kept + self._activations(1, True)
            yield from self._shorter(kept, self._activations(1, True))
        elif amounts.rows > 1:
            of_logits = self._logits // amounts.rows
            yield "write batch_size: 1", need - self._logits + of_logits
            yield from self._shorter(need - self._logits, of_logits)
        if learns:
            on_host = self.device.type != "cpu"
            scores = 0 if on_host else 4 * self._weights
            part = (8 * self._weights + self._of_row * amounts.rows) // self._layers
            yield "write objective: layer_wise", scores + part
        if stage == "recover":
            yield "leave end_to_end out of `recover`", self._weights + self._logits

    def _shorter(self, kept: int, of_row: int) -> Iterator[tuple[str, int]]:
        """Yield rows so short that one of them fits, if it is they that are too long."""
        ids = self.amounts.row.get("input_ids")
        if ids is None or of_row <= 0 or kept >= self.free:
            return
        length = ids.shape[-1]
        fits = min(length - 1, int(0.9 * length * (self.free - kept) / of_row))
        if 32 <= fits < length - 1:
            yield f"take rows of {fits} tokens (--sequence-length {fits})", self.free

    @property
    def _settings(self) -> Settings:
        return self.amounts.settings

    @property
    def _distils(self) -> bool:
        return "end_to_end" in self._settings.recover.stages

    @cached_property
    def _weights(self) -> int:
        """How many weights are pruned."""
        modules = (self.model.get_submodule(name) for name in self.prunable)
        return sum(weight_of(module).numel() for module in modules)

    @property
    def _itemsize(self) -> int:
        return next(self.model.parameters()).itemsize

    @cached_property
    def _layers(self) -> int:
        return max(1, len(repeated_layers(self.model, self.prunable)))

    @cached_property
    def _logits(self) -> int:
        """The logits of a batch, which every pass of it leaves."""
        ids = self.amounts.batch.get("input_ids")
        values = getattr(getattr(self.model, "config", None), "vocab_size", 0) or 0
        return 0 if ids is None else ids.numel() * values * self._itemsize

    @cached_property
    def _of_row(self) -> int:
        """What one sample keeps between forward and backward; 0 if none fits."""
        try:
            return activation_bytes(
                Teacher(self.model, self._settings.loss, keep=False),
                dict,
                self.amounts.row,
                self._settings.memory,
            )
        except (RuntimeError, MemoryError):
            return 0


def _asked(text: str) -> int:
    """The bytes that could not be allocated, as the message of an error tells them."""
    units = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    found = re.search(r"tried to allocate ([\d.]+) (bytes|[KMG]iB)", text, re.I)
    return max(1, int(float(found[1]) * units[found[2]])) if found else 1
