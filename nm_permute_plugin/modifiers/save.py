# SPDX-License-Identifier: Apache-2.0
"""Finish and check every checkpoint that a model saves, before it is there to be read."""

import os
import shutil
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path

from compressed_tensors.distributed import is_source_process
from transformers import PreTrainedModel

from nm_permute_plugin.checkpoint.model_card import keep_foreign_card

UNFINISHED = ".nm_permute.unfinished"
"""The folder inside the target that holds a checkpoint until it is finished."""


def after_save(model: PreTrainedModel, finish: Callable[[Path], None]) -> None:
    """
    From now on, ``model.save_pretrained(folder)`` ends with ``finish``.

    It works for ``oneshot(output_dir=...)`` and for a save by hand. The checkpoint is
    written and finished in a folder of its own and then moved into place: where
    ``finish`` refuses it, ``folder`` holds what it held before.

    :raises ValueError: on saving, for ``push_to_hub``: it would upload what is unfinished
    """
    save: Callable[..., None] = model.save_pretrained

    @wraps(save)
    def save_and_finish(save_directory: str | Path, **kwargs: object) -> None:
        if kwargs.get("push_to_hub"):
            raise ValueError(
                "save_pretrained(push_to_hub=True) would upload the checkpoint before "
                "it is finished and checked; save it, then upload the folder"
            )
        target = Path(save_directory)
        unfinished = target / UNFINISHED
        is_new = not target.exists()
        if is_source_process():
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        try:
            save(unfinished, **kwargs)
            if is_source_process():
                finish(unfinished)
                _move(unfinished, target)
        finally:
            if is_source_process():
                shutil.rmtree(unfinished, ignore_errors=True)
                if is_new and not any(target.iterdir()):
                    target.rmdir()

    # llm-compressor wraps every save_pretrained that does not say it has been wrapped.
    save_and_finish.__dict__["_overridden"] = True
    model.save_pretrained = save_and_finish


def _move(unfinished: Path, target: Path) -> None:
    """Put a checkpoint in an older one's place; ``config.json`` goes first and last."""
    keep_foreign_card(target)
    (target / "config.json").unlink(missing_ok=True)
    for old in _weights(target):
        old.unlink()
    entries = sorted(unfinished.iterdir(), key=lambda entry: entry.name)
    for entry in sorted(entries, key=lambda entry: entry.name == "config.json"):
        place = target / entry.name
        if entry.is_dir() and place.exists():
            shutil.rmtree(place)
        os.replace(entry, place)


def _weights(folder: Path) -> Iterable[Path]:
    yield from folder.glob("model*.safetensors")
    yield from folder.glob("model*.safetensors.index.json")
