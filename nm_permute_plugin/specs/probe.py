# SPDX-License-Identifier: Apache-2.0
"""Random inputs that a transformers model accepts: tokens, pixels, or both."""

from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]


def random_batch(model: nn.Module, seed: int = 0, tokens: int = 24) -> Batch:
    """
    Two rows of random tokens, of pixels of the config's size, or of both.

    :param model: a transformers model; its config says which inputs it takes
    :param tokens: of a row of text
    """
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    dtype = next(model.parameters()).dtype
    if hasattr(config, "image_token_id"):
        return _text_with_image(config, generator, dtype, tokens)
    vision = getattr(config, "vision_config", None)
    if vision is not None:
        text = _text(config.text_config, generator, tokens)
        return {**text, **_pixels(vision, generator, dtype)}
    if hasattr(config, "image_size"):
        return _pixels(config, generator, dtype)
    return _text(config, generator, tokens)


def _text(config: Any, generator: torch.Generator, tokens: int) -> Batch:
    tokens = min(tokens, getattr(config, "max_position_embeddings", tokens) - 2)
    ids = torch.randint(config.vocab_size, (2, tokens), generator=generator)
    pad = getattr(config, "pad_token_id", None)
    if pad is not None:  # classifiers read the last token that is no padding
        ids[ids == pad] = (pad + 1) % config.vocab_size
    return {"input_ids": ids}


def _pixels(config: Any, generator: torch.Generator, dtype: torch.dtype) -> Batch:
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    shape = (2, getattr(config, "num_channels", 3), height, width)
    return {"pixel_values": torch.randn(shape, generator=generator).to(dtype)}


def _text_with_image(
    config: Any, generator: torch.Generator, dtype: torch.dtype, tokens: int
) -> Batch:
    """One row: text, an image cut into patches, text. As Qwen2-VL takes it."""
    vision, special = config.vision_config, config.image_token_id
    merge = vision.spatial_merge_size
    height, width = 2 * merge, 3 * merge
    places = height * width // merge**2
    ids = torch.randint(
        min(config.text_config.vocab_size, special), (1, tokens), generator=generator
    )
    before, after = ids[:, : tokens // 2], ids[:, tokens // 2 :]
    image = torch.full((1, places), special)
    ids = torch.cat([before, image, after], dim=1)
    channels = getattr(vision, "in_channels", 3)
    values = channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(height * width, values, generator=generator)
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == special).int(),
        "pixel_values": pixels.to(dtype),
        "image_grid_thw": torch.tensor([[1, height, width]]),
    }
