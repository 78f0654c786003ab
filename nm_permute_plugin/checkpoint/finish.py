# SPDX-License-Identifier: Apache-2.0
"""What is left to do once a pruned model has been saved: check, store, describe."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from loguru import logger

from nm_permute_plugin.checkpoint.model_card import Card, write_card
from nm_permute_plugin.checkpoint.pattern import (
    AskedFormat,
    check_pattern,
    choose_format,
    to_store_sparse,
)
from nm_permute_plugin.checkpoint.record import write_record
from nm_permute_plugin.checkpoint.writer import convert
from nm_permute_plugin.maths.permutation import Permutation


@dataclass(frozen=True)
class Finish:
    """
    What a run leaves to be done with each of its checkpoints.

    :param asked: the format of the recipe
    :param card: what the card tells; its format and reason are found out here
    :param perms: by space, ``new[j] = old[perm[j]]``
    :param report: for the record: what JSON can hold
    """

    asked: AskedFormat
    card: Card
    perms: Mapping[str, Permutation]
    report: Mapping[str, object]

    def __call__(self, folder: Path) -> None:
        """
        Hold a saved checkpoint to its pattern, store it as asked, leave record and card.

        :raises ValueError: if a pruned module does not follow the pattern any more,
            naming module, row and channels
        """
        pattern, pruned = self.card.pattern, self.card.pruned
        transposed = self.card.transposed
        check_pattern(folder, pruned, pattern, transposed)
        format, reason = choose_format(folder, self.asked, pattern, pruned, transposed)
        logger.info(f"stored {format}: {reason}")
        if format != "dense":
            # pruning modifiers of the host leave -0.0 behind
            convert(
                folder,
                folder,
                format,
                modules=to_store_sparse(self.asked, pruned),
                pattern=pattern,
                clear_zeros=True,
            )
        write_record(folder, self.perms, self.report)
        write_card(folder, replace(self.card, format=format, reason=reason))
