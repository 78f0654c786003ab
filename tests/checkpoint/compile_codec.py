# SPDX-License-Identifier: Apache-2.0
"""
Compile Triton's codec for a GPU that need not be here; print what came out, as JSON.

A process of its own: the kernels must not be made for the interpreter.
"""

import json
import warnings

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nm_permute_plugin.checkpoint import codec_triton as triton_codec

HOPPER = GPUTarget("cuda", 90, 32)


def compiled(kernel: triton.JITFunction, table: int, word: str, half: bool) -> dict:
    """Bytes of machine code, and the assembler's loads and stores of global memory."""
    types = dict.fromkeys(kernel.arg_names, "i32")
    types |= {"words": f"*{word}", "values": f"*{word}", "bitmask": "*u8"}
    types |= {"refused": "*i32"} | dict.fromkeys(
        ("TABLE", "HALF", "OCTETS"), "constexpr"
    )
    constants = {"TABLE": table, "HALF": half, "OCTETS": triton_codec.OCTETS}
    aligned = {(place,): [["tt.divisibility", 16]] for place in range(4)}
    source = ASTSource(kernel, types, constants, aligned)
    made = triton.compile(source, target=HOPPER)
    words = made.asm["ptx"].split()
    moves = {w for w in words if w.startswith(("ld.global", "st.global"))}
    return {"bytes": len(made.asm["cubin"]), "moves": sorted(moves)}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    kernels = {
        "compress": (triton_codec.compress_kernel, triton_codec.CHOICES),
        "decompress": (triton_codec.decompress_kernel, triton_codec.PAIRS),
    }
    results = {
        f"{name} {word} {'half' if half else 'whole'}": compiled(*kernel, word, half)
        for name, kernel in kernels.items()
        for word in ("i8", "i16", "i32")
        for half in (False, True)
    }
    print(json.dumps(results))
