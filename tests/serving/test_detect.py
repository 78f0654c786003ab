# SPDX-License-Identifier: Apache-2.0
"""What is claimed and what is left alone; how the mode is read; what is said once."""

import pytest

from nm_permute_plugin.checkpoint.config import SparsityConfig, with_sparsity_config
from nm_permute_plugin.serving.detect import RollCall, is_ours, mode

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


def call(reasons: dict[str, str | None]) -> tuple[list[str], list[str]]:
    """What a roll call of layers warns and informs of."""
    warned, informed = [], []
    roll_call = RollCall(warned.append, informed.append)
    for name in reasons:
        roll_call.expect(name)
    for name, reason in reasons.items():
        assert (warned, informed) == ([], [])
        roll_call.note(name, reason)
    return warned, informed


def test_layers_that_stay_dense_are_warned_of_once_for_each_reason() -> None:
    warned, informed = call({"a": "small", "b": None, "c": "odd", "d": "small"})
    assert warned == [
        "2 of 4 2:4 layers are served dense, from a to d: small",
        "1 of 4 2:4 layers are served dense, c: odd",
    ]
    assert informed == ["1 of 4 2:4 layers are served sparse"]


def test_where_all_are_sparse_nothing_is_warned_of() -> None:
    assert call({"a": None}) == ([], ["1 of 1 2:4 layers are served sparse"])
