# SPDX-License-Identifier: Apache-2.0
"""Measure how well a model classifies images, and how near its features stay."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from nm_permute_plugin.checkpoint.record import FOLDER, read_record
from nm_permute_plugin.evaluation.images import LabelledImages, labelled_images, pixels
from nm_permute_plugin.evaluation.pretrained import (
    config_of,
    image_processor,
    load_checkpoint,
    refuse_images_for,
)
from nm_permute_plugin.maths.permutation import Permutation, invert

NEIGHBOURS = 20
"""Where there is no classifier, this many of the nearest other images vote."""

TEMPERATURE = 0.07
"""A neighbour's vote weighs ``exp(cosine / TEMPERATURE)`` (arXiv 2104.14294, app. F.1)."""


@dataclass(frozen=True)
class ImageOutputs:
    """
    A model's outputs for images.

    :param features: the class token of the last hidden states, or their mean; channels
        stand in the order that they had before any fold
    :param logits: one for each of the model's labels; None without a classifier
    """

    features: Float[Tensor, "images width"]
    logits: Float[Tensor, "images labels"] | None


@dataclass(frozen=True)
class ImageResult:
    """
    What images of known classes say about a model.

    :param top1: the share of images whose class comes first
    :param top5: the share of images whose class is among the first five
    :param neighbours: how many other images voted; 0 where the model has a classifier
    :param fidelity: the mean cosine of its features to the dense model's; None without one
    """

    top1: float
    top5: float
    images: int
    classes: int
    neighbours: int
    fidelity: float | None = None

    def __str__(self) -> str:
        how = f", {self.neighbours} nearest others" if self.neighbours else ""
        return (
            f"top-1 {self.top1:.2%}, top-5 {self.top5:.2%} ({self.images} images, "
            f"{self.classes} classes{how})"
        )


def evaluate_images(
    checkpoint: str | Path,
    folder: Path,
    device: str,
    dense: str | Path | None = None,
    batch_size: int = 32,
) -> ImageResult:
    """
    Measure a checkpoint, read back from disk, on a folder of class folders.

    A classifier predicts the class. Without one, the nearest other images vote, by the
    cosine of their features.

    :param dense: the model before pruning, for the fidelity of the features
    :raises ValueError: for a model that takes text, for images that cannot be read, and
        for classes that the model does not know
    """
    for model in (checkpoint, dense or checkpoint):
        refuse_images_for(model)
    images = labelled_images(folder)
    ours = image_outputs(checkpoint, images.files, device, batch_size)
    fidelity = None
    if dense is not None:
        theirs = image_outputs(dense, images.files, device, batch_size)
        fidelity = mean_cosine(ours.features, theirs.features)
    if ours.logits is None:
        neighbours = min(NEIGHBOURS, len(images.files) - 1)
        scores = votes(ours.features, images, neighbours)
        labels = images.labels
    else:
        neighbours, scores = 0, ours.logits
        names = config_of(checkpoint).id2label
        labels = labels_of(images, [names[i] for i in range(scores.shape[1])])
    return ImageResult(
        top1=accuracy(scores, labels, 1),
        top5=accuracy(scores, labels, 5),
        images=len(images.files),
        classes=len(images.classes),
        neighbours=neighbours,
        fidelity=fidelity,
    )


def image_outputs(
    checkpoint: str | Path, files: Sequence[Path], device: str, batch_size: int
) -> ImageOutputs:
    """
    Run a checkpoint on images, in their order.

    :raises ValueError: for images that cannot be read, or outputs that are not finite
    """
    processor = image_processor(checkpoint)
    # Loosely typed: the class is known by its name alone.
    model: Any = load_checkpoint(checkpoint, device)
    features: list[Tensor] = []
    logits: list[Tensor] = []
    hook = model.base_model.register_forward_hook(
        lambda module, inputs, out: features.append(feature_of(module, out))
    )
    count = -(-len(files) // batch_size)
    bar = tqdm(pixels(processor, files, batch_size), "Images", count, leave=False)
    with torch.no_grad():
        for values in bar:
            out = model(pixel_values=values.to(device, model.dtype))
            if getattr(out, "logits", None) is not None:
                logits.append(out.logits.float().cpu())
    hook.remove()
    found = torch.cat(features)
    order = _order_of(Path(checkpoint))
    if order is not None:
        found = found[:, invert(order)]
    if not bool(found.isfinite().all()):
        raise ValueError(f"{checkpoint}: the features are not finite: broken weights")
    return ImageOutputs(found, torch.cat(logits) if logits else None)


def _order_of(checkpoint: Path) -> Permutation | None:
    """Read from the run's record how a fold has ordered the hidden states, if one has."""
    if not (checkpoint / FOLDER / "report.json").exists():
        return None
    return read_record(checkpoint)[0].get("residual")


def feature_of(encoder: nn.Module, out: Any) -> Float[Tensor, "images width"]:
    """Take one vector an image: the class token where there is one, else the mean."""
    hidden: Tensor = out.last_hidden_state.float().cpu()
    names = {name.rpartition(".")[2] for name, _ in encoder.named_parameters()}
    if names & {"cls_token", "class_embedding"}:
        return hidden[:, 0]
    return hidden.mean(1)


def mean_cosine(
    ours: Float[Tensor, "images width"], theirs: Float[Tensor, "images width"]
) -> float:
    """
    Average the cosine of two models' features over the images.

    >>> mean_cosine(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.eye(2))
    0.5
    """
    return float(F.cosine_similarity(ours, theirs, dim=-1).mean())


def accuracy(
    scores: Float[Tensor, "images labels"], labels: Int[Tensor, " images"], top: int
) -> float:
    """
    Return the share of images whose label is among the ``top`` largest scores.

    >>> accuracy(torch.eye(3), torch.tensor([0, 1, 0]), top=1)
    0.6666666666666666
    """
    first = scores.topk(min(top, scores.shape[1]), dim=1).indices
    return int((first == labels[:, None]).any(1).sum()) / len(labels)


def votes(
    features: Float[Tensor, "images width"], images: LabelledImages, neighbours: int
) -> Float[Tensor, "images classes"]:
    """
    Have the nearest other images vote on the class of each.

    :raises ValueError: if there are fewer than two classes: any vote would be right
    """
    if len(images.classes) < 2:
        raise ValueError(
            f"all images are of the class {images.classes[0]}; without a classifier, "
            "at least two class folders are needed"
        )
    unit = F.normalize(features, dim=-1)
    cosines = unit @ unit.T
    cosines.fill_diagonal_(-torch.inf)
    near = cosines.topk(neighbours, dim=1)
    weights = (near.values / TEMPERATURE).exp()
    scores = torch.zeros(len(features), len(images.classes))
    return scores.scatter_add(1, images.labels[near.indices], weights)


def labels_of(images: LabelledImages, names: Sequence[str]) -> Int[Tensor, " images"]:
    """
    Return the classifier's number of each image's class.

    Class folders have the names of the model's labels, or there are as many as labels and
    stand in the same order when sorted, as in copies of ImageNet.

    :param names: the names of the model's labels
    :raises ValueError: if neither is so
    """
    unknown = [name for name in images.classes if name not in names]
    if not unknown:
        return torch.tensor([names.index(name) for name in images.classes])[
            images.labels
        ]
    if len(unknown) == len(images.classes) == len(names):
        return images.labels
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    raise ValueError(
        f"class folder {unknown[0]} is none of the model's {len(names)} labels ({shown}), "
        f"and {len(images.classes)} folders are not one a label; name the folders after "
        "the labels"
    )
