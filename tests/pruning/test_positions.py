# SPDX-License-Identifier: Apache-2.0
"""What a config says of positions is what its model can read."""

import pytest
import torch
from transformers import BloomConfig, GPT2Config, ViTConfig
from zoo_models import zoo_model

from nm_permute_plugin.pruning.positions import Positions, fit_length, positions_of

LEARNED = ["gpt2-tied", "opt-tied", "opt-350m", "bertmodel", "robertamodel"]
ROTARY = ["llama-gqa", "gemma3-gqa", "phi3-gqa", "mixtral-gqa", "qwen2.5-vl"]


def runs(case: str, tokens: int) -> bool:
    model = zoo_model(case)
    with torch.no_grad():
        try:
            # Token 1 is padding to RoBERTa, which has no position of its own.
            model(input_ids=torch.full((1, tokens), 5))
        except (IndexError, RuntimeError):
            return False
    return True


@pytest.mark.parametrize("case", LEARNED)
def test_learned_positions_end_where_the_config_says(case: str) -> None:
    positions = positions_of(zoo_model(case).config)
    assert positions is not None
    assert positions.learned
    assert runs(case, positions.count)
    assert not runs(case, positions.count + 1)


@pytest.mark.parametrize("case", ROTARY)
def test_rotary_positions_go_on(case: str) -> None:
    config = zoo_model(case).config
    count = config.get_text_config().max_position_embeddings
    assert positions_of(config) == Positions(count, learned=False)


@pytest.mark.parametrize("config", [BloomConfig(), ViTConfig()])
def test_a_model_may_say_nothing_of_positions(config) -> None:
    assert positions_of(config) is None
    assert fit_length(config, None, 2048, "--tokens") == 2048
    assert fit_length(config, 9999, 2048, "--tokens") == 9999


def test_the_default_length_is_what_the_model_can_read() -> None:
    config = GPT2Config(n_positions=512)
    assert fit_length(config, None, 2048, "--tokens") == 512
    assert fit_length(config, None, 256, "--tokens") == 256
    assert fit_length(config, 512, 256, "--tokens") == 512
    message = (
        r"\(gpt2\) has 512 learned positions .*513 tokens: give --tokens 512 or less"
    )
    with pytest.raises(ValueError, match=message):
        fit_length(config, 513, 256, "--tokens")
