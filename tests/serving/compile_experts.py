# SPDX-License-Identifier: Apache-2.0
"""
Compile the kernels of routed experts for GPUs that need not be here.

Prints shared memory, registers and spilled bytes of each, as JSON. Usage::

    python compile_experts.py [SETTINGS...]

Settings are numbers of ``candidates``; without any, one of each kind is compiled.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nm_permute_plugin.serving.kernels import triton_experts
from nm_permute_plugin.serving.kernels.experts import candidates

CARDS = (80, 90, 100)
POINTERS = {
    "values": "*i32",
    "bits": "*u8",
    "x": "*bf16",
    "out": "*bf16",
    "scale": "*fp32",
    "pair_of": "*i32",
    "expert_of": "*i32",
}


def compiled(card: int, gated: bool, settings: tuple[int, ...]) -> dict[str, object]:
    """Compile a product of Qwen3-30B-A3B's experts, and look at what comes out."""
    pairs, *tiles, interleave, warps, stages = settings
    rows, groups = tiles[:2] if gated else tiles[2:]
    constants = {
        "TOTAL": 512 if gated else 192,
        "TOP_K": 8 if gated else 1,
        "GATED": gated,
        "SCALED": not gated,
        "TOKENS": pairs,
        "ROWS": rows,
        "GROUPS": groups,
        "INTERLEAVE": bool(interleave),
    }
    signature = {**POINTERS, "rows": "i32", **dict.fromkeys(constants, "constexpr")}
    kernel = triton_experts.experts_kernel
    names = kernel.arg_names
    divisible = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name in POINTERS or name == "rows"
    }
    source = ASTSource(
        kernel, {name: signature[name] for name in names}, constants, divisible
    )
    began = time.perf_counter()
    options = {"num_warps": warps, "num_stages": stages}
    made = triton.compile(source, GPUTarget("cuda", card, 32), options)
    found = {
        "card": card,
        "gated": gated,
        "settings": settings,
        "shared": made.metadata.shared,
        "mma": "wgmma" in made.asm["ptx"]
        or "tcgen05" in made.asm["ptx"]
        or "mma.sync" in made.asm["ptx"],
        "seconds": round(time.perf_counter() - began, 1),
    }
    return found | resources(made.asm["cubin"])


def resources(cubin: bytes) -> dict[str, int]:
    """Read registers and spilled bytes a thread out of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    words = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout))
    return {
        "registers": int(words["REG"]),
        "spilled": int(words["STACK"]) + int(words["LOCAL"]),
    }


if __name__ == "__main__":
    every = list(dict.fromkeys(candidates(1, 8, 128) + candidates(4096, 8, 128)))
    numbers = [int(word) for word in sys.argv[1:]]
    chosen = [every[number] for number in numbers] or [every[0], every[-3]]
    print(
        json.dumps(
            [
                compiled(card, gated, settings)
                for settings in chosen
                for card in CARDS
                for gated in (True, False)
            ]
        )
    )
