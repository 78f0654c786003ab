# SPDX-License-Identifier: Apache-2.0
"""What a layer does to activations before its product."""

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def said(engine_says) -> dict:
    """By dtype, with a scale a token and with one that is given."""
    return engine_says("quantize.py")


def test_compiled_int8_is_what_vllms_operator_makes(said: dict) -> None:
    assert said["int8"] == [[0, 0.0], [0, 0.0]]


def test_fp8_has_a_scale_a_token_or_the_one_that_is_given(said: dict) -> None:
    (by_token, one_each), (given, _) = said["fp8"]
    assert one_each == [7, 1]
    # three bits of mantissa: half a step of 1/8 of the largest
    assert 0.01 < by_token < 1 / 16
    assert 0.01 < given < 1 / 16
