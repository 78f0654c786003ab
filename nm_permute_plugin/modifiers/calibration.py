# SPDX-License-Identifier: Apache-2.0
"""The calibration data of ``oneshot``, all of it where several ranks run."""

from collections.abc import Iterable
from typing import Any

from torch.utils.data import DataLoader

from nm_permute_plugin.pruning import ranks


def all_samples(calibration: Any) -> Iterable[Any] | None:
    """
    The batches of llm-compressor's data loader, or those of the whole data set.

    Where ranks have the same data set, llm-compressor 0.14 means to give each a share of
    it, but counts the samples of every share from the first of the data set on: all ranks
    get the first share, and the other shares are never read. All ranks share all samples
    here, so the whole is read instead.

    :param calibration: a data loader, or batches of another kind, which stay as they are
    """
    sampler: Any = getattr(calibration, "sampler", None)
    share, whole = getattr(sampler, "data_source", None), _dataset(calibration)
    if ranks.count() == 1 or share is None or whole is None or len(share) == len(whole):
        batches: Iterable[Any] | None = calibration
        return batches
    count = min(round(ranks.total(len(sampler))), len(whole))
    size = calibration.batch_size
    return DataLoader(
        whole,
        batch_size=size,
        sampler=type(sampler)(whole, num_samples=count, **_batch_size(sampler)),
        collate_fn=calibration.collate_fn,
    )


def _dataset(calibration: Any) -> Any:
    dataset = getattr(calibration, "dataset", None)
    return dataset if hasattr(dataset, "__len__") else None


def _batch_size(sampler: Any) -> dict[str, int]:
    """What llm-compressor's own sampler wants to know beside a random one."""
    size = getattr(sampler, "batch_size", None)
    return {} if size is None else {"batch_size": size}
