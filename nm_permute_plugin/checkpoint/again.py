# SPDX-License-Identifier: Apache-2.0
"""Finish the checkpoint of a model that was pruned in an earlier session."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from loguru import logger

from nm_permute_plugin.checkpoint.base_card import base_matter
from nm_permute_plugin.checkpoint.checksums import write_checksums
from nm_permute_plugin.checkpoint.config import AskedFormat, read_sparsity_config
from nm_permute_plugin.checkpoint.directory import (
    Checkpoint,
    open_checkpoint,
    read_json,
)
from nm_permute_plugin.checkpoint.finish import Finish, store
from nm_permute_plugin.checkpoint.model_card import Card
from nm_permute_plugin.checkpoint.packed import packed_modules
from nm_permute_plugin.checkpoint.plan import TWO_FOUR, make_plan
from nm_permute_plugin.checkpoint.record import Promise, read_promise, read_record
from nm_permute_plugin.checkpoint.verify import declared_sparse


@dataclass(frozen=True)
class Origin:
    """
    Says where a model comes from that was pruned before it was read.

    :param folder: the checkpoint that it was read from; None where it is no folder of
        this machine, which promises nothing
    :param name: what the card calls that checkpoint, where no record names its base model
    :param prefix: the name of the base model inside of its class with a head
    """

    folder: Path | None
    name: str
    prefix: str


@dataclass(frozen=True)
class FinishAgain:
    """
    Does with a checkpoint of a model that was pruned earlier what is left to do.

    Sparse must be what the model's origin promises to be sparse, by its config.json or
    by the record of the run that pruned. Without a promise, every matrix that is 2:4 is.
    """

    origin: Origin

    def __call__(self, folder: Path) -> None:
        """
        Checks a checkpoint's pattern, stores it sparse, and adds record and card.

        :raises ValueError: if a promised module does not follow its pattern any more,
            naming it, or if nothing was promised and nothing is 2:4
        """
        source = self.origin.folder
        checkpoint = open_checkpoint(folder)
        promise = None if source is None else promise_of(source)
        if source is None or promise is None:
            promise = Promise(_two_of_four(checkpoint), TWO_FOUR, [])
            _store(folder, "auto", promise)
            return
        promise = self._renamed(promise, checkpoint)
        recorded = read_promise(source)
        if recorded is None:
            _store(folder, _asked(source, "auto"), promise)
            return
        perms, report = read_record(source)
        told = cast("dict[str, Any]", report)
        card = Card(
            base_model=str(told.get("base_model", self.origin.name)),
            pattern=promise.pattern,
            pruned=promise.modules,
            fold_error=told["fold_error"],
            retained=tuple(told["retained"]),
            history=told["history"],
            versions=told["versions"],
            transposed=promise.transposed,
            base=base_matter(source),
            changed_later=True,
        )
        report |= {
            "pruned": promise.modules,
            "transposed": promise.transposed,
            "changed_later": True,
        }
        asked = _asked(source, told["modifier"].get("format", "auto"))
        Finish(asked, card, perms, report)(folder)

    def _renamed(self, promise: Promise, checkpoint: Checkpoint) -> Promise:
        """Finds the promised modules, which a class without the head names shorter."""
        known = {*checkpoint.formats, *packed_modules(checkpoint)}
        prefix = f"{self.origin.prefix}."
        names = {}
        for module in promise.modules:
            others = (module, module.removeprefix(prefix), f"{prefix}{module}")
            names[module] = next((name for name in others if name in known), "")
        gone = [module for module, name in names.items() if not name]
        if gone:
            logger.warning(
                f"{len(gone)} of {len(names)} modules that were {promise.pattern} are no "
                f"part of this model any more: {', '.join(gone[:3])}"
            )
        return Promise(
            [name for name in names.values() if name],
            promise.pattern,
            [names[name] for name in promise.transposed if names.get(name)],
        )


def _store(folder: Path, asked: AskedFormat, promise: Promise) -> None:
    checkpoint, _, _ = store(folder, asked, promise)
    write_checksums(folder, [shard.path.name for shard in checkpoint.shards])


def promise_of(folder: Path) -> Promise | None:
    """
    Reads what is sparse in a checkpoint, by its own word; None if it says nothing.

    :raises ValueError: if its config or record cannot be read
    """
    recorded = read_promise(folder)
    if recorded is not None:
        return recorded if recorded.modules else None
    sparsity = read_sparsity_config(read_json(folder / "config.json"))
    if sparsity is None or sparsity.pattern is None:
        return None
    modules = sorted(declared_sparse(open_checkpoint(folder), sparsity))
    return Promise(modules, sparsity.pattern, [])


def _asked(source: Path, recorded: AskedFormat) -> AskedFormat:
    """Returns the format to ask for: that of the source where it is the general one."""
    sparsity = read_sparsity_config(read_json(source / "config.json"))
    general = sparsity is not None and sparsity.format == "sparse-bitmask"
    return "sparse-bitmask" if general else recorded


def _two_of_four(checkpoint: Checkpoint) -> list[str]:
    """Lists the matrices that are 2:4."""
    plan = make_plan(checkpoint, "sparse-24-bitmask", None, clear=True)
    if not plan.nonzeros:
        module, reason = next(iter(plan.dense.items()), ("it", "it has no matrices"))
        raise ValueError(
            f"no matrix of the model can be stored as 2:4 ({module}: {reason}). If it was "
            "pruned, its training did not run under nm_permute_plugin.keep_masks; "
            "`model.save_pretrained` saves a dense model."
        )
    return list(plan.nonzeros)
