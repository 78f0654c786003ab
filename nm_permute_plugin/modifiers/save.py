# SPDX-License-Identifier: Apache-2.0
"""Do something to every checkpoint that a model saves, after llm-compressor's own save."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path

from transformers import PreTrainedModel


def after_save(model: PreTrainedModel, finish: Callable[[Path], None]) -> None:
    """
    From now on, ``model.save_pretrained(folder)`` ends with ``finish(folder)``.

    It works for ``oneshot(output_dir=...)`` and for a save by hand.
    """
    save: Callable[..., None] = model.save_pretrained

    @wraps(save)
    def save_and_finish(save_directory: str | Path, **kwargs: object) -> None:
        save(save_directory, **kwargs)
        finish(Path(save_directory))

    # llm-compressor wraps every save_pretrained that does not say it has been wrapped.
    save_and_finish.__dict__["_overridden"] = True
    model.save_pretrained = save_and_finish
