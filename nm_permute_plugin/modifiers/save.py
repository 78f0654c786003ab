# SPDX-License-Identifier: Apache-2.0
"""Finish every checkpoint that a model saves from now on."""

import shlex
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from loguru import logger
from transformers import PreTrainedModel

from nm_permute_plugin._words import file_size
from nm_permute_plugin.checkpoint.saving import save_checkpoint
from nm_permute_plugin.checkpoint.source import Source
from nm_permute_plugin.checkpoint.transaction import is_unfinished
from nm_permute_plugin.modifiers.host import running_oneshot
from nm_permute_plugin.pruning import ranks


def after_save(
    model: PreTrainedModel,
    finish: Callable[[Path], None],
    source: Source | None = None,
    said: str = "",
) -> None:
    """
    Makes every ``model.save_pretrained(folder)`` from now on end with ``finish``.

    It works for ``oneshot(output_dir=...)``, whose tokenizer is then part of the whole,
    and for a save by hand. Where ``finish`` refuses the checkpoint, ``folder`` holds what
    it held before.

    :param source: the model's own folder, whose other files are taken along
    :param said: what the log says of a checkpoint when it is complete, beside its size
    :raises ValueError: on saving, for ``push_to_hub``: it would upload what is unfinished;
        from ``model.push_to_hub``, which would upload another card
    """
    save: Callable[..., None] = model.save_pretrained

    @wraps(save)
    def save_and_finish(save_directory: str | Path, **kwargs: object) -> None:
        host = _saving_oneshot(save_directory)
        also = None if host is None else host.model_args.processor.save_pretrained
        save_checkpoint(model, save_directory, finish, save, source, also, **kwargs)
        if host is not None:
            host.model_args.processor = None  # it is saved, and not written again
        ranks.wait()  # for the first to have put it in its place
        folder = Path(save_directory)
        # Of an unfinished folder, whoever puts it in its place says so.
        if said and ranks.is_first() and not is_unfinished(folder.resolve()):
            files = (file for file in folder.rglob("*") if file.is_file())
            size = sum(file.stat().st_size for file in files)
            images = model.main_input_name == "pixel_values"
            test = ["--images", "CLASS_FOLDERS"] if images else ["--text", "TEST.txt"]
            dense = "DENSE" if source is None else str(source.path)
            words = ["nm-permute", "evaluate", str(folder), *test, "--dense", dense]
            logger.info(
                f"{folder}: {file_size(size)}, {said}; next: {shlex.join(words)}"
            )

    def refuse_push(*_: object, **__: object) -> None:
        raise ValueError(
            "model.push_to_hub would replace the checkpoint's README.md by an empty card; "
            "save the model, then upload the folder: hf upload REPOSITORY FOLDER"
        )

    model.push_to_hub = refuse_push
    # llm-compressor wraps every save_pretrained that does not say it has been wrapped.
    save_and_finish.__dict__["_overridden"] = True
    model.save_pretrained = save_and_finish


def _saving_oneshot(folder: str | Path) -> Any:
    """
    Find the ``Oneshot`` that saves into a folder now, and its processor afterwards.

    :return: None where the save is another's, or there is no processor
    """
    host = running_oneshot()
    out = getattr(host, "output_dir", None)
    if out is None or host.model_args.processor is None:
        return None
    is_its_own = Path(folder).resolve().is_relative_to(Path(out).resolve())
    return host if is_its_own else None
