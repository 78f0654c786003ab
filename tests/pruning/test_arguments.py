# SPDX-License-Identifier: Apache-2.0
"""What a notebook gives is taken in every natural form, or refused in one clear line."""

import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import nm_permute_plugin as nmp
from nm_permute_plugin.pruning.data import Data
from nm_permute_plugin.pruning.settings import SearchSettings, Settings

ROWS = torch.randint(48, (24, 32), generator=torch.Generator().manual_seed(0))
FORMS: dict[str, Any] = {
    "a list a batch": [{"input_ids": row.tolist()} for row in ROWS],
    "lists of lists": [{"input_ids": ROWS.tolist()}],
    "single rows": [{"input_ids": row} for row in ROWS],
    "a list of rows": [{"input_ids": list(ROWS)}],
    "arrays": [{"input_ids": ROWS.numpy()}],
    "with a mask": [
        {"input_ids": row.tolist(), "attention_mask": [1] * 32, "text": "x"}
        for row in ROWS
    ],
}


def rows_of(data: Data) -> list[list[int]]:
    batches = [*data.train, *data.validation]
    return sorted(row.tolist() for batch in batches for row in batch["input_ids"])


@pytest.mark.parametrize("form", FORMS)
def test_lists_and_single_rows_are_read_as_tensors_are(tiny_model, form: str) -> None:
    data = nmp.read_samples(tiny_model("llama"), FORMS[form], 4)
    assert rows_of(data) == sorted(ROWS.tolist())


def test_rows_of_different_lengths_are_read(tiny_model) -> None:
    rows = [row[: 20 + i % 7].tolist() for i, row in enumerate(ROWS)]
    marks = [[0] + [1] * (len(row) - 1) for row in rows]
    batch = {"input_ids": rows, "loss_mask": marks}
    data = nmp.read_samples(tiny_model("llama"), [batch], 4)
    validation = Data(data.validation, [])
    assert data.tokens + validation.tokens == sum(map(len, rows)) - len(rows)


def test_a_mask_of_another_number_of_rows_is_refused(tiny_model) -> None:
    batch = {"input_ids": [[1] * 300, [1] * 200], "attention_mask": [[1] * 300]}
    with pytest.raises(ValueError, match="batch 0 holds different numbers of rows"):
        nmp.read_samples(tiny_model("llama"), [batch])


# The tests check the types of arguments before our own checks can.
READ_SAMPLES, PRUNE, SAVE, KEEP_MASKS = (
    inspect.unwrap(function)
    for function in (nmp.read_samples, nmp.prune, nmp.save, nmp.keep_masks)
)


REFUSED: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "text": (
        lambda model: READ_SAMPLES(model, "A long text."),
        r"batches must be a list of batches .*, got the text 'A long text\.'",
    ),
    "one mapping": (
        lambda model: READ_SAMPLES(model, {"input_ids": ROWS}),
        r"batches must be a list of batches .*, got a dict",
    ),
    "a tensor": (
        lambda model: READ_SAMPLES(model, ROWS),
        r"batches must be a list of batches .*, got a Tensor",
    ),
    "a number": (
        lambda model: READ_SAMPLES(model, 3),
        r"batches must be a list of batches .*, got int",
    ),
    "bare rows": (
        lambda model: READ_SAMPLES(model, list(ROWS)),
        r'batch 0 must be a mapping, {"input_ids": .*, got Tensor',
    ),
    "texts": (
        lambda model: READ_SAMPLES(model, ["One.", "Two."]),
        r"batch 0 must be a mapping, .*, got str",
    ),
    "words": (
        lambda model: READ_SAMPLES(model, [{"input_ids": "A long text."}]),
        r"input_ids of calibration batch 0 must be a tensor .* got str 'A long text\.'",
    ),
    "halves": (
        lambda model: READ_SAMPLES(model, [{"input_ids": [0.5] * 400}]),
        "input_ids of calibration batch 0 must be a tensor .* whole numbers",
    ),
    "nothing": (
        lambda model: READ_SAMPLES(model, [{"input_ids": []}]),
        "input_ids of calibration batch 0 must be a tensor .* it is empty",
    ),
    "a path to read for": (
        lambda _: READ_SAMPLES("MODEL", FORMS["single rows"]),
        r"model must be a loaded model, got the str 'MODEL': load it first",
    ),
    "a path to prune": (
        lambda _: PRUNE("MODEL", Data([], [])),
        r"model must be a loaded model, got the str 'MODEL'",
    ),
    "a path to save": (
        lambda _: SAVE("MODEL", "OUT"),
        r"model must be a loaded model, got the str 'MODEL'",
    ),
    "a path to train": (
        lambda _: KEEP_MASKS("MODEL"),
        r"model must be a loaded model, got the str 'MODEL'",
    ),
    "swapped": (
        lambda model: PRUNE(model, Settings(), Data([], [])),
        r"data must be what .*read_samples returned, got Settings; check the order",
    ),
    "settings of words": (
        lambda model: PRUNE(model, Data([], []), {"method": "search"}),
        r"settings must be nm_permute_plugin\.Settings\(.*\), got dict",
    ),
    "data to save": (
        lambda model: SAVE(model, "OUT", Data([], [])),
        r"pruned must be what nm_permute_plugin\.prune returned, got Data",
    ),
    "settings without names": (
        lambda _: Settings("learned"),
        r"Settings takes its fields by name, and got 'learned' .*Settings\(method=\.\.\.\)",
    ),
    "a group without names": (
        lambda _: SearchSettings(3),
        r"SearchSettings takes .* got 3 .*SearchSettings\(rounds=\.\.\.\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_of_another_kind_is_refused_in_one_line(tiny_model, case: str) -> None:
    give, message = REFUSED[case]
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        give(tiny_model("llama"))
    assert "\n" not in str(caught.value)


def test_settings_are_copied_and_pickled_as_before() -> None:
    settings = Settings(method="search")
    assert pickle.loads(pickle.dumps(settings)) == settings.model_copy()  # noqa: S301
