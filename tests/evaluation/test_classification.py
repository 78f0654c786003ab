# SPDX-License-Identifier: Apache-2.0
"""Accuracy and fidelity equal what is counted by hand on a real, tiny model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from nm_permute_plugin.evaluation.classification import (
    accuracy,
    evaluate_images,
    image_outputs,
    labels_of,
    votes,
)
from nm_permute_plugin.evaluation.images import LabelledImages, labelled_images

COLOURS = {0: "red", 1: "blue", 2: "green"}  # not sorted: names decide, not numbers
NAMED = {"id2label": COLOURS, "label2id": {name: i for i, name in COLOURS.items()}}


def values_of(folder: Path, images: Path) -> Tensor:
    processor = transformers.BitImageProcessorPil.from_pretrained(folder)
    files = labelled_images(images).files
    images = [Image.open(file).convert("RGB") for file in files]
    return processor(images, return_tensors="pt")["pixel_values"]


def images_of(classes: list[str], labels: list[int]) -> LabelledImages:
    return LabelledImages([Path()] * len(labels), torch.tensor(labels), classes)


def test_a_classifier_is_asked_for_the_class(image_checkpoint, image_folder) -> None:
    folder = image_checkpoint(**NAMED)
    model = transformers.Dinov2ForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        said = model(pixel_values=values_of(folder, image_folder)).logits.argmax(-1)
    classes = [file.parent.name for file in labelled_images(image_folder).files]
    right = sum(COLOURS[int(i)] == name for i, name in zip(said, classes, strict=True))
    result = evaluate_images(folder, image_folder, "cpu", batch_size=5)
    assert result.top1 == right / 18
    assert result.top5 == 1.0
    assert (result.images, result.classes, result.neighbours) == (18, 3, 0)
    assert result.fidelity is None
    assert str(result).endswith("top-5 100.00% (18 images, 3 classes)")


@pytest.mark.parametrize("case", ["dinov2-bare", "vit-bare", "siglip-vision"])
def test_neighbours_vote_where_there_is_no_classifier(
    image_checkpoint, image_folder: Path, case: str
) -> None:
    result = evaluate_images(image_checkpoint(case), image_folder, "cpu")
    assert result.neighbours == 17
    assert 1 / 3 <= result.top1 <= result.top5 == 1.0
    assert "17 nearest others" in str(result)


def test_votes_are_those_of_the_nearest_others() -> None:
    # two at the right, two at the top, and one of the second class among the first two
    features = torch.tensor([[1, 0], [1, 0.1], [0, 1], [0.1, 1], [1, 0.05]])
    scores = votes(features, images_of(["a", "b"], [0, 0, 1, 1, 1]), neighbours=2)
    assert scores.argmax(1)[2:4].tolist() == [1, 1]
    weight = (F.cosine_similarity(features[:1], features[[1, 4]]) / 0.07).exp()
    torch.testing.assert_close(scores[0], weight)  # one vote each, none for itself


@pytest.mark.parametrize("case", ["dinov2-labels", "clip-vision", "siglip-vision"])
def test_fidelity_is_the_mean_cosine_of_the_features(
    image_checkpoint, image_folder: Path, case: str
) -> None:
    dense = image_checkpoint(case, num_labels=3)
    other = dense.parent / "other"
    shutil.copytree(dense, other)
    kind = type(getattr(transformers, architecture(dense)).from_pretrained(dense))
    model = kind.from_pretrained(other)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "fc1" in name and name.endswith("weight"):
                parameter.mul_(parameter.abs() > parameter.abs().median())
    model.save_pretrained(other)
    values = values_of(dense, image_folder)
    with torch.no_grad():
        ours, theirs = (
            kind.from_pretrained(folder)
            .base_model(pixel_values=values)
            .last_hidden_state
            for folder in (other, dense)
        )
    pooled = [x.mean(1) if case == "siglip-vision" else x[:, 0] for x in (ours, theirs)]
    by_hand = float(F.cosine_similarity(*pooled, dim=-1).mean())
    result = evaluate_images(other, image_folder, "cpu", dense=dense, batch_size=5)
    assert result.fidelity == pytest.approx(by_hand, abs=1e-5)
    assert result.fidelity < 0.999
    same = evaluate_images(dense, image_folder, "cpu", dense=dense)
    assert same.fidelity == pytest.approx(1.0)


def architecture(folder: Path) -> str:
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    return name


def test_batches_do_not_change_what_is_seen(image_checkpoint, image_folder) -> None:
    folder = image_checkpoint()
    files = labelled_images(image_folder).files
    whole, parts = (image_outputs(folder, files, "cpu", size) for size in (18, 4))
    torch.testing.assert_close(whole.features, parts.features)
    torch.testing.assert_close(whole.logits, parts.logits)


def test_accuracy_counts_the_first_ones() -> None:
    scores = torch.tensor([[0.1, 0.5, 0.4], [0.9, 0.0, 0.1], [0.2, 0.3, 0.5]])
    labels = torch.tensor([2, 0, 0])
    assert [accuracy(scores, labels, top) for top in (1, 2, 5)] == [1 / 3, 2 / 3, 1.0]


def test_labels_go_by_name_or_where_there_are_as_many_by_order() -> None:
    found = images_of(["cat", "dog"], [0, 1, 1])
    assert labels_of(found, ["dog", "cow", "cat"]).tolist() == [2, 0, 0]
    assert labels_of(found, ["LABEL_0", "LABEL_1"]).tolist() == [0, 1, 1]


@pytest.mark.parametrize("names", [["cow", "hen", "owl"], ["cat", "cow"]])
def test_a_class_that_the_model_does_not_know_is_named(names: list[str]) -> None:
    with pytest.raises(
        ValueError, match=r"class folder (cat|dog) is none of the model"
    ):
        labels_of(images_of(["cat", "dog"], [0, 1]), names)


def test_one_class_alone_is_refused_without_a_classifier() -> None:
    with pytest.raises(ValueError, match="all images are of the class cat"):
        votes(torch.eye(3), images_of(["cat"], [0, 0, 0]), 2)


def test_weights_that_are_broken_are_named(image_checkpoint, image_folder) -> None:
    folder = image_checkpoint()
    model = transformers.Dinov2ForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        model.dinov2.layernorm.weight[3] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match="dense: the features are not finite"):
        evaluate_images(folder, image_folder, "cpu")
