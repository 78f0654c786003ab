# SPDX-License-Identifier: Apache-2.0
"""What learners are tried on."""

import pytest

from nm_permute_plugin.pruning.problem import Problem, Solution


@pytest.fixture
def problem(tiny_model, make_problem) -> Problem:
    """Every space of a model with shared key/value heads."""
    return make_problem(tiny_model("llama"))


@pytest.fixture
def start(problem: Problem, resolve_model, legal_perms) -> Solution:
    """A legal permutation of every space, by chance."""
    return Solution(legal_perms(resolve_model(problem.model)))
