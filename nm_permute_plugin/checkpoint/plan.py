# SPDX-License-Identifier: Apache-2.0
"""What a conversion will store sparse and what not, before it writes anything."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nm_permute_plugin.checkpoint.codec import (
    WORDS,
    clear_negative_zeros,
    nonzero_bits,
)
from nm_permute_plugin.checkpoint.config import (
    Format,
    SparsityConfig,
    quantization_format,
)
from nm_permute_plugin.checkpoint.directory import Checkpoint
from nm_permute_plugin.maths.pattern import NMPattern

HEAD = "lm_head"
TWO_FOUR = NMPattern(2, 4)

EIGHT_BIT = ("float-quantized", "int-quantized", "naive-quantized")
TRANSPOSED = "Conv1D stores [in, out], and sparse formats hold [out, in]"
PACKED_EXPERTS = "no reader packs experts that are quantized and sparse"
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D = ("c_attn", "q_attn", "c_fc", "c_proj")
_EMBEDDINGS = ("embed_tokens", "wte", "wpe", "word_embeddings", "embed_positions")
_EXPERT = re.compile(r"\.experts\.\d+\.")
_WORDS_OF_FLAGS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Plan:
    """
    The parts of a conversion.

    :param nonzeros: the modules to store sparse, with their non-zeros
    :param dense: the other matrices, and why
    :param clear: whether -0.0 becomes +0.0
    """

    format: Format
    pattern: NMPattern
    nonzeros: Mapping[str, int]
    dense: Mapping[str, str]
    clear: bool


def make_plan(
    checkpoint: Checkpoint,
    format: Format,
    modules: Collection[str] | None,
    pattern: NMPattern = TWO_FOUR,
    clear: bool = False,
    dense_experts: bool = False,
) -> Plan:
    """
    Look at every matrix that may be stored sparse.

    :param modules: those that must be; None for all that follow the pattern, embeddings
        aside. Experts of a layer are stored sparse all together or not at all
    :param dense_experts: leave routed experts out of all that follow the pattern
    :raises ValueError: if one of ``modules`` is missing or does not follow the pattern,
        or the format does not store the pattern
    """
    if format == "sparse-24-bitmask" and pattern != TWO_FOUR:
        raise ValueError(
            f"{format} stores 2:4 and not {pattern}; use sparse-bitmask, or dense"
        )
    names = checkpoint.matrices()
    unknown = sorted(set(modules or ()) - set(names))
    quantized = quantization_format(checkpoint.config)
    reason = None
    if format == "dense":
        reason = "asked for"
    elif quantized is not None and quantized not in EIGHT_BIT:
        reason = f"{quantized} stays as it is: sparse formats store 8 bits and more"
        names, unknown = sorted({*names, *(modules or ())}), []
    if unknown:
        raise ValueError(
            f"{checkpoint.path} has no weight matrix for {', '.join(unknown)}"
        )
    if reason is not None:
        return Plan(format, pattern, {}, dict.fromkeys(names, reason), clear)
    nonzeros: dict[str, int] = {}
    dense: dict[str, str] = {}
    experts = set(experts_of(names))
    for module in names:
        if modules is not None and module not in modules:
            dense[module] = "not asked for"
        elif modules is None and is_embedding(module):
            dense[module] = "an embedding"
        elif modules is None and dense_experts and module in experts:
            dense[module] = "a routed expert, dense as asked for"
        else:
            found: int | str
            if _is_conv1d(checkpoint, module):
                found = TRANSPOSED
            elif quantized is not None and module in experts:
                found = PACKED_EXPERTS
            else:
                found = _count(checkpoint.weight(module), pattern, clear)
            if isinstance(found, int):
                nonzeros[module] = found
            elif modules is None:
                dense[module] = found
            else:
                raise ValueError(
                    f"{checkpoint.file(module)}: {module}.weight cannot be stored as "
                    f"{format}: {found}. Prune it first, or leave it out."
                )
    for name, shard in checkpoint.where.items():
        if ".experts." in name and len(shard.tensors[name].shape) == 3:
            dense[name] = "the weights of all experts in one tensor: only matrices fit"
    for module in _apart(names, nonzeros):
        del nonzeros[module]
        dense[module] = (
            "not all experts of its layer can be sparse, and they are packed"
        )
    return Plan(format, pattern, nonzeros, dense, clear)


def is_embedding(module: str) -> bool:
    """Whether a module is a table of embeddings, by its name."""
    return module.rpartition(".")[2] in _EMBEDDINGS


def experts_of(names: Iterable[str]) -> list[str]:
    """Those that are linears of experts, by their names; transformers packs them."""
    return [name for name in names if _EXPERT.search(name)]


def _is_conv1d(checkpoint: Checkpoint, module: str) -> bool:
    """Whether transformers reads a module as Conv1D: no weight tells, but its model."""
    model = checkpoint.config.get("model_type")
    return model in _CONV1D_MODELS and module.rpartition(".")[2] in _CONV1D


def _apart(names: Collection[str], sparse: Collection[str]) -> list[str]:
    """Sparse experts of layers with dense ones: nothing packs the two together."""
    mixed = {_EXPERT.split(name)[0] for name in experts_of(names) if name not in sparse}
    return [name for name in experts_of(sparse) if _EXPERT.split(name)[0] in mixed]


def sparsity_config(plan: Plan, zeros: float) -> SparsityConfig | None:
    """
    The block that says what the plan does; None where nothing is stored sparse.

    :param zeros: the share of zeros in the whole model
    """
    if not plan.nonzeros:
        return None
    # Old readers leave out of a class only the names that they know: where any Linear
    # but the head is dense, every sparse module is named.
    others = [name for name in plan.dense if name != HEAD and not is_embedding(name)]
    simple = not others and not any(
        name == HEAD or is_embedding(name) for name in plan.nonzeros
    )
    return SparsityConfig(
        format=plan.format,
        sparsity_structure=str(plan.pattern),
        global_sparsity=zeros,
        targets=("Linear",) if simple else tuple(plan.nonzeros),
        ignore=(HEAD,) if simple else (),
    )


def global_sparsity(checkpoint: Checkpoint, plan: Plan) -> float:
    """The zeros of the sparse modules as a share of all weights of the model."""
    total = zeros = 0
    for name, shard in checkpoint.where.items():
        module, _, part = name.rpartition(".")
        if part in ("compressed", "bitmask", "row_offsets") or part.endswith("_scale"):
            continue
        stored = checkpoint.formats.get(module, "dense") != "dense"
        size = shard.tensors[name].numel
        if part == "shape" and stored:
            size = int(checkpoint.read(name).prod())
        total += size
        if part in ("weight", "shape") and module in plan.nonzeros:
            zeros += size - plan.nonzeros[module]
    return round(zeros / total, 6) if total else 0.0


def find_excess(weight: Tensor, pattern: NMPattern) -> tuple[int, int, int] | None:
    """
    The first group with more than N weights that are not +0.0: row, channel, weights.

    >>> find_excess(torch.tensor([[-0.0, 1.0, 2.0, 0.0]]), NMPattern(2, 4))
    (0, 0, 3)
    """
    return _first_excess(_group_counts(weight, pattern.m), pattern)


def _first_excess(counts: Tensor, pattern: NMPattern) -> tuple[int, int, int] | None:
    if not counts.numel() or int(counts.max()) <= pattern.n:
        return None
    row, group = (counts > pattern.n).nonzero()[0].tolist()
    return row, group * pattern.m, int(counts[row, group])


def _group_counts(weight: Tensor, m: int) -> Tensor:
    flags = nonzero_bits(weight)
    word = _WORDS_OF_FLAGS.get(m)
    if word is None:
        return flags.view(len(weight), -1, m).sum(-1, dtype=torch.int16)
    # the bytes of a word, 0 or 1 each, are added up in its top byte
    ones = 0x0101010101010101 & (1 << 8 * m) - 1
    return flags.view(word).mul(ones) >> 8 * (m - 1)


def _count(weight: Tensor, pattern: NMPattern, clear: bool) -> int | str:
    """The non-zeros of a weight that follows the pattern, or why it does not."""
    if weight.dtype not in WORDS or weight.shape[1] % pattern.m:
        return f"{weight.dtype} {list(weight.shape)}"
    if clear:
        weight = clear_negative_zeros(weight)
    counts = _group_counts(weight, pattern.m)
    found = _first_excess(counts, pattern)
    if found is None:
        return int(counts.sum())
    row, channel, count = found
    group = weight[row, channel : channel + pattern.m].float()
    negative = int((group != 0).sum()) <= pattern.n
    return (
        f"not {pattern}: row {row}, channels {channel}..{channel + pattern.m - 1} hold "
        f"{count} non-zeros" + (", some of them -0.0" if negative else "")
    )
