# SPDX-License-Identifier: Apache-2.0
"""Every stage under one rule: the mask stays, and validation text never gets worse."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from recovery import differing, kept_of, planted, values_of
from transformers import AutoModelForCausalLM

from nm_permute_plugin.pruning.recover.blocks import BlockSettings
from nm_permute_plugin.pruning.recover.distill import DistillSettings, distill
from nm_permute_plugin.pruning.recover.stages import RecoverSettings, Stage, recover
from nm_permute_plugin.pruning.running.loss import LossWeights
from nm_permute_plugin.pruning.samples import Samples
from nm_permute_plugin.pruning.text import split_text

STAGES = get_args(Stage)
FAST = RecoverSettings(
    blocks=BlockSettings(epochs=3, rate=0.03),
    distill=DistillSettings(steps=24, rate=0.03, evaluate_every=8),
)
LOSS = LossWeights()


@pytest.fixture
def text(chain_rows) -> Samples:
    return split_text(list(chain_rows(40, 24, seed=1)), 4, validation=0.2, seed=0)


def only(*stages: Stage) -> RecoverSettings:
    return replace(FAST, stages=stages)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_changes_kept_weights_and_no_mask(
    trained_checkpoint, text: Samples, stage: Stage, dtype: torch.dtype
) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained_checkpoint, dtype=dtype)
    kept = kept_of(model)
    before = values_of(kept)
    lost = kept.mean_loss(text.validation, LOSS)
    (record,) = recover(kept, text, only(stage))
    assert record.stage == stage
    assert record.validation[0] == lost
    left = kept.mean_loss(text.validation, LOSS)
    assert left <= lost
    assert record.kept == (left < lost)
    assert left == (record.validation[1] if record.kept else lost)
    assert (differing(before, kept.values) != []) == record.kept
    for name, value in kept.values.items():
        assert value.dtype == dtype
        assert torch.equal(value == 0, before[name] == 0)
        assert not bool(torch.signbit(value[value == 0]).any())
    if stage != "rescale":
        assert left < 0.7 * lost


@pytest.mark.parametrize(("stage", "share"), [("blocks", 0.5), ("end_to_end", 0.5)])
def test_most_of_a_planted_loss_is_regained(
    tiny_model, text: Samples, stage: Stage, share: float
) -> None:
    kept = planted(tiny_model("qwen3"))
    (record,) = recover(kept, text, only(stage))
    assert record.validation[1] < share * record.validation[0]


def test_stages_go_on_from_each_other(trained_checkpoint, text: Samples) -> None:
    kept = kept_of(AutoModelForCausalLM.from_pretrained(trained_checkpoint))
    records = recover(kept, text, only("end_to_end", "rescale", "blocks"))
    assert [record.stage for record in records] == ["end_to_end", "rescale", "blocks"]
    loss = records[0].validation[0]
    for record in records:
        assert record.validation[0] == loss
        loss = record.validation[1] if record.kept else loss
    assert kept.mean_loss(text.validation, LOSS) == loss


def test_a_stage_that_makes_the_whole_model_worse_is_dropped(
    tiny_model, text: Samples
) -> None:
    # The kept weights are the best already: energy that the mask took is no loss here.
    kept = planted(tiny_model("llama"), noise=0.0)
    before = values_of(kept)
    wild = replace(
        FAST.distill, rate=3.0, steps=2, evaluate_every=1, loss=LossWeights()
    )
    for stage in STAGES:
        (record,) = recover(kept, text, replace(FAST, stages=(stage,), distill=wild))
        assert not record.kept
    assert differing(before, kept.values) == []


@pytest.mark.parametrize("stage", STAGES)
def test_the_seed_decides(tiny_model, text: Samples, stage: Stage) -> None:
    runs = []
    for seed in (4, 4, 5):
        kept = planted(tiny_model("llama"))
        settings = replace(
            only(stage),
            blocks=replace(FAST.blocks, seed=seed),
            distill=replace(FAST.distill, seed=seed),
        )
        recover(kept, text, settings)
        runs.append(values_of(kept))
    assert differing(runs[0], runs[1]) == []
    if stage != "rescale":  # which has no random choice
        assert differing(runs[0], runs[2]) != []


def test_distilling_looks_at_the_start_and_the_end(tiny_model, text: Samples) -> None:
    kept = kept_of(tiny_model("llama"))
    values, looks = distill(
        kept, text, replace(FAST.distill, steps=5, evaluate_every=2)
    )
    assert [look["step"] for look in looks] == [0, 2, 4, 5]
    best = min(look["validation"] for look in looks)
    assert kept.mean_loss(text.validation, LOSS, values) == best


def test_distilling_that_never_helps_gives_nothing(tiny_model, text: Samples) -> None:
    kept = kept_of(tiny_model("llama"))
    values, looks = distill(
        kept, text, replace(FAST.distill, rate=50.0, steps=2, evaluate_every=1)
    )
    assert all(look["validation"] >= looks[0]["validation"] for look in looks)
    assert values == {}


def test_no_gradient_and_no_forward_stays_behind(tiny_model, text: Samples) -> None:
    model = tiny_model("llama")
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    recover(kept_of(model), text, only(*STAGES))
    assert differing(dense, {n: p.detach() for n, p in model.named_parameters()}) == []
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert [m for m in model.modules() if "forward" in m.__dict__] == []
