# SPDX-License-Identifier: Apache-2.0
"""Open a model's folder: its class, what that takes, its weights, its image processor."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from nm_permute_plugin._files import LARGEST_JSON, read_json
from nm_permute_plugin.checkpoint.checksums import refuse_changed
from nm_permute_plugin.checkpoint.shards import DamagedError, open_shard
from nm_permute_plugin.pruning.positions import fit_length
from nm_permute_plugin.pruning.running.fast_dtype import to_fast_dtype

_MOST_TOKENS = 1 << 24  # of a vocabulary: the largest have a million
_LONGEST = 400  # characters of what transformers says

CODE = "wants code of its own to be run"
"""In the message of an error about a folder that transformers would run code of."""


def config_of(folder: str | Path) -> Any:
    """
    Read a checkpoint's config, without running code that may lie beside it.

    :raises ValueError: if it needs such code, or cannot be read
    """
    with _blaming(folder, "config.json"):
        return _without_code(AutoConfig, folder)


def model_class(folder: str | Path) -> Any:
    """
    Find the class of transformers that a checkpoint's config names.

    :raises ValueError: if it names none
    """
    names = config_of(folder).architectures or []
    kind = getattr(transformers, names[0], None) if names else None
    if kind is None:
        raise ValueError(
            f"{folder}/config.json names no class of transformers in `architectures`: "
            f"{names}"
        )
    return kind


def tokenizer_of(folder: str | Path) -> Any:
    """
    Load a checkpoint's tokenizer, without running code that may lie beside it.

    :raises ValueError: if it needs such code, or cannot be read
    """
    with _blaming(folder, "tokenizer.json", "tokenizer_config.json"):
        _refuse_huge_numbers(Path(folder, "tokenizer.json"))
        tokenizer = _without_code(AutoTokenizer, folder)
        tokenizer("a")  # some of its fields are only looked at now
        return tokenizer


def _refuse_huge_numbers(file: Path) -> None:
    """Refuse numbers of tokens for which the tokenizers package ends the process."""
    if not file.is_file():
        return
    content = read_json(file)
    model = content.get("model") if isinstance(content, dict) else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    for token, number in vocabulary.items() if isinstance(vocabulary, dict) else ():
        if type(number) is not int or not 0 <= number < _MOST_TOKENS:
            raise ValueError(
                f"{file}: the token {token!r} has the number {str(number)[:40]}"
            )


def load_model(folder: str | Path, **options: Any) -> Any:
    """
    Load a model as it is on disk, without running code that may lie beside it.

    :param options: as ``from_pretrained`` takes them; the dtype is the stored one
    :raises ValueError: for weights that are damaged, or pickled and would run code
    """
    kind = model_class(folder)
    pickled = [] if any(Path(folder).glob("*.safetensors")) else _pickled(folder)
    with _blaming(folder, "config.json"):
        try:
            return _without_code(kind, folder, **{"dtype": "auto", **options})
        except (UnpicklingError, EOFError, KeyError, RuntimeError) as error:
            if "automatic conversion" in str(error):
                raise ValueError(_damage(Path(folder))) from error
            if not pickled:
                raise
            names = ", ".join(str(file) for file in pickled)
            raise ValueError(
                f"{names}: these pickled weights are damaged, or would run code when "
                "they are read; take the model as safetensors"
            ) from error


def empty_model(folder: str | Path) -> nn.Module:
    """Make a checkpoint's model on the device meta, which takes no memory."""
    kind = model_class(folder)
    with _blaming(folder, "config.json"), torch.device("meta"):
        made: nn.Module = kind._from_config(config_of(folder))
        return made


def load_checkpoint(checkpoint: str | Path, device: str) -> nn.Module:
    """
    Load a model as it is on disk, sparse formats included, ready to be run.

    On a CPU it is held in the dtype in which that is fast.

    :raises ValueError: if it has checksums, and a file is not as it was written
    """
    refuse_changed(Path(checkpoint))
    loaded: nn.Module = load_model(checkpoint).to(device).eval()
    to_fast_dtype(loaded)
    return loaded


def row_length(
    folder: str | Path,
    asked: int | None,
    default: int,
    option: str = "--sequence-length",
) -> int:
    """
    The length of rows of text for a checkpoint, which its positions limit.

    :param asked: by the option, in tokens; None for the default
    :raises ValueError: if the model has fewer learned positions than was asked for
    """
    return fit_length(config_of(folder), asked, default, option)


def image_processor(folder: str | Path) -> Any:
    """
    Load what turns images into a checkpoint's pixels; torchvision is not needed.

    :raises ValueError: if the checkpoint has none
    """
    try:
        with _blaming(folder, "preprocessor_config.json"):
            return _without_code(AutoImageProcessor, folder, backend="pil")
    except (OSError, ValueError) as error:
        if CODE in str(error):
            raise
        raise ValueError(
            f"{folder} has no image processor (preprocessor_config.json), which says how "
            "images become pixels; copy it from the model's original folder"
        ) from error


def _without_code(kind: Any, folder: str | Path, **options: Any) -> Any:
    """
    Load something of a checkpoint; never asks, and never runs code of the folder.

    :raises ValueError: if it cannot be had without
    """
    try:
        return kind.from_pretrained(folder, trust_remote_code=False, **options)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{folder} {CODE}, which is never run: take a model whose class is part of "
            "transformers, or remove `auto_map` from its JSON files"
        ) from error


@contextmanager
def _blaming(folder: str | Path, *names: str) -> Iterator[None]:
    """
    Let an error of transformers about a folder's files name the file.

    :param names: of the files that are read, where none is found to be damaged
    :raises ValueError: in place of whatever a file causes that is not as it should be
    """
    for file in Path(folder).glob("*.json"):
        if file.is_file() and file.stat().st_size > LARGEST_JSON:
            size = f"{file.stat().st_size:,} bytes"
            raise ValueError(
                f"{file} has {size}, which is too large for JSON of a model"
            )
    try:
        yield
    except (ImportError, MemoryError, OSError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        told = str(error)
        if str(folder) in told or "DefaultCPUAllocator" in told:
            raise
        blamed = _damaged_file(Path(folder)) or ", ".join(
            str(Path(folder, name)) for name in names
        )
        said = f"{type(error).__name__}: {' '.join(told.split())[:_LONGEST]}"
        raise ValueError(f"{blamed}: transformers cannot read it: {said}") from error


def _damaged_file(folder: Path) -> str:
    """Say what is wrong with the first damaged file of a folder; nothing if none is."""
    for file in sorted(folder.glob("*.json")):
        try:
            read_json(file)
        except (OSError, ValueError) as error:
            return str(error)
    for file in sorted(folder.glob("*.safetensors")):
        try:
            open_shard(file)
        except DamagedError as error:
            return str(error)
    return ""


def _damage(folder: Path) -> str:
    """Say what is wrong with weights that transformers could not decode."""
    from nm_permute_plugin.checkpoint.verify import verify

    for fault in verify(folder).faults:
        return f"{folder / fault.file}: {fault.tensor}: {fault.message}"
    return f"{folder}: its weights cannot be decoded; make the checkpoint again"


def _pickled(folder: str | Path) -> list[Path]:
    return sorted(Path(folder).glob("pytorch_model*.bin"))


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
