# SPDX-License-Identifier: Apache-2.0
"""
Learned permutations and masks that make N:M (2:4) pruning lose less.

Importing this package makes ``LearnablePermutationModifier`` known to the recipes of
llm-compressor, and has transformers read sparse checkpoints, without importing either.

A model in memory is pruned without a recipe:

    import nm_permute_plugin as nmp

    data = nmp.read_samples(model, [{"input_ids": tokens}])
    pruned = nmp.prune(model, data, nmp.Settings(mask_structure="2:4", method="learned"))
    nmp.save(model, "OUT", pruned)
    assert nmp.verify("OUT").good
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nm_permute_plugin._registration import register_when_imported

if TYPE_CHECKING:
    from nm_permute_plugin.checkpoint.verify import verify as verify
    from nm_permute_plugin.checkpoint.writer import convert as convert
    from nm_permute_plugin.maths.pattern import NMPattern as NMPattern
    from nm_permute_plugin.modifiers import (
        LearnablePermutationModifier as LearnablePermutationModifier,
    )
    from nm_permute_plugin.pruning.keep_masks import keep_masks as keep_masks
    from nm_permute_plugin.pruning.reading import read_samples as read_samples
    from nm_permute_plugin.pruning.resuming import resuming as resuming
    from nm_permute_plugin.pruning.run import prune as prune
    from nm_permute_plugin.pruning.run import save as save
    from nm_permute_plugin.pruning.session import session as session
    from nm_permute_plugin.pruning.settings import Settings as Settings
    from nm_permute_plugin.serving.accelerate import accelerate as accelerate
    from nm_permute_plugin.specs.architectures import spec_of as spec_of
    from nm_permute_plugin.specs.fold import fold as fold

_PLACES = {
    "LearnablePermutationModifier": "modifiers",
    "NMPattern": "maths.pattern",
    "Settings": "pruning.settings",
    "accelerate": "serving.accelerate",
    "convert": "checkpoint.writer",
    "fold": "specs.fold",
    "keep_masks": "pruning.keep_masks",
    "prune": "pruning.run",
    "read_samples": "pruning.reading",
    "resuming": "pruning.resuming",
    "save": "pruning.run",
    "session": "pruning.session",
    "spec_of": "specs.architectures",
    "verify": "checkpoint.verify",
}
"""The public names, and the modules that hold them, which are imported when asked for."""

__all__ = ["__version__", *sorted(_PLACES)]  # noqa: PLE0604

register_when_imported()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("nm-permute-plugin")
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
