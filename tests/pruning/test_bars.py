# SPDX-License-Identifier: Apache-2.0
"""Every long stage of a run shows a bar, which counts up to its end."""

import re

import pytest
import torch
from whole_runs import go

from nm_permute_plugin.pruning.data import split_text

BARS = (
    "Measuring input norms",
    "Measuring outputs",
    "Searching the permutation",
    "Comparing the masks",
    "Folding the permutation",
)


def test_every_stage_has_a_bar_that_counts_to_its_end(
    tiny_model, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = torch.randint(48, (24, 32), generator=torch.Generator().manual_seed(0))
    go(tiny_model("llama"), split_text(list(ids), 4, 0.25, 0), method="search")
    shown = capsys.readouterr().err
    for name in BARS:
        counts = re.findall(rf"{name}: +\d+%\|[^|]*\| (\d+)/(\d+) ", shown)
        assert counts, name
        done, total = map(int, counts[-1])
        assert done == total > 1, (name, done, total)
    assert max(int(total) for _, total in re.findall(r"(\d+)/(\d+) ", shown)) > 20
