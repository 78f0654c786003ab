# SPDX-License-Identifier: Apache-2.0
"""Layers that our methods hold, and what they say to those that they cannot hold."""

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def said(engine_says) -> dict:
    """The shapes of each layer's parameters, or the message that refuses it."""
    return engine_says("refusals.py")


def test_a_weight_that_is_all_2of4_is_never_held_dense(said: dict) -> None:
    # 12 channels are no whole number of bytes in a bitmask
    expected = {"compressed": [16, 6], "bitmask": [16, 2], "shape": [2, 1]}
    assert said["whole"] == expected


def test_where_a_part_is_dense_there_is_room_for_it(said: dict) -> None:
    assert said["mixed"]["weight"] == [16, 16]
    assert said["mixed"]["compressed"] == [16, 8]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("cut", "24 input channels over 2 devices are 12 each"),
        ("fewer parts", "fused of 3 parts, which the checkpoint has as 2"),
        ("packed", "its quantization has no weight of 8 bits or more"),
        (
            "cut experts",
            "the 24 inner channels of an expert over 2 devices are 12 each",
        ),
        ("cut experts", "nm-permute convert DIR OUT --dense-experts"),
        (
            "one sparse expert",
            "some.layer.1.gate_proj is stored as sparse-24-bitmask and ",
        ),
        ("one sparse expert", "and some.layer.0.gate_proj is not"),
        ("quantized experts", "its experts are quantized (Quantized)"),
        ("quantized experts", "nm-permute convert DIR OUT --dense-experts"),
    ],
)
def test_what_cannot_be_held_is_named_with_the_reason(
    said: dict, case: str, message: str
) -> None:
    assert said[case].startswith("some.layer")
    assert message in said[case]


def test_experts_that_are_stored_dense_are_left_to_vllm(said: dict) -> None:
    assert said["dense experts"] == "vLLM's own"


def test_experts_of_a_draft_model_have_the_names_of_its_checkpoint(said: dict) -> None:
    start = (
        "draft_model.some.layer: some.layer.1.gate_proj is stored as sparse-24-bitmask"
    )
    assert said["experts of a draft"].startswith(start)
