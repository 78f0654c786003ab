# SPDX-License-Identifier: Apache-2.0
"""What a notebook shows of data, a run and a check is a line with the main figures."""

from pathlib import Path

import torch

import nm_permute_plugin as nmp


def test_everything_is_shown_in_a_line(tiny_model, tmp_path: Path) -> None:
    model = tiny_model("llama")
    ids = torch.randint(48, (24, 32), generator=torch.Generator().manual_seed(0))
    data = nmp.read_samples(model, [{"input_ids": ids}], 4)
    shown = {"data": repr(data)}
    settings = nmp.Settings(method="search", search={"rounds": 1})
    pruned = nmp.prune(model, data, settings)
    nmp.save(model, tmp_path / "out", pruned)
    shown |= {"pruned": repr(pruned), "plan": repr(pruned.plan)}
    shown |= {
        "record": repr(pruned.record),
        "report": repr(nmp.verify(tmp_path / "out")),
    }
    (tmp_path / "out" / "config.json").write_text("{}")
    shown["faults"] = repr(nmp.verify(tmp_path / "out"))
    for line in shown.values():
        assert "\n" not in line
        assert len(line) < 900
    assert shown["data"].startswith("Data(704 tokens to train on in 6 batches, 1 ")
    assert ": 2:4 in 14 linears by search, " in shown["pruned"]
    assert "validation loss" in shown["pruned"]
    assert "14 linears to prune" in shown["plan"]
    assert "permutations, " in shown["record"]
    assert shown["report"].startswith(
        "Report(good=True, 16 matrices, 14 of them promised"
    )
    assert shown["faults"].startswith("Report(good=False, ")
