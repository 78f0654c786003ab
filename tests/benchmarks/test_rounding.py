# SPDX-License-Identifier: Apache-2.0
"""The benchmark of recovery under rounding."""

import pytest
import torch
from compressed_tensors.quantization import preset_name_to_scheme

import rounding
from nm_permute_plugin.modifiers.rounding import _ToNearest


def test_every_variant_is_measured_as_it_is_and_as_it_is_served(
    arguments: list[str], text_file, capsys: pytest.CaptureFixture[str]
) -> None:
    test = ["--test", text_file("test", 1000), "--window", "32", "--steps", "2"]
    few = ["--recover-steps", "12", "--recover-rate", "0.02", "--group-size", "16"]
    schemes = ["--schemes", "W4A16", "W8A8", "--validation-share", "0.2"]
    rounding.main([*arguments, *test, *few, *schemes])
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    found = {tuple(row[:2]): float(row[2]) for row in rows[5:] if row}
    assert list(found) == [
        *((kind, served) for kind in ("frozen", "bf16") for served in SERVED),
        *((kind, served) for kind in SERVED[1:] for served in ("bf16", kind)),
    ]
    assert found["W4A16", "W4A16"] < found["frozen", "W4A16"]


SERVED = ("bf16", "W4A16", "W8A8")


@pytest.mark.parametrize("name", ["W4A16", "W8A8", "FP8_DYNAMIC", "FP8"])
def test_weights_are_rounded_as_llm_compressor_rounds_them(name: str) -> None:
    scheme = preset_name_to_scheme(name, ["Linear"])
    weight = torch.randn(24, 256, generator=torch.Generator().manual_seed(0))
    weight = weight.to(torch.bfloat16)
    found = rounding.rounded(weight, scheme.weights)
    assert torch.equal(found, _ToNearest(scheme)(weight))
    assert not torch.equal(found, weight)
