# SPDX-License-Identifier: Apache-2.0
"""What is claimed and what is left alone; how the mode is read."""

import pytest

from nm_permute_plugin.checkpoint.config import SparsityConfig, with_sparsity_config
from nm_permute_plugin.serving.detect import is_ours, mode

SPARSE = with_sparsity_config({}, SparsityConfig())["quantization_config"]
BLOCK = SPARSE["sparsity_config"]


@pytest.mark.parametrize(
    ("quantization", "ours"),
    [
        pytest.param(SPARSE, True, id="as we write it"),
        pytest.param({**SPARSE, "format": "int-quantized"}, True, id="int8"),
        pytest.param(
            {**SPARSE, "sparsity_config": {**BLOCK, "format": "dense"}},
            True,
            id="zeros stored",
        ),
        pytest.param({**SPARSE, "sparsity_config": {}}, False, id="fp8, not sparse"),
        pytest.param({"quant_method": "compressed-tensors"}, False, id="no block"),
        pytest.param({**SPARSE, "quant_method": "gptq"}, False, id="another method"),
        pytest.param(
            {**SPARSE, "sparsity_config": {**BLOCK, "sparsity_structure": "4:8"}},
            False,
            id="4:8",
        ),
        pytest.param(
            {**SPARSE, "sparsity_config": {**BLOCK, "format": "marlin-24"}},
            False,
            id="marlin-24",
        ),
        pytest.param(
            {**SPARSE, "sparsity_config": {**BLOCK, "sparsity_structure": None}},
            False,
            id="unstructured",
        ),
    ],
)
def test_only_2of4_checkpoints_are_claimed(quantization, ours: bool) -> None:
    assert is_ours(quantization) is ours


@pytest.mark.parametrize("word", ["auto", "memory", "dense"])
def test_the_mode_comes_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    monkeypatch.setenv("NM_PERMUTE_SERVE", word)
    assert mode() == word


def test_without_a_word_the_mode_is_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NM_PERMUTE_SERVE", raising=False)
    assert mode() == "auto"


def test_another_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NM_PERMUTE_SERVE", "fast")
    with pytest.raises(ValueError, match="NM_PERMUTE_SERVE is 'fast'.*auto, memory"):
        mode()
