# SPDX-License-Identifier: Apache-2.0
"""One table of architectures and options, for every test that asks for them."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for the zoo beside the tests

TABLE = [
    pytest.param("llama", {}, id="llama-gqa"),
    pytest.param("llama", {"num_key_value_heads": 4}, id="llama-mha"),
    pytest.param("llama", {"num_key_value_heads": 1}, id="llama-mqa"),
    pytest.param("llama", {"tie_word_embeddings": True}, id="llama-tied"),
    pytest.param(
        "llama", {"attention_bias": True, "mlp_bias": True}, id="llama-biases"
    ),
    pytest.param(
        "llama",
        {
            "hidden_size": 36,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 4,
            "tie_word_embeddings": True,
        },
        id="llama-nine-heads-tied",
    ),
    pytest.param("mistral", {}, id="mistral-gqa"),
    pytest.param(
        "mistral", {"num_key_value_heads": 1, "head_dim": 12}, id="mistral-mqa"
    ),
    pytest.param("qwen2", {}, id="qwen2-gqa"),
    pytest.param(
        "qwen2",
        {"num_key_value_heads": 4, "tie_word_embeddings": True},
        id="qwen2-mha-tied",
    ),
    pytest.param(
        "qwen2",
        {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 1},
        id="qwen2-three-heads-mqa",
    ),
    pytest.param("qwen3", {}, id="qwen3-gqa"),
    pytest.param(
        "qwen3",
        {"head_dim": 16, "tie_word_embeddings": True},
        id="qwen3-wide-heads-tied",
    ),
    pytest.param(
        "qwen3",
        {"attention_bias": True, "num_key_value_heads": 4},
        id="qwen3-mha-biases",
    ),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"architecture", "options"} <= set(metafunc.fixturenames):
        metafunc.parametrize(("architecture", "options"), TABLE)
