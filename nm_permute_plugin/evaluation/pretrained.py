# SPDX-License-Identifier: Apache-2.0
"""Open a model's folder: its class, what that takes, its weights, its image processor."""

import re
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig
from transformers.models.auto.image_processing_auto import AutoImageProcessor

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
"""A name that transformers may look up on the Hugging Face hub: ``ORGANISATION/NAME``."""


def must_be_model(name: str | Path) -> None:
    """
    See that a name is the folder of a model, or may be a model of the hub.

    :raises FileNotFoundError: if it is neither
    """
    if (Path(name) / "config.json").is_file():
        return
    if (Path(name) / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"{name} holds a PEFT adapter and no model: load it on its base model, save "
            "what merge_and_unload() returns, and give that folder"
        )
    if Path(name).exists():
        raise FileNotFoundError(
            f"{name} holds no checkpoint (no config.json); give the folder that "
            "save_pretrained wrote"
        )
    if not HUB_NAME.fullmatch(str(name)):
        raise FileNotFoundError(
            f"{name} does not exist; give a model's folder, or its name on the Hugging "
            "Face hub as ORGANISATION/NAME"
        )


def model_class(folder: str | Path) -> Any:
    """
    Find the class of transformers that a checkpoint's config names.

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


def load_checkpoint(checkpoint: str | Path, device: str) -> nn.Module:
    """Load a model as it is on disk, sparse formats included, ready to be run."""
    model = model_class(checkpoint).from_pretrained(checkpoint, dtype="auto")
    loaded: nn.Module = model.to(device).eval()
    return loaded


def image_processor(folder: str | Path) -> Any:
    """
    Load what turns images into a checkpoint's pixels; torchvision is not needed.

    :raises ValueError: if the checkpoint has none
    """
    try:
        return AutoImageProcessor.from_pretrained(folder, backend="pil")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} has no image processor (preprocessor_config.json), which says how "
            "images become pixels; copy it from the model's original folder"
        ) from error


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
            f"{kind.__name__} takes text with its images, and images alone say nothing "
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
