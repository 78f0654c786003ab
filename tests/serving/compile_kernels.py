# SPDX-License-Identifier: Apache-2.0
"""
Compile every kernel for cards that need not be here; print what came out, as JSON.

``python tests/serving/compile_kernels.py`` compiles some settings of each kernel in half
a minute, ``--all`` every setting of every kernel in ten minutes. A process of its own:
the Triton kernels must not be made for the interpreter, and the driver that they ask for
the card is a stand-in here. All else is the package's own: the functions that launch the
kernels run on tensors of zeros, and a launch ends once the kernel is compiled.
"""

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
from cards import CARDS, FEW_CARDS
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver
from weights import DTYPES

from nm_permute_plugin.checkpoint import codec_triton
from nm_permute_plugin.maths import kl_triton, mask_gradients_triton
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.serving import cache
from nm_permute_plugin.serving.kernels import (
    expert_product,
    experts,
    mma_sp,
    scaling,
    triton_fallback,
)
from nm_permute_plugin.serving.kernels.expert_product import KINDS
from nm_permute_plugin.serving.kernels.triton_scaling import scale_kernel


class Compiled(NamedTuple):
    """
    A kernel compiled for a card.

    :param dtype: that of the weight or the logits, or a description
    :param shared: shared memory of a block in bytes
    :param fault: the compiler's words, or none
    """

    card: str
    kernel: str
    dtype: str
    shared: int
    fault: str


class StandInDriver:
    """Names the card that Triton compiles for, in place of CUDA's driver."""

    card = "sm_80"

    def get_current_device(self) -> str:
        """The key of Triton's kernels in memory."""
        return self.card

    def get_current_stream(self, device: object = None) -> int:
        """The default stream."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """What the compiler is told."""
        return GPUTarget("cuda", int(self.card.removeprefix("sm_")), 32)


def of_cuda(everything: bool) -> list[Compiled]:
    """``sparse24.cu`` by NVRTC; of its block shapes one of each kind, or all."""
    found = []
    for (name, card), (dtype, torch_dtype) in product(CARDS.items(), DTYPES.items()):
        if dtype == "fp16" and name != "sm_90" and not everything:
            continue  # the same code as bf16, but for the names of instructions
        kind = mma_sp._KINDS[torch_dtype]
        shapes = [
            shape
            for tiles in mma_sp._BLOCK_SHAPES
            for shape in mma_sp.block_shapes(tiles, kind, card)
        ]
        if not everything:
            kinds = {(s.depth > 1, s.cluster > 1, s.stages > 0): s for s in shapes}
            shapes = list(kinds.values())
        for shape in shapes:
            fault, architecture = "", shape.architecture(card.capability)
            try:
                code = mma_sp._machine_code(architecture, kind, shape)
                assert code.startswith(b"\x7fELF")
            except RuntimeError as error:
                fault = str(error)
            of_shape = " ".join(map(str, shape))
            row = (name, f"mma_sp {of_shape}", dtype, shape.shared_bytes(kind), fault)
            found.append(Compiled(*row))
    return found


def of_experts(everything: bool) -> list[Compiled]:
    """The CUDA kernels of experts by NVRTC: all block shapes of serving, or some."""
    found = []
    settings = experts.settings_for(64, 8, 64)
    shapes = dict.fromkeys(shape for each in settings for shape in each.shapes())
    if not everything:
        kinds = {(shape.gated, shape.tiles): shape for shape in shapes}
        shapes = dict.fromkeys(kinds.values())
    for name, dtype, shape in product(CARDS, ("bf16", "fp16"), (None, *shapes)):
        if dtype == "fp16" and name != "sm_90" and not everything:
            continue
        fault = ""
        try:
            code = expert_product.code_of(name, KINDS[DTYPES[dtype]], shape)
            assert code.startswith(b"\x7fELF")
        except RuntimeError as error:
            fault = str(error)
        words = " ".join(map(str, shape or ("around",)))
        shared = shape.shared_bytes if shape else 0
        found.append(Compiled(name, f"experts {words}", dtype, shared, fault))
    return found


def of_triton(everything: bool) -> list[Compiled]:
    """The Triton kernels by its compiler, for some arguments each, or for more."""
    stand_in, made = StandInDriver(), list[Any]()
    driver.set_active(stand_in)
    launch = JITFunction.run

    def only_compile(self: JITFunction, *args: Any, **options: Any) -> Any:
        made.append(launch(self, *args, **{**options, "warmup": True}))
        return made[-1]

    JITFunction.run = only_compile
    found = []
    for stand_in.card in CARDS:
        for name, dtype, call in launches(stand_in.card, everything):
            made.clear()
            fault = ""
            try:
                call()
                assert all(len(kernel.asm["cubin"]) for kernel in made)
            except triton.TritonError as error:
                fault = str(error)
            shared = max((kernel.metadata.shared for kernel in made), default=0)
            found.append(Compiled(stand_in.card, name, dtype, shared, fault))
    return found


def launches(
    card: str, everything: bool
) -> list[tuple[str, str, Callable[[], object]]]:
    """What launches each Triton kernel, with its name and its dtype."""
    half = {name: DTYPES[name] for name in ("bf16", "fp16")}
    found: list[tuple[str, str, Callable[[], object]]] = []
    tiles = triton_fallback._TILES
    few = [(64, tiles[-1], "bf16")]  # which needs most shared memory
    decodes = product((1, 32, 64), tiles, half) if everything else few
    for tokens, tile, dtype in decodes:
        name = f"triton {' '.join(map(str, tile))}, {tokens} tokens"
        found.append((name, dtype, lambda a=(tokens, tile, half[dtype]): decode(*a)))
    for dtype in half if everything else ("bf16",):
        found.append(("scaling", dtype, lambda d=half[dtype]: scale(d, everything)))
    if not everything and card not in FEW_CARDS:
        return found
    words = {"int8": torch.int8, "int16": torch.int16, "int32": torch.int32}
    for word in words if everything else ("int16",):
        found.append(("codec", word, lambda w=words[word]: codec(w)))
    logits = {**half, "fp32": torch.float32}
    for dtype in logits if everything else ("bf16",):
        found.append(("kl", dtype, lambda d=logits[dtype]: divergence(d)))
    for n, m in ((2, 4), (4, 8)) if everything else ((2, 4),):
        found.append((f"masks {n}:{m}", "fp32", lambda a=(n, m): masks(*a)))
    return found


def decode(tokens: int, tile: tuple[int, ...], dtype: torch.dtype) -> None:
    """As a layer of 4096 channels calls it."""
    packed = torch.zeros(64, 4096 * 9 // 8, dtype=torch.uint8)
    x = torch.zeros(tokens, 4096, dtype=dtype)
    triton_fallback.TritonDecode().run(packed, x, 64, tile)


def scale(out: torch.dtype, everything: bool) -> None:
    """Sums in bfloat16, by scales of each output, or by all that may be a number."""
    sums, single = torch.zeros(2, 4096, dtype=torch.bfloat16), torch.zeros(1)
    narrow = torch.zeros(4096, 1, dtype=torch.bfloat16)
    cases = product((False, True), repeat=3) if everything else [(True, True, True)]
    for each_x, each_w, bias in cases:
        scale_kernel[(2, 4)](
            sums,
            torch.zeros(2, 4096, dtype=out),
            torch.zeros(2, 1) if each_x else single,
            narrow if each_w else single,
            torch.zeros(4096, dtype=out) if bias else sums,
            4096,
            EACH_X=each_x,
            EACH_W=each_w,
            BIAS=bias,
            COLUMNS=scaling._COLUMNS,
        )


def codec(word: torch.dtype) -> None:
    """Both ways, for rows that end with a whole byte of the bitmask and with half."""
    for columns in (64, 60):
        stored = codec_triton.compress_in_triton(torch.zeros(8, columns, dtype=word))
        assert stored is not None
        codec_triton.decompress_in_triton(*stored, columns)


def divergence(dtype: torch.dtype) -> None:
    """Values and gradients of two tokens."""
    logits, counted = torch.zeros(2, 8192, dtype=dtype), torch.ones(2).bool()
    _, log_sums = kl_triton.of_tokens(logits, logits, counted)
    kl_triton.gradient(logits, logits, counted, log_sums, torch.tensor(1.0))


def masks(n: int, m: int) -> None:
    """The mask and both gradients, in blocks of 64 channels."""
    pattern, score = NMPattern(n, m), torch.ones(64, 128)
    perm = torch.arange(128)
    mask_gradients_triton.mask_in_triton(score, torch.ones(4, 128), perm, pattern)
    mask_gradients_triton.score_gradient_in_triton(
        score, torch.ones(4, 128), score, perm, pattern
    )
    group_of = torch.arange(64).expand(2, 64) // m
    mask_gradients_triton.move_costs_in_triton(
        score, score, perm, perm, group_of, pattern, slice(None)
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        # compiled anew
        os.environ["TRITON_CACHE_DIR"] = os.environ[cache.FOLDER] = folder
        everything = "--all" in sys.argv
        rows = of_triton(everything) + of_cuda(everything) + of_experts(everything)
    print(json.dumps([row._asdict() for row in rows]))
