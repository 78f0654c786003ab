# SPDX-License-Identifier: Apache-2.0
"""Let a model save itself in a sparse format, after llm-compressor's own save."""

from collections.abc import Callable, Collection
from functools import wraps
from pathlib import Path

from transformers import PreTrainedModel

from nm_permute_plugin.checkpoint.config import Format
from nm_permute_plugin.checkpoint.writer import convert


def convert_on_save(
    model: PreTrainedModel, format: Format, modules: Collection[str]
) -> None:
    """
    From now on, ``model.save_pretrained`` leaves a checkpoint of the given format.

    llm-compressor's save runs first, then the finished folder is converted in place, so
    it works for ``oneshot(output_dir=...)`` and for a save by hand. No value changes; a
    module that is not 2:4 by then (a later modifier undid its mask) is refused, and the
    folder keeps what llm-compressor saved.

    :param modules: the modules to store sparse
    """
    save: Callable[..., None] = model.save_pretrained

    @wraps(save)
    def save_and_convert(save_directory: str | Path, **kwargs: object) -> None:
        save(save_directory, **kwargs)
        convert(save_directory, save_directory, format, modules=modules)

    # llm-compressor wraps every save_pretrained that does not say it has been wrapped.
    save_and_convert.__dict__["_overridden"] = True
    model.save_pretrained = save_and_convert
