# SPDX-License-Identifier: Apache-2.0
"""``NMConfig`` holds the settings of a run, refuses what makes no sense, and is a file."""

import json
from pathlib import Path

import pytest
import torch

from nm_permute_plugin.optimum import NMConfig
from nm_permute_plugin.pruning.settings import Settings

FIELDS = {
    "mask_structure": "4:8",
    "method": "learned",
    "learn": {"steps": 7, "multipliers": {"rows": None}},
    "recover": ["end_to_end"],
    "rows": 9,
    "dataset": ["a text", "another"],
}


def test_its_fields_are_those_of_the_settings_with_their_defaults() -> None:
    assert NMConfig().settings == Settings()
    given = {k: v for k, v in FIELDS.items() if k in Settings.model_fields}
    assert NMConfig(**FIELDS).settings == Settings(**given)
    assert NMConfig(**FIELDS) != NMConfig()


def test_it_is_written_and_read_again(tmp_path: Path) -> None:
    config = NMConfig(**FIELDS)
    config.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["nm_config.json"]
    assert NMConfig.from_pretrained(tmp_path) == config
    assert NMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_field_that_is_read_may_be_changed(tmp_path: Path) -> None:
    NMConfig(**FIELDS).save_pretrained(tmp_path)
    config, unused = NMConfig.from_pretrained(
        tmp_path, score="ria", other=1, return_unused_kwargs=True
    )
    assert (config.score, config.mask_structure) == ("ria", "4:8")
    assert unused["other"] == 1
    with pytest.raises(ValueError, match="score: must be .*, got 'rai'"):
        NMConfig.from_pretrained(tmp_path, score="rai")


def test_a_field_that_is_changed_later_counts_and_is_checked() -> None:
    config = NMConfig()
    config.method = "search"
    assert config.settings.method == "search"
    config.mask_structure = "5:4"
    with pytest.raises(ValueError, match="5:4"):
        _ = config.settings


@pytest.mark.parametrize(
    "sample",
    [
        {"input_ids": [3, 4, 5], "attention_mask": [1, 1, 0]},
        {
            "input_ids": torch.tensor([3, 4, 5]),
            "attention_mask": torch.tensor([1, 1, 0]),
        },
        {"input_ids": torch.tensor([[3, 4, 5]]), "attention_mask": [[1, 1, 0]]},
        {"input_ids": [3, 4, 5], "attention_mask": [1, 1, 0], "text": "not read"},
    ],
    ids=["lists", "tensors", "a row of tensors", "more columns"],
)
def test_tokenised_samples_become_lists(sample: dict[str, object]) -> None:
    wanted = {"input_ids": [3, 4, 5], "attention_mask": [1, 1, 0]}
    assert NMConfig(dataset=[sample]).dataset == [wanted]


def test_a_sample_of_several_rows_becomes_as_many() -> None:
    rows = torch.arange(6).view(2, 3)
    found = NMConfig(dataset=({"input_ids": x} for x in (rows, rows[0]))).dataset
    assert [row["input_ids"] for row in found] == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scor": 1}, r"scor: there is no such field; did you mean score\?"),
        ({"learn": {"step": 1}}, r"learn\.step: .*did you mean steps\?"),
        ({"rows": 1}, "rows: must be greater than or equal to 2, got 1"),
        ({"sequence_length": "a"}, "sequence_length: must be a whole number, got 'a'"),
        ({"method": "search", "learn": {"steps": 1}}, "nothing reads it"),
        ({"dataset": 3}, "dataset: must be a list of texts.* a data set's name; got 3"),
        ({"dataset": []}, "dataset: is empty: give a list of texts"),
        ({"dataset": {"text": ["a"]}}, "dataset: .*got a mapping of text"),
        ({"dataset": ["a", {"input_ids": [1]}]}, "dataset: .*sample 0 is 'a'"),
        ({"dataset": [{"text": "a"}]}, "dataset: .*sample 0 is a mapping of text"),
        ({"dataset": [{"input_ids": ["a"]}]}, "dataset: sample 0 holds no numbers"),
        ({"dataset": [{"input_ids": [1.5]}]}, r"sample 0 holds input_ids .*float32"),
        (
            {"dataset": [{"input_ids": [1, 2], "attention_mask": [1]}]},
            r"sample 0 holds attention_mask of shape \[1\]",
        ),
    ],
)
def test_what_makes_no_sense_is_one_line(
    fields: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        NMConfig(**fields)
    assert "\n" not in str(error.value)
