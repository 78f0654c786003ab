# SPDX-License-Identifier: Apache-2.0
"""
Fine-tune an image encoder into a classifier: the dense reference of ``vision.py``.

    python benchmarks/finetune_images.py ENCODER OUT --train CIFAR/train --test CIFAR/test

All weights are trained. Pictures are resized to ``--size`` and mirrored at random; the
test pictures are looked at once, at the end.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModelForImageClassification, BitImageProcessorPil

from nm_permute_plugin.evaluation.images import labelled_images, pixels

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]


def main() -> None:
    args = _arguments()
    torch.manual_seed(args.seed)
    train, test = labelled_images(args.train), labelled_images(args.test)
    if train.classes != test.classes:
        raise ValueError(f"classes differ: {train.classes} and {test.classes}")
    processor = BitImageProcessorPil(
        size={"height": args.size, "width": args.size},
        do_center_crop=False,
        do_convert_rgb=True,
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
    )
    names = dict(enumerate(train.classes))
    model = AutoModelForImageClassification.from_pretrained(
        args.encoder,
        num_labels=len(names),
        id2label=names,
        label2id={name: label for label, name in names.items()},
    )
    model = model.to(args.device)
    started = time.perf_counter()
    values = torch.cat(list(pixels(processor, train.files, args.batch_size)))
    _fit(model, values, train.labels, args)
    model.eval()
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    values = torch.cat(list(pixels(processor, test.files, args.batch_size)))
    print(
        f"top-1 {_top1(model, values, test.labels, args):.2%} of {len(test.files)} test "
        f"pictures, {(time.perf_counter() - started) / 60:.1f} minutes"
    )


def _fit(
    model: nn.Module, values: Tensor, labels: Tensor, args: argparse.Namespace
) -> None:
    """AdamW; the new classifier learns faster than the encoder."""
    head = {id(p) for n, p in model.named_parameters() if n.startswith("classifier")}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in head]},
        {
            "params": [p for p in model.parameters() if id(p) in head],
            "lr": args.head_rate,
        },
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.rate, weight_decay=0.05)
    steps = args.epochs * -(-len(values) // args.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / (0.1 * steps), (steps - s) / (0.9 * steps))
    )
    model.train()
    for epoch in range(args.epochs):
        total = 0.0
        chunks = torch.randperm(len(values)).split(args.batch_size)
        for chunk in tqdm(chunks, desc=f"Epoch {epoch + 1}/{args.epochs}"):
            batch, targets = (
                values[chunk].to(args.device),
                labels[chunk].to(args.device),
            )
            mirrored = torch.rand(len(batch), device=args.device) < 0.5
            batch = torch.where(mirrored[:, None, None, None], batch.flip(-1), batch)
            with torch.autocast(args.device, torch.bfloat16):
                logits = model(pixel_values=batch).logits
            value = F.cross_entropy(logits.float(), targets, label_smoothing=0.1)
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            total += float(value.detach()) * len(chunk)
        print(f"epoch {epoch + 1}: loss {total / len(values):.4f}", flush=True)


def _top1(
    model: nn.Module, values: Tensor, labels: Tensor, args: argparse.Namespace
) -> float:
    right = 0
    with torch.no_grad():
        for batch, targets in zip(
            values.split(args.batch_size), labels.split(args.batch_size), strict=True
        ):
            logits = model(pixel_values=batch.to(args.device)).logits
            right += int((logits.argmax(-1).cpu() == targets).sum())
    return right / len(labels)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("encoder", type=Path, help="folder of the encoder")
    parser.add_argument("out", type=Path, help="folder of the classifier")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rate", type=float, default=5e-5)
    parser.add_argument("--head-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default)
    return parser.parse_args()


if __name__ == "__main__":
    main()
