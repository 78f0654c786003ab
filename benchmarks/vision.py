# SPDX-License-Identifier: Apache-2.0
"""
What 2:4 and 4:8 cost an image classifier, by method, over seeds, from reloaded checkpoints.

    python benchmarks/vision.py MODEL --train CIFAR/train --test CIFAR/test

Each run loads the dense model, permutes and prunes it with pictures of ``--train`` (labels
are not used), saves it, reads it back, and measures top-1 and the mean cosine of its
features to the dense model's on ``--test``.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from compared import arguments, compare
from nm_permute_plugin.evaluation.classification import (
    ImageOutputs,
    accuracy,
    image_outputs,
    labels_of,
    mean_cosine,
)
from nm_permute_plugin.evaluation.images import image_files, labelled_images, pixels
from nm_permute_plugin.evaluation.pretrained import image_processor, model_class
from nm_permute_plugin.maths.permutation import invert
from nm_permute_plugin.pruning.data import split_images
from nm_permute_plugin.pruning.pipeline import Record


def main() -> None:
    parser = arguments(__doc__, "vision")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--images", type=int, default=1024)
    args = parser.parse_args()
    images = _calibration(args)
    test = labelled_images(args.test)
    dense = _dense(test.files, args)
    if dense.logits is None:
        raise ValueError(f"{args.model} has no classifier: fine-tune it first")
    config = model_class(args.model).config_class.from_pretrained(args.model)
    labels = labels_of(test, list(config.id2label.values()))
    print(f"{len(images)} pictures to calibrate; {len(labels)} test pictures")

    def measure(folder: Path, record: Record) -> Mapping[str, float]:
        image_processor(args.model).save_pretrained(folder)
        seen = image_outputs(folder, test.files, args.device, args.batch_size)
        assert seen.logits is not None
        features = seen.features
        if "residual" in record.perms:
            # The fold has permuted the channels of the features.
            old = invert(record.perms["residual"])
            features = features[:, old.to(features.device)]
        return {
            "top1": accuracy(seen.logits, labels, 1),
            "fidelity": mean_cosine(features, dense.features),
        }

    compare(
        args,
        {"top1": accuracy(dense.logits, labels, 1), "fidelity": 1.0},
        lambda settings: split_images(
            images, settings.batch_size, settings.validation.share, settings.seed
        ),
        measure,
    )


def _dense(files: Sequence[Path], args: argparse.Namespace) -> ImageOutputs:
    """What the dense model makes of the test pictures; kept beside the results."""
    kept = args.out.with_suffix(".pt")
    if args.resume and kept.exists():
        return ImageOutputs(**torch.load(kept))
    seen = image_outputs(args.model, files, args.device, args.batch_size)
    torch.save({"features": seen.features, "logits": seen.logits}, kept)
    return seen


def _calibration(args: argparse.Namespace) -> Tensor:
    """Pictures of the training folder in a fixed random order, so that classes mix."""
    files = image_files(args.train)
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))
    chosen = [files[i] for i in order[: args.images].tolist()]
    return torch.cat(list(pixels(image_processor(args.model), chosen, args.batch_size)))


if __name__ == "__main__":
    main()
