# SPDX-License-Identifier: Apache-2.0
"""What a person sees while a command works: logs on stderr, and none that mislead."""

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

MISLEADING = (
    # On a CPU, at every look at the device; ours names the device once.
    "No accelerator available! Compressing model on CPU instead",
    # The host feeds it no data because it reads all of them by itself.
    "Inferred `DataFreePipeline` for `LearnablePermutationModifier`",
    # A path inside of the folder of unfinished work, which is gone a moment later.
    "Resaved original config with patched fields to ",
    # Of the share of a rank, where several run; they share all samples.
    "samples but the provided dataset only has",
    # A warning of what the host has done already; nobody has to do anything.
    "Disabling tokenizer parallelism due to threading conflict",
)
"""Parts of lines of llm-compressor's log that are left out."""

QUIET = {
    "LLM_COMPRESSOR_LOG_LEVEL": "ERROR",
    "LOGURU_LEVEL": "ERROR",  # of our own log, and of every process that we start
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TQDM_DISABLE": "1",
    "PYTHONWARNINGS": "ignore",
}
"""What the hosts read when they are imported, which no command has done at its start."""


LINES = "<level>{level}</level>: {message}"
"""
The form of our own log where llm-compressor, which gives it another one, takes no part.
"""


def be_plain() -> None:
    """Have our own log say what is the matter, not in which line of which file."""
    os.environ.setdefault("LOGURU_FORMAT", LINES)


def be_quiet() -> None:
    """Have the hosts and our own log say errors only, from their import on."""
    os.environ.update(QUIET)
    warnings.simplefilter("ignore")


class HostLog:
    """Write to the stderr of the moment, less what misleads: a log outlives its stream."""

    def write(self, text: str) -> int:
        """Write a line of a log, unless it misleads."""
        if any(part in text for part in MISLEADING):
            return len(text)
        return sys.stderr.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


@contextmanager
def nothing_misleading() -> Iterator[None]:
    """Leave out what the hosts say of a model that lies whole on one device."""
    from compressed_tensors.compressors.model_compressors import model_compressor
    from compressed_tensors.distributed import module_parallel
    from compressed_tensors.offload import dispatch
    from compressed_tensors.utils import patch_attr
    from tqdm import tqdm

    def compressing(modules: Sequence[object], **options: Any) -> Any:
        # Without quantization there is nothing to compress: a bar of 0 modules.
        return tqdm(modules, **options) if modules else modules

    def dispatching(modules: Sequence[object], **options: Any) -> Any:
        # After a save every module goes to where it is: no bar of it.
        return modules

    def compressing_in_ranks(total: int, **options: Any) -> Any:
        return tqdm(total=total, **options | ({} if total else {"disable": True}))

    with warnings.catch_warnings(), ExitStack() as patches:
        # transformers takes every model whose device is the CPU for an offloaded one.
        warnings.filterwarnings(
            "ignore", "Attempting to save a model with offloaded modules"
        )
        for module, bar in ((model_compressor, compressing), (dispatch, dispatching)):
            if hasattr(module, "tqdm"):
                patches.enter_context(patch_attr(module, "tqdm", bar))
        patches.enter_context(patch_attr(module_parallel, "tqdm", compressing_in_ranks))
        yield
