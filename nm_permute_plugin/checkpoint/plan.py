# SPDX-License-Identifier: Apache-2.0
"""Choose how a checkpoint is stored, and which of its matrices are stored sparse."""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from nm_permute_plugin.checkpoint.config import (
    AskedFormat,
    Format,
    SparsityConfig,
    quantization_format,
)
from nm_permute_plugin.checkpoint.directory import Checkpoint
from nm_permute_plugin.checkpoint.layout24 import WORDS
from nm_permute_plugin.checkpoint.pattern import Violation, examine_module
from nm_permute_plugin.checkpoint.prunable import packed_experts
from nm_permute_plugin.maths.pattern import NMPattern

HEAD = "lm_head"
TWO_FOUR = NMPattern(2, 4)

# dense: of keys and values alone
_EIGHT_BIT = ("dense", "float-quantized", "int-quantized", "naive-quantized")
_AROUND = "quantized around a zero point, zeros are not stored as zeros"
_TRANSPOSED = "Conv1D stores [in, out], and sparse formats hold [out, in]"
_MIXED = "not all experts of its layer can be sparse, and they are packed"
SPARSE_ALL_THE_SAME = (_AROUND, _MIXED, _TRANSPOSED)
"""Lists why a matrix stays dense although it follows the pattern."""
_PACKED_EXPERTS = "no reader packs experts that are quantized and sparse"
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D = ("c_attn", "q_attn", "c_fc", "c_proj")
_EMBEDDINGS = (
    "embed_tokens",
    "embed_in",
    "wte",
    "wpe",
    "word_embeddings",
    "embed_positions",
)
_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Plan:
    """
    Says what a conversion stores how.

    :param nonzeros: the modules to store sparse, with their number of non-zeros
    :param dense: the other matrices, each with the reason
    :param clear: whether -0.0 is stored as +0.0
    :param violations: where those of ``dense`` break the pattern that do
    """

    format: Format
    pattern: NMPattern
    nonzeros: Mapping[str, int]
    dense: Mapping[str, str]
    clear: bool
    violations: Mapping[str, Violation] = field(default_factory=dict)


def choose_format(
    checkpoint: Checkpoint,
    asked: AskedFormat,
    pattern: NMPattern,
    pruned: Collection[str],
    transposed: Collection[str] = (),
) -> tuple[Format, str]:
    """
    Chooses how a checkpoint is stored, and says why.

    :param asked: auto means sparse-24-bitmask where the pattern is 2:4 and the weights
        have 8 bits and more, and dense elsewhere
    :param transposed: the modules that are stored as [in, out]
    """
    if not pruned:
        return "dense", "nothing is pruned"
    if asked == "dense":
        return "dense", "asked for"
    if transposed:
        return "dense", _TRANSPOSED
    quantized = quantization_format(checkpoint.config)
    if experts_of(pruned) and quantized is not None:
        return "dense", _PACKED_EXPERTS
    if quantized is not None and quantized not in _EIGHT_BIT:
        return "dense", f"sparse formats cannot hold {quantized}; its zeros are kept"
    if any(name.endswith(".weight_zero_point") for name in checkpoint.where):
        return "dense", _AROUND
    if asked != "auto":
        return asked, "asked for"
    if pattern == TWO_FOUR:
        return "sparse-24-bitmask", "the default for 2:4"
    return "dense", f"the default for {pattern}"


def make_plan(
    checkpoint: Checkpoint,
    format: Format,
    modules: Collection[str] | None,
    pattern: NMPattern = TWO_FOUR,
    clear: bool = False,
    dense_experts: bool = False,
    counted: Mapping[str, int] | None = None,
) -> Plan:
    """
    Looks at every matrix that may be stored sparse, and decides how each is stored.

    :param modules: those that must be stored sparse; None for all that follow the
        pattern, embeddings aside. Experts of a layer are stored sparse all together or
        not at all
    :param dense_experts: leave routed experts dense where ``modules`` is None
    :param counted: the non-zeros of modules that are known to follow the pattern, which
        are not read again
    :raises ValueError: if one of ``modules`` is missing or does not follow the pattern,
        or the format does not store the pattern
    """
    if format == "sparse-24-bitmask" and pattern != TWO_FOUR:
        raise ValueError(
            f"{format} stores 2:4 and not {pattern}; use sparse-bitmask, or dense"
        )
    names = checkpoint.matrices()
    quantized = quantization_format(checkpoint.config)
    if format != "dense" and quantized not in (None, *_EIGHT_BIT):
        reason = f"{quantized} stays as it is: sparse formats store 8 bits and more"
        names = sorted({*names, *(modules or ())})
        return Plan(format, pattern, {}, dict.fromkeys(names, reason), clear)
    unknown = sorted(set(modules or ()) - set(names))
    if unknown:
        raise ValueError(
            f"{checkpoint.path} has no weight matrix for {', '.join(unknown)}"
        )
    if format == "dense":
        return Plan(format, pattern, {}, dict.fromkeys(names, "asked for"), clear)
    known = counted or {}
    nonzeros: dict[str, int] = {}
    dense: dict[str, str] = {}
    violations: dict[str, Violation] = {}
    for module in names:
        skipped = _skipped(module, modules, dense_experts)
        found: int | str | Violation = skipped or _storable(
            checkpoint, module, pattern, clear, known.get(module)
        )
        if isinstance(found, Violation):
            violations[module] = found
            found = f"not {pattern}: {found}"
        if isinstance(found, int):
            nonzeros[module] = found
        elif modules is None or skipped:
            dense[module] = found
        else:
            raise ValueError(
                f"{checkpoint.file(module)}: {module}.weight cannot be stored as "
                f"{format}: {found}. Prune it first, or leave it out."
            )
    for name in packed_experts(checkpoint):
        dense[name] = "the weights of all experts in one tensor: only matrices fit"
    for module in _apart(names, nonzeros):
        del nonzeros[module]
        dense[module] = _MIXED
    return Plan(format, pattern, nonzeros, dense, clear, violations)


def is_embedding(module: str) -> bool:
    """Tells by its name whether a module is a table of embeddings."""
    return module.rpartition(".")[2] in _EMBEDDINGS


def is_conv1d(checkpoint: Checkpoint, module: str) -> bool:
    """
    Tells whether transformers reads a module as Conv1D, which stores [in, out].

    No weight tells that; the kind of model does, and the module's name.
    """
    known = checkpoint.config.get("model_type") in _CONV1D_MODELS
    return known and module.rpartition(".")[2] in _CONV1D


def experts_of(names: Iterable[str]) -> list[str]:
    """Lists those that are linears of experts, by name; transformers packs them."""
    return [name for name in names if _EXPERT.search(name)]


def sparsity_config(plan: Plan, zeros: float) -> SparsityConfig | None:
    """
    Makes the block that says what the plan does; None where nothing is stored sparse.

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
    """Returns the zeros of the sparse modules as a share of all weights of the model."""
    total = zeros = 0
    for name, shard in checkpoint.where.items():
        module, _, part = name.rpartition(".")
        if part in ("compressed", "bitmask", "row_offsets") or part.endswith("_scale"):
            continue
        stored = checkpoint.formats.get(module, "dense") != "dense"
        size = shard.tensors[name].numel
        if part == "shape" and stored:
            size = math.prod(checkpoint.dense_layout(module)[1])
        total += size
        if part in ("weight", "shape") and module in plan.nonzeros:
            zeros += size - plan.nonzeros[module]
    return round(zeros / total, 6) if total else 0.0


def _skipped(module: str, modules: Collection[str] | None, dense_experts: bool) -> str:
    """Says why a module is not looked at; empty where it is."""
    if modules is not None:
        return "" if module in modules else "not asked for"
    if is_embedding(module):
        return "an embedding"
    expert = dense_experts and experts_of([module])
    return "a routed expert, dense as asked for" if expert else ""


def _storable(
    checkpoint: Checkpoint,
    module: str,
    pattern: NMPattern,
    clear: bool,
    counted: int | None,
) -> int | str | Violation:
    """Counts the non-zeros of a matrix that can be stored sparse, or says why not."""
    if is_conv1d(checkpoint, module):
        found = examine_module(checkpoint, module, pattern, transposed=True).found
        wrong_axis = isinstance(found, Violation) and not found.transposed
        return found if wrong_axis else _TRANSPOSED
    if quantization_format(checkpoint.config) is not None and experts_of([module]):
        return _PACKED_EXPERTS
    if counted is not None:
        return counted
    dtype, _ = checkpoint.dense_layout(module)
    if dtype not in WORDS:
        return f"sparse formats do not store {dtype}"
    found = examine_module(checkpoint, module, pattern, clear=clear).found
    around = f"{module}.weight_zero_point" in checkpoint.where
    return _AROUND if around and isinstance(found, int) else found


def _apart(names: Collection[str], sparse: Collection[str]) -> list[str]:
    """Lists sparse experts of layers with dense ones: nothing packs the two together."""
    mixed = {_EXPERT.split(name)[0] for name in experts_of(names) if name not in sparse}
    return [name for name in experts_of(sparse) if _EXPERT.split(name)[0] in mixed]
