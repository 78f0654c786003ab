# SPDX-License-Identifier: Apache-2.0
"""Finish a pruned model's checkpoint once it is saved: check, convert, describe it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from loguru import logger

from nm_permute_plugin.checkpoint.checksums import write_checksums
from nm_permute_plugin.checkpoint.config import AskedFormat, Format
from nm_permute_plugin.checkpoint.directory import Checkpoint, open_checkpoint
from nm_permute_plugin.checkpoint.model_card import Card, write_card
from nm_permute_plugin.checkpoint.pattern import check_pattern
from nm_permute_plugin.checkpoint.plan import choose_format, make_plan
from nm_permute_plugin.checkpoint.record import (
    Promise,
    composed,
    earlier_record,
    write_record,
)
from nm_permute_plugin.checkpoint.report import make_page_if_possible
from nm_permute_plugin.checkpoint.source import Source
from nm_permute_plugin.checkpoint.unloaded import carry_tensors
from nm_permute_plugin.checkpoint.writer import rewrite
from nm_permute_plugin.maths.permutation import Permutation, is_identity


@dataclass(frozen=True)
class Finish:
    """
    Does with each checkpoint of a run what is left to do.

    :param asked: the format that the recipe asks for
    :param card: what the card tells; its format and reason are found out here
    :param perms: by space, ``new[j] = old[perm[j]]``
    :param report: goes into the record, and must fit into JSON
    :param source: the folder that the model was loaded from, if there is one
    """

    asked: AskedFormat
    card: Card
    perms: Mapping[str, Permutation]
    report: Mapping[str, object]
    source: Source | None = None

    def __call__(self, folder: Path) -> None:
        """
        Checks a checkpoint's pattern, stores it as asked, and adds record, checksums,
        card and page.

        The record is told from the model that was folded first, also where an earlier
        run of this process or of the folder folded it before.

        :raises ValueError: if a pruned module does not follow the pattern any more,
            naming module, row and channels
        """
        card, source = self.card, self.source
        if source is not None and source.carried:
            carry_tensors(source.path, folder, source.carried)
        promise = Promise(list(card.pruned), card.pattern, list(card.transposed))
        checkpoint, format, reason = store(folder, self.asked, promise)
        perms, report = self.perms, self.report
        earlier = earlier_record(folder)
        if earlier is not None:
            perms, report = composed(*earlier, perms, report)
        elif source is not None and source.report is not None:
            perms, report = composed(source.perms, source.report, perms, report)
        write_record(folder, perms, report)
        write_checksums(folder, [shard.path.name for shard in checkpoint.shards])
        moved = not all(is_identity(perm) for perm in perms.values())
        card = replace(card, format=format, reason=reason, moved=moved)
        write_card(checkpoint, card)
        make_page_if_possible(folder)


def store(
    folder: Path, asked: AskedFormat, promise: Promise
) -> tuple[Checkpoint, Format, str]:
    """
    Checks that a checkpoint keeps a promise, and stores it as asked, without checksums.

    :return: the checkpoint, how it is stored, and why
    :raises ValueError: if a promised module does not follow the pattern
    """
    pattern, pruned, transposed = promise.pattern, promise.modules, promise.transposed
    checkpoint = open_checkpoint(folder)
    counted = check_pattern(checkpoint, pruned, pattern, transposed)
    format, reason = choose_format(checkpoint, asked, pattern, pruned, transposed)
    logger.info(f"The checkpoint is stored as {format}: {reason}")
    if format != "dense":
        # pruning modifiers of llm-compressor leave -0.0 behind
        plan = make_plan(
            checkpoint, format, pruned, pattern, clear=True, counted=counted
        )
        rewrite(checkpoint, plan, folder, checksums=False)
        checkpoint = open_checkpoint(folder)
    return checkpoint, format, reason
