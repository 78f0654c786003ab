# SPDX-License-Identifier: Apache-2.0
"""
What vLLM says to a prompt with each of two images: run by the interpreter that has vLLM.

Usage, one engine after the other in one process::

    python look.py OUT.json DIR...
"""

import json
import sys

import torch

PROMPT = "<|vision_start|><|image_pad|><|vision_end|>What is this?"


def prompts():
    """The same question about two images of noise."""
    from PIL import Image

    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.rand(84, 112, 3, generator=generator) * 256
        image = Image.fromarray(pixels.to(torch.uint8).numpy())
        yield {"prompt": PROMPT, "multi_modal_data": {"image": image}}


def main(words):
    from generate import generate

    out, *directories = words
    limits = {"image": 1, "video": 0}
    said = {
        directory: generate(directory, prompts(), limit_mm_per_prompt=limits)
        for directory in directories
    }
    with open(out, "w") as file:
        json.dump(said, file)


if __name__ == "__main__":
    main(sys.argv[1:])
