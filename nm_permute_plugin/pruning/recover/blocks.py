# SPDX-License-Identifier: Apache-2.0
"""Decoder layers rebuilt one window after the other, under the masks as they are."""

from functools import partial
from itertools import islice

import torch
from loguru import logger

from nm_permute_plugin.pruning import ranks
from nm_permute_plugin.pruning.data import Data, endless
from nm_permute_plugin.pruning.recover.optimizer import RelativeAdamW
from nm_permute_plugin.pruning.recover.student import Student, Values
from nm_permute_plugin.pruning.resuming import kept
from nm_permute_plugin.pruning.running.decoder_layers import LayerStream
from nm_permute_plugin.pruning.running.loss import check_finite
from nm_permute_plugin.pruning.running.masked import frozen, masked
from nm_permute_plugin.pruning.search import History
from nm_permute_plugin.pruning.settings import BlockSettings


def rebuild_blocks(
    student: Student, data: Data, settings: BlockSettings, seed: int, known: str = ""
) -> tuple[Values, History]:
    """
    Train the kept weights of every window of decoder layers to give the dense outputs.

    After https://arxiv.org/abs/2510.14444. What enters a window comes from the pruned and
    already rebuilt layers before it, the target from the dense layers on their own inputs:
    errors are corrected, not copied. New weights are kept only where the validation error
    falls.

    :param seed: of the order of the batches
    :param known: by which a run that goes on knows what it begins with
    :return: the new values, and one entry a window: its first layer, and the validation
        error before and after
    :raises ValueError: if there are no decoder layers, if they do not run on their own,
        or if an error is not finite
    """
    stream = LayerStream(student.model, student.linears, data)
    values: Values = {}
    history: History = []
    count = len(stream.layers)
    with frozen(student.model):
        for first in ranks.bar(range(0, count, settings.window), "Rebuilding layers"):
            window = range(first, min(first + settings.window, count))
            stream.advance(stream.dense, window)
            work = partial(_rebuild, student, stream, window, settings, seed)
            better, entry = kept(work, f"rebuilding of layer {window[-1]}", known)
            values |= better
            history.append(entry)
            with masked(student.model, student.masks(values)):
                stream.advance(stream.pruned, window)
    return values, history


def _rebuild(
    student: Student,
    stream: LayerStream,
    window: range,
    settings: BlockSettings,
    seed: int,
) -> tuple[Values, dict[str, int | float]]:
    """The best values of one window by the validation error; none if none are better."""
    prefixes = tuple(f"{stream.layers.names[index]}." for index in window)
    masters = student.masters(x for x in student.linears if x.startswith(prefixes))
    before = best = stream.validate(window, student.masks())
    better: Values = {}
    if masters:
        count = len(stream.train)
        optimizer = RelativeAdamW(masters, settings.rate, settings.epochs * count)
        order = endless(count, seed)
        sums = ranks.GradientSums(masters.values())
        for _ in range(settings.epochs):
            for number in islice(order, count):
                with torch.enable_grad():
                    error = stream.error(number, window, student.masks(masters))
                now_at = ranks.total(float(error.detach()))
                check_finite(now_at, "training error of the recovery")
                error.backward()
                sums.finish()
                optimizer.step()
            now = student.rounded(masters)
            error_now = stream.validate(window, student.masks(now))
            if error_now < best:
                best, better = error_now, now
    logger.debug(
        f"Layers from {window.start}: validation error {before:.4f} -> {best:.4f}"
    )
    return better, {"layer": window.start, "before": before, "after": best}
