# SPDX-License-Identifier: Apache-2.0
"""A problem for every test of learning; makes the helpers beside these tests importable."""

import sys
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import pytest
from torch import nn

from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.pruning.data import Data, split_text
from nm_permute_plugin.pruning.pipeline import Record
from nm_permute_plugin.pruning.problem import Problem, SpaceScores
from nm_permute_plugin.pruning.running.teacher import Teacher
from nm_permute_plugin.pruning.settings import LossSettings

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def make_problem(resolve_model) -> Callable[..., Problem]:
    """A factory: a 2:4 problem whose scores are the magnitudes of a model's weights."""

    def make(
        model: nn.Module,
        data: Data | None = None,
        names: Collection[str] | None = None,
        loss: LossSettings | None = None,
    ) -> Problem:
        """With all spaces of the model, or with the named ones."""
        scores = {
            name: module.weight.detach().float().abs()
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name != "lm_head"
        }
        spaces = {
            name: SpaceScores.of(space, scores)
            for name, space in resolve_model(model).spaces.items()
            if names is None or name in names
        }
        teacher = Teacher(model, loss or LossSettings())
        data = data or Data([], [])
        return Problem(model, spaces, {}, data, NMPattern(2, 4), teacher)

    return make


@pytest.fixture
def data(chain_rows) -> Data:
    """Text that is learned in a moment."""
    return split_text(list(chain_rows(10, 32, seed=1)), 4, validation_share=0.2, seed=0)


@pytest.fixture
def go(data: Data) -> Callable[..., Record]:
    """A factory: ``go(model, method=method, ...)`` is the record of a whole run."""
    import whole_runs  # beside this file: found only now

    return partial(whole_runs.go, data=data)
