# SPDX-License-Identifier: Apache-2.0
"""Save a transformers model so that its checkpoint is finished before it can be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from torch import distributed

from nm_permute_plugin.checkpoint import transaction
from nm_permute_plugin.checkpoint.card_file import keep_foreign_card
from nm_permute_plugin.checkpoint.source import Source, carry_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MARK = "saved"
_REPLACED = ("config.json", "model*.safetensors", "model*.safetensors.index.json")


def save_checkpoint(
    model: PreTrainedModel,
    folder: str | Path,
    finish: Callable[[Path], None],
    save: Callable[..., None] | None = None,
    source: Source | None = None,
    also: Callable[[Path], object] | None = None,
    **save_options: object,
) -> None:
    """
    Saves a model, finishes its checkpoint, and only then puts it into the folder.

    Where saving or ``finish`` fails, the folder holds what it held before. Files of an
    older save are replaced, other files in the folder stay. What the model's own folder
    holds beside its weights is taken along.

    :param finish: is called with the directory of the saved checkpoint
    :param save: writes the model to a directory; by default ``model.save_pretrained``
    :param source: the model's own folder
    :param also: writes what belongs to the checkpoint as well, such as its tokenizer
    :param save_options: go to ``save``
    :raises ValueError: for ``push_to_hub``, which would upload what is not finished
    :raises OSError: if it cannot be written
    """
    if save_options.get("push_to_hub"):
        raise ValueError(
            "save_pretrained(push_to_hub=True) would upload the checkpoint before "
            "it is finished and checked; save it, then upload the folder"
        )
    save = save or model.save_pretrained
    target = Path(folder).resolve()
    together = distributed.is_available() and distributed.is_initialized()
    first = not together or distributed.get_rank() == 0
    inside = transaction.is_unfinished(target)  # whoever made it puts it in its place
    if inside or not first:
        fresh = target if inside else transaction.unfinished(target, _MARK)
        with _savable(model), writing(target):
            save(fresh, **save_options)
            if first and also is not None:
                also(fresh)
        if first:
            _finish(model, finish, source, fresh)
        return
    # a name that all processes know, and that two runs into one folder do not share
    mark = _MARK if together else None
    with transaction.directory(target, _stays, mark) as fresh:
        with _savable(model), writing(target):
            save(fresh, **save_options)
            if also is not None:
                also(fresh)
        _finish(model, finish, source, fresh, target)
        keep_foreign_card(target, fresh)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """
    Let the safetensors package say that it cannot write as everybody else does.

    :raises OSError: in place of its own error, where the disk is full for example
    """
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"cannot write {target}: {error}") from error


@contextmanager
def _savable(model: PreTrainedModel) -> Iterator[None]:
    """
    Hides generation settings that transformers loads and does not save.

    Such are a temperature without sampling, which many models of the hub have.
    """
    settings = model.generation_config if _is_refused(model) else None
    if settings is None:
        yield
        return
    model.generation_config = type(settings)()
    try:
        yield
    finally:
        model.generation_config = settings


def _finish(
    model: PreTrainedModel,
    finish: Callable[[Path], None],
    source: Source | None,
    folder: Path,
    target: Path | None = None,
) -> None:
    if _is_refused(model):
        path = folder / "generation_config.json"
        model.generation_config.to_json_file(path, keys_to_pop=["compile_config"])
    finish(folder)
    if source is not None:
        carry_files(source.path, folder, target)


def _is_refused(model: PreTrainedModel) -> bool:
    settings = getattr(model, "generation_config", None)
    if settings is None:
        return False
    try:
        settings.validate(strict=True)
    except ValueError:
        return True
    return False


def _stays(name: str) -> bool:
    """Tells whether a file of an older checkpoint stays beside the new one's."""
    return not any(fnmatch(name, pattern) for pattern in _REPLACED)
