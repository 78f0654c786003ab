# SPDX-License-Identifier: Apache-2.0
"""The recipes for models of images run, and leave what loads and is as sparse as told."""

import sys
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from llmcompressor import oneshot
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedModel

from nm_permute_plugin.checkpoint.verify import verify
from nm_permute_plugin.cli.prune import prune_with_images
from nm_permute_plugin.evaluation.images import image_files
from nm_permute_plugin.specs.exactness import random_batch

sys.path.insert(0, str(Path(__file__).parents[1] / "specs"))
from zoo import ZOO, tiny  # noqa: E402

RECIPES = Path(__file__).parents[2] / "recipes"
CASES = {case.id: case.values for case in ZOO}


def quick(name: str) -> str:
    """A shipped recipe, with two steps of few images."""
    recipe = (RECIPES / name).read_text()
    recipe = recipe.replace("batch_size: 32", "batch_size: 8")
    return recipe.replace("method: learned", "method: learned\n      learn: {steps: 2}")


@pytest.mark.parametrize("case", ["vit-labels", "deit-labels", "dinov2-labels"])
def test_a_classifier_keeps_its_classifier_dense(
    image_checkpoint, image_folder: Path, tmp_path: Path, case: str
) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(quick("2of4_learned_vit.yaml"))
    dense = image_checkpoint(case, num_labels=3)
    prune_with_images(dense, recipe, out, image_files(image_folder), "cpu")
    report = verify(out)
    assert report.faults == ()
    assert {row.module for row in report.rows if not row.sparse} & {"classifier"}
    assert sum(row.sparse for row in report.rows) == 12
    kind = getattr(transformers, CASES[case][0])
    before, after = (kind.from_pretrained(folder) for folder in (dense, out))
    batch = random_batch(before)
    with torch.no_grad():
        features = [m.base_model(**batch).last_hidden_state for m in (before, after)]
    assert torch.equal(*(m.classifier.bias for m in (before, after)))
    assert (
        float(torch.cosine_similarity(*map(order_free, features), dim=-1).mean()) > 0.5
    )


def order_free(hidden: Tensor) -> Tensor:
    """Channels by size: the fold has put them into another order."""
    return hidden.sort(-1).values


def as_tensors(samples: list[dict[str, object]]) -> dict[str, Tensor]:
    """The data collator of llm-compressor's multimodal examples."""
    (sample,) = samples
    return {name: torch.tensor(value) for name, value in sample.items()}


def run_multimodal(recipe: str, out: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A tiny Qwen2.5-VL before and after ``oneshot``, on samples of text with an image."""
    model = tiny(*CASES["qwen2.5-vl"], torch.float32)
    model.save_pretrained(out / "dense")
    samples = [random_batch(model, seed=seed) for seed in range(6)]
    columns = {name: [s[name].tolist() for s in samples] for name in samples[0]}
    words = {f"w{i:02}": i for i in range(48)}
    pruned = oneshot(
        model=type(model).from_pretrained(out / "dense"),
        processor=transformers.PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w00"))
        ),
        recipe=recipe,
        dataset=Dataset.from_dict(columns),
        data_collator=as_tensors,
        num_calibration_samples=len(samples),
        output_dir=str(out / "sparse"),
    )
    return model, pruned


@pytest.mark.parametrize("tower", ["language", "both", "merger dense"])
def test_qwen_prunes_its_language_tower_and_by_option_that_of_images(
    tmp_path: Path, tower: str
) -> None:
    recipe = quick("2of4_learned_qwen25vl.yaml")
    ignored = {"both": "", "merger dense": ', "re:.*visual.merger.*"'}
    if tower in ignored:
        recipe = recipe.replace(', "re:.*visual.*"]', ignored[tower] + "]")
    before, pruned = run_multimodal(recipe, tmp_path)
    report = verify(tmp_path / "sparse")
    assert report.faults == ()
    sparse = [row.module for row in report.rows if row.sparse]
    counts = {
        part: sum(part in name for name in sparse) for part in ("blocks", "merger")
    }
    assert sum("visual" not in name for name in sparse) == 14
    assert (
        counts
        == {
            "language": {"blocks": 0, "merger": 0},
            "both": {"blocks": 10, "merger": 2},
            "merger dense": {"blocks": 10, "merger": 0},
        }[tower]
    )
    batch = random_batch(before, seed=77)
    again = type(before).from_pretrained(tmp_path / "sparse")
    with torch.no_grad():
        dense, ours, theirs = (m(**batch).logits for m in (before, pruned, again))
    torch.testing.assert_close(ours, theirs)
    # a scrambled order of one tower would cost everything
    assert float(torch.cosine_similarity(dense, ours, dim=-1).mean()) > 0.3
