# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's own class of transformers, and what that takes."""

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig


def model_class(folder: str | Path) -> Any:
    """
    The class of transformers that a checkpoint's config names.

    :raises ValueError: if it names none
    """
    names = AutoConfig.from_pretrained(folder).architectures or []
    kind = getattr(transformers, names[0], None) if names else None
    if kind is None:
        raise ValueError(
            f"{folder}/config.json names no class of transformers in `architectures`: "
            f"{names}"
        )
    return kind


def refuse_images_for(folder: str | Path) -> None:
    """
    See that a checkpoint takes images, and images alone.

    :raises ValueError: if it does not
    """
    kind = model_class(folder)
    takes = _modalities(kind)
    if "image" not in takes:
        raise ValueError(f"{kind.__name__} takes no images; give --text FILE instead")
    if "text" in takes:
        raise ValueError(
            f"{kind.__name__} takes text with its images, and pictures alone say nothing "
            "to it: give --text FILE, or call llmcompressor.oneshot with samples of the "
            "model's processor"
        )


def refuse_text_for(folder: str | Path) -> None:
    """
    See that a checkpoint takes text.

    :raises ValueError: if it does not
    """
    kind = model_class(folder)
    if "text" not in _modalities(kind):
        raise ValueError(f"{kind.__name__} takes no text; give --images FOLDER instead")


def refuse_perplexity_of(folder: str | Path) -> None:
    """
    See that a checkpoint predicts the next token of text.

    :raises ValueError: if it does not
    """
    refuse_text_for(folder)
    kind = model_class(folder)
    if not kind.can_generate():
        raise ValueError(
            f"{kind.__name__} predicts no next token: perplexity is for language models"
        )


def _modalities(kind: Any) -> set[str]:
    stated = kind.input_modalities
    return {stated} if isinstance(stated, str) else set(stated)
