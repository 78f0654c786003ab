# SPDX-License-Identifier: Apache-2.0
"""Finish every checkpoint that a model saves from now on."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path

from transformers import PreTrainedModel

from nm_permute_plugin.checkpoint.saving import save_checkpoint
from nm_permute_plugin.checkpoint.source import Source


def after_save(
    model: PreTrainedModel,
    finish: Callable[[Path], None],
    source: Source | None = None,
) -> None:
    """
    Makes every ``model.save_pretrained(folder)`` from now on end with ``finish``.

    It works for ``oneshot(output_dir=...)`` and for a save by hand. Where ``finish``
    refuses the checkpoint, ``folder`` holds what it held before.

    :param source: the model's own folder, whose other files are taken along
    :raises ValueError: on saving, for ``push_to_hub``: it would upload what is unfinished
    """
    save: Callable[..., None] = model.save_pretrained

    @wraps(save)
    def save_and_finish(save_directory: str | Path, **kwargs: object) -> None:
        save_checkpoint(model, save_directory, finish, save, source, **kwargs)

    # llm-compressor wraps every save_pretrained that does not say it has been wrapped.
    save_and_finish.__dict__["_overridden"] = True
    model.save_pretrained = save_and_finish
