# SPDX-License-Identifier: Apache-2.0
"""Triton's codec is PyTorch's bit by bit, and compiles for a GPU where there is none."""

from pathlib import Path

FOLDER = Path(__file__).parent


def test_triton_stores_and_reads_what_pytorch_does(run_triton) -> None:
    cases, mistakes = run_triton(FOLDER / "interpret_codec.py")
    assert cases == 35
    assert mistakes == []


def test_the_kernels_compile_for_hopper(run_triton) -> None:
    compiled = run_triton(FOLDER / "compile_codec.py")
    assert len(compiled) == 12
    assert [name for name, one in compiled.items() if one["bytes"] == 0] == []
    for word, width in (("i8", "v2.b32"), ("i16", "v4.b32"), ("i32", "v4.b32")):
        # an octet moves in the widest instructions that hold it
        read = compiled[f"compress {word} whole"]["moves"]
        written = compiled[f"decompress {word} whole"]["moves"]
        assert f"ld.global.{width}" in read
        assert f"st.global.{width}" in written
