# SPDX-License-Identifier: Apache-2.0
"""A pruned checkpoint is trained further, saved, and is 2:4 again, or does not say so."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from typer.testing import CliRunner

import nm_permute_plugin as nmp
from nm_permute_plugin.checkpoint.record import read_record
from nm_permute_plugin.cli.app import app

pytestmark = pytest.mark.slow

Pruned = Callable[[str], Path]


@pytest.fixture
def pruned(trained_checkpoint: Path, chain_rows, tmp_path: Path) -> Pruned:
    """A factory: the folder of the pruned model, ``"sparse"`` or ``"dense"``."""
    model = AutoModelForCausalLM.from_pretrained(trained_checkpoint)
    rows = [{"input_ids": chain_rows(12, 32, seed=999)}]
    data = nmp.read_samples(model, rows, batch_size=4)
    done = nmp.prune(model, data, nmp.Settings(method="identity"))
    nmp.save(model, tmp_path / "pruned" / "sparse", done)
    nmp.convert(tmp_path / "pruned" / "sparse", tmp_path / "pruned" / "dense", "dense")
    return lambda format: tmp_path / "pruned" / format


@pytest.fixture
def train(chain_rows) -> Callable[..., list[float]]:
    """A factory: the losses of some steps of a plain loop."""

    def run(model: PreTrainedModel, steps: int = 3, rate: float = 1e-3) -> list[float]:
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.1)
        losses = []
        for seed in range(steps):
            rows = chain_rows(16, 32, seed=seed)
            loss = model(input_ids=rows, labels=rows).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    return run


def assert_says_2of4(folder: Path, modules: int = 14) -> None:
    """The command finds no fault, and config.json says what is sparse."""
    result = CliRunner().invoke(app, ["verify", str(folder), "--pattern", "2:4"])
    assert result.exit_code == 0, result.output
    rows = nmp.verify(folder).rows
    assert sum(row.promised and row.sparse for row in rows) == modules
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["sparsity_config"]["sparsity_structure"] == "2:4"


@pytest.mark.parametrize("format", ["sparse", "dense"])
def test_a_loop_under_keep_masks_recovers_and_is_saved_2of4(
    pruned: Pruned, train, tmp_path: Path, format: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(pruned(format))
    with nmp.keep_masks(model):
        losses = train(model, 60)
    assert losses[-1] < losses[0] - 0.1
    nmp.save(model, tmp_path / "tuned")
    assert_says_2of4(tmp_path / "tuned")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert all(map(torch.equal, again.parameters(), model.parameters()))
    _, before = read_record(pruned(format))
    _, report = read_record(tmp_path / "tuned")
    assert report == before | {"changed_later": True}
    card = (tmp_path / "tuned" / "README.md").read_text()
    assert "In a later session the kept weights were trained further" in card
    # The base is the dense model, and not the checkpoint in between.
    assert f"`{before['base_model']}`, whose channels" in card


def test_a_trainer_needs_no_callback(
    pruned: Pruned, chain_rows, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(pruned("sparse"))
    nmp.keep_masks(model)
    rows = [{"input_ids": row, "labels": row} for row in chain_rows(16, 32, seed=3)]
    options = TrainingArguments(
        output_dir=str(tmp_path / "runs"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=4,
        save_steps=2,
        weight_decay=0.1,
        bf16=True,
        use_cpu=True,
        report_to=[],
    )
    Trainer(model=model, args=options, train_dataset=rows).train()
    nmp.save(model, tmp_path / "tuned")
    assert_says_2of4(tmp_path / "tuned")
    # what the trainer saves itself is an ordinary dense checkpoint, 2:4 all the same
    saved = tmp_path / "runs" / "checkpoint-2"
    done = nmp.convert(saved, tmp_path / "converted", "sparse-24-bitmask")
    assert len(done.compressed) == 14
    assert_says_2of4(tmp_path / "converted")
    resumed = AutoModelForCausalLM.from_pretrained(saved)
    nmp.save(resumed, tmp_path / "resumed")
    assert_says_2of4(tmp_path / "resumed")


@pytest.mark.parametrize("format", ["sparse", "dense"])
def test_without_keep_masks_nothing_says_2of4(
    pruned: Pruned, train, tmp_path: Path, format: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(pruned(format))
    train(model, 1)
    message = "q_proj is not 2:4 any more.*keep_masks"
    with pytest.raises(ValueError, match=message):
        nmp.save(model, tmp_path / "tuned")
    assert not (tmp_path / "tuned").exists()
    model.save_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in config
    assert not any(row.sparse for row in nmp.verify(tmp_path / "plain").rows)
    with pytest.raises(ValueError, match="is not sparse: none of its matrices is 2:4"):
        nmp.convert(tmp_path / "plain", tmp_path / "same", "sparse-24-bitmask")
    with pytest.raises(ValueError, match="no matrix of the model can be stored as 2:4"):
        nmp.save(
            AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), tmp_path / "x"
        )


def test_a_merged_lora_is_masked_again(pruned: Pruned, train, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(pruned("sparse"))
    kept = nmp.keep_masks(model)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    wrapped = peft.get_peft_model(model, config)
    train(wrapped, 3, 1e-2)
    with pytest.raises(ValueError, match="merge it first"):
        nmp.save(wrapped, tmp_path / "tuned")
    model = wrapped.merge_and_unload()
    with pytest.raises(ValueError, match="q_proj is not 2:4 any more"):
        nmp.save(model, tmp_path / "tuned")
    assert kept.apply() == 2 * (32 * 32 + 16 * 32) // 2
    nmp.save(model, tmp_path / "tuned")
    assert_says_2of4(tmp_path / "tuned")


def test_masks_kept_on_the_wrapped_model_hold_the_base(pruned: Pruned, train) -> None:
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(pruned("sparse"))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    with nmp.keep_masks(wrapped):
        losses = train(wrapped, 5, 1e-2)
        model = wrapped.merge_and_unload()
    assert losses[-1] < losses[0], "the adapter's own zeros were kept"
    weight = model.get_parameter("model.layers.0.mlp.down_proj.weight")
    assert float((weight == 0).float().mean()) == 0.5


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification])
def test_another_class_with_a_new_head_is_trained_and_saved(
    pruned: Pruned, tmp_path: Path, kind: type
) -> None:
    model = kind.from_pretrained(pruned("sparse"))
    with nmp.keep_masks(model):
        model(torch.arange(8)[None])[0].sum().backward()
        torch.optim.AdamW(model.parameters()).step()
    nmp.save(model, tmp_path / "tuned")
    assert_says_2of4(tmp_path / "tuned")
    again = kind.from_pretrained(tmp_path / "tuned")
    assert all(map(torch.equal, again.parameters(), model.parameters()))
