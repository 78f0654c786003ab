# SPDX-License-Identifier: Apache-2.0
"""In a session a dense model is measured once and searched once, with the same result."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import nn

from nm_permute_plugin.pruning import problem, search
from nm_permute_plugin.pruning.session import session


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was measured and searched, in order; it is done as ever."""
    found: list[str] = []

    def watch(module: object, name: str) -> None:
        real = getattr(module, name)

        def called(*arguments: object) -> object:
            found.append(name)
            return real(*arguments)

        monkeypatch.setattr(module, name, called)

    watch(problem, "input_norms")
    watch(problem, "output_sensitivity")
    watch(search, "search")
    return found


def run(go: Callable, model: nn.Module, **settings: object) -> tuple[dict, dict]:
    """The permutations and the weights that a run gives a copy of a model."""
    ours = deepcopy(model)
    record = go(ours, **settings)
    return record.perms, ours.state_dict()


def same(left: tuple[dict, dict], right: tuple[dict, dict]) -> bool:
    return all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        for a, b in zip(left, right, strict=True)
    )


def test_what_is_known_is_not_measured_again(calls, tiny_model, go) -> None:
    model = tiny_model("llama")
    alone = [run(go, model, method=m) for m in ("search", "learned")]
    assert calls == ["input_norms", "output_sensitivity", "search"] * 2
    calls.clear()
    with session():
        run(go, model, method="identity")
        together = [run(go, model, method=m) for m in ("search", "learned")]
    assert calls == ["input_norms", "output_sensitivity", "search"]
    assert all(map(same, alone, together))


def test_other_weights_data_or_settings_are_measured_anew(
    calls, tiny_model, go, data
) -> None:
    model = tiny_model("llama")
    with session():
        run(go, model, method="search")
        calls.clear()
        run(go, model, method="search", seed=1)
        assert calls == ["output_sensitivity", "search"]
        calls.clear()
        run(go, model, method="search", score="ria")
        assert calls == ["search"]
        calls.clear()
        row = model.model.layers[1].mlp.up_proj.weight.data
        row[[0, 1]] = row[[1, 0]]  # the same numbers, in other places
        run(go, model, method="search")
        assert calls == ["input_norms", "output_sensitivity", "search"]


def test_a_session_ends(calls, tiny_model, go) -> None:
    model = tiny_model("llama")
    for _ in range(2):
        with session():
            run(go, model, method="identity")
    run(go, model, method="identity")
    assert calls == ["input_norms"] * 3
