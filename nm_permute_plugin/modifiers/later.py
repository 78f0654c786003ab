# SPDX-License-Identifier: Apache-2.0
"""Have ``oneshot`` say again that a model is sparse that was pruned earlier."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path

from llmcompressor.entrypoints import utils
from loguru import logger
from transformers import PreTrainedModel

from nm_permute_plugin.checkpoint.again import FinishAgain, promise_of
from nm_permute_plugin.checkpoint.pattern import BrokenPatternError
from nm_permute_plugin.modifiers.save import after_save
from nm_permute_plugin.pruning.run import origin_of

_MARK = "_keeps_promise"


def keep_promises() -> None:
    """
    Finish what ``oneshot`` saves of a model whose own folder says that it is sparse.

    llm-compressor writes an empty ``sparsity_config`` for it, whatever its modifiers kept.
    Calling it again changes nothing.
    """
    modify: Callable[[PreTrainedModel], None] = utils.modify_save_pretrained
    if hasattr(modify, _MARK):
        return

    @wraps(modify)
    def modify_and_keep(model: PreTrainedModel) -> None:
        modify(model)
        folder = origin_of(model).folder
        if folder is None or hasattr(model.save_pretrained, _MARK):
            return
        try:
            promise = promise_of(folder)
        except ValueError as error:
            logger.warning(f"{folder} may be sparse, and will not be saved so: {error}")
            return
        if promise is not None:
            after_save(model, _FinishIfKept(FinishAgain(origin_of(model))))
            setattr(model.save_pretrained, _MARK, True)

    setattr(modify_and_keep, _MARK, True)
    utils.modify_save_pretrained = modify_and_keep


@dataclass(frozen=True)
class _FinishIfKept:
    """Finishes a checkpoint that is still sparse, and leaves another as it was saved."""

    finish: FinishAgain

    def __call__(self, folder: Path) -> None:
        try:
            self.finish(folder)
        except BrokenPatternError as error:
            logger.warning(
                "The model was sparse when it was read; it is saved as a dense one, which "
                f"promises nothing: {error}"
            )
