# SPDX-License-Identifier: Apache-2.0
"""Calibration samples, text or images: those that train and those that only judge."""

from dataclasses import dataclass

import torch

from nm_permute_plugin.pruning.statistics import Batch, token_mask


@dataclass(frozen=True)
class Samples:
    """
    Batches to measure and train on, and batches that judge.

    :param train: batches of samples
    :param validation: batches of samples that are in no training batch
    """

    train: list[Batch]
    validation: list[Batch]

    @property
    def tokens(self) -> int:
        """Tokens to train on; images alone have none."""
        texts = [batch for batch in self.train if "input_ids" in batch]
        return sum(int(token_mask(batch).sum()) for batch in texts)

    def __str__(self) -> str:
        """
        What there is to train on, in words.

        >>> str(Samples([{"pixel_values": torch.zeros(5, 3, 8, 8)}], []))
        '5 images'
        """
        pictured = [batch for batch in self.train if "pixel_values" in batch]
        if not pictured:
            return f"{self.tokens} tokens"
        if self.tokens:
            return f"{self.tokens} tokens and {len(pictured)} images"
        return f"{sum(len(batch['pixel_values']) for batch in pictured)} images"


def deal(count: int, validation: float, seed: int) -> tuple[list[int], list[int]]:
    """
    The numbers of the samples that train, and of those that judge, in random order.

    :param validation: the share of samples that only judge; at least one, never all
    :raises ValueError: if there are fewer than two samples
    """
    if count < 2:
        raise ValueError(
            f"the calibration data has {count} row; at least 2 are needed, one to "
            "train on and one to hold back. Use more samples, or shorter ones."
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator).tolist()
    judges = min(max(1, round(validation * count)), count - 1)
    return order[judges:], order[:judges]
