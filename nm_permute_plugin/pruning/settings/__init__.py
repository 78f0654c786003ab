# SPDX-License-Identifier: Apache-2.0
"""
Everything that can be said of a run: the fields of a recipe, with their defaults.

``Settings`` is what the modifier of a recipe, a notebook and a benchmark all take. A
setting that nothing would read is refused, so none is ignored in silence.
"""

from nm_permute_plugin.pruning.settings.budget import BudgetSettings
from nm_permute_plugin.pruning.settings.frozen import Frozen
from nm_permute_plugin.pruning.settings.learning import (
    LearnSettings,
    LearnStage,
    MultiplierSettings,
    PublishedSettings,
    SearchSettings,
    SwapSettings,
)
from nm_permute_plugin.pruning.settings.recovery import (
    BlockSettings,
    DistillSettings,
    RecoverSettings,
    RecoverStage,
)
from nm_permute_plugin.pruning.settings.run import Family, Method, Objective, Settings
from nm_permute_plugin.pruning.settings.training import (
    LossSettings,
    MemorySettings,
    ValidationSettings,
)

__all__ = [
    "BlockSettings",
    "BudgetSettings",
    "DistillSettings",
    "Family",
    "Frozen",
    "LearnSettings",
    "LearnStage",
    "LossSettings",
    "MemorySettings",
    "Method",
    "MultiplierSettings",
    "Objective",
    "PublishedSettings",
    "RecoverSettings",
    "RecoverStage",
    "SearchSettings",
    "Settings",
    "SwapSettings",
    "ValidationSettings",
]
