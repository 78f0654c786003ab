# SPDX-License-Identifier: Apache-2.0
"""Sparse kernels for a model that transformers runs, without vLLM."""

import time
from collections import Counter, defaultdict
from typing import TypeVar
from weakref import ref

import torch
from loguru import logger
from torch import Tensor, nn

from nm_permute_plugin.checkpoint.codec import compress, nonzero_bits
from nm_permute_plugin.checkpoint.layout24 import WORDS
from nm_permute_plugin.serving.accelerated_linear import (
    UNDO,
    AcceleratedLinear,
    Host,
    pack_linear,
)
from nm_permute_plugin.serving.detect import Mode, must_be_mode
from nm_permute_plugin.serving.detect import mode as mode_of_environment
from nm_permute_plugin.serving.kernels.kernel import DTYPES_8, DTYPES_16
from nm_permute_plugin.serving.layer_report import from_to
from nm_permute_plugin.serving.linear import SparseLinear, expect
from nm_permute_plugin.serving.quantized_linear import owner_of, unsupported_scheme

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model, *, undo: bool = False, mode: Mode | None = None) -> Model:
    """
    Let the 2:4 linears of a loaded model run on sparse kernels, in place.

    Each linear takes the kernel that is fastest for the number of tokens, as in vLLM: each
    shape of weight is measured once on a card, which takes a minute at most, and the result
    is kept on disk. It holds packed copies of its weight, no dense one beside them unless
    the dense product is the fastest for some number of tokens. Weights that do not follow
    2:4 stay dense, and so does everything without a CUDA device: the log says how many and
    why.

    The model runs forward only: eagerly, under ``torch.compile``, and in ``generate`` with
    a static cache, where it gains most. ``state_dict`` and ``save_pretrained`` give the
    dense weights. A layer whose weight is read (a LoRA that is merged), loaded anew or
    moved to another device or dtype is dense again, with a line in the log.

    >>> import torch
    >>> linear = torch.nn.Linear(4, 1, dtype=torch.bfloat16)
    >>> _ = linear.weight.data.copy_(torch.tensor([[0.0, 1.0, 2.0, 0.0]]))
    >>> accelerate(linear) is linear  # on a CPU nothing changes
    True

    :param model: a model in 16 bits on a CUDA device; or quantized to FP8 or INT8, as
        ``from_pretrained`` returned it, before its first forward decompresses it
    :param undo: give every layer its weight back, bit by bit
    :param mode: ``auto``, or ``memory`` for one packed copy of each weight; by default
        what ``NM_PERMUTE_SERVE`` says
    :return: the model itself
    :raises TypeError: for what is no model
    :raises ValueError: if no weight of the model follows 2:4, or for another mode
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"accelerate takes a loaded model, got a {type(model).__name__}: load it "
            'first, by transformers.AutoModelForCausalLM.from_pretrained("MODEL")'
        )
    chosen = mode_of_environment() if mode is None else must_be_mode(mode, "mode")
    if undo:
        _undo(model)
        return model
    started = time.perf_counter()
    done, sparse, dense = _linears(model)
    if not sparse and not done:
        raise ValueError(
            f"no linear of this {type(model).__name__} has a 2:4 weight, so there is "
            f"nothing to accelerate: {_told(dense)}. Load a checkpoint that was pruned 2:4."
        )
    before = _bytes(model)
    weights = (linear.weight.detach() for linear in sparse.values())
    new = {weight.shape for weight in weights if expect(weight, chosen)}
    if new:
        logger.info(
            f"accelerate: measuring the kernels for {len(new)} shapes of weights, once on "
            "this card; it takes seconds"
        )
    owner = owner_of(model)
    host = Host(None if owner is None else ref(owner))
    with torch.no_grad():
        for name, linear in sparse.items():
            with torch.cuda.device_of(linear.weight):  # where kernels are measured
                reason = _pack(linear, chosen, host)
            if reason is None:
                done.append(name)
            else:
                dense[reason].append(name)
    total = len(done) + sum(map(len, dense.values()))
    line = f"accelerate: {len(done)} of {total} linears run on sparse kernels"
    if dense:
        line += f"; dense stay {_told(dense)}"
    if not done:
        logger.warning(line)
        return model
    after, seconds = _bytes(model), time.perf_counter() - started
    line += (
        f". Weights take {after / 2**30:.2f} GiB, {before / 2**30:.2f} before "
        f"({seconds:.0f} s). {UNDO} gives the dense ones back."
    )
    if after > before:
        line += " mode='memory' keeps one packed copy of each, and is slower."
    logger.info(line)
    return model


def _linears(
    model: nn.Module,
) -> tuple[list[str], dict[str, nn.Linear], dict[str, list[str]]]:
    """List the accelerated linears, those that can be, and by reason those that cannot."""
    done: list[str] = []
    sparse: dict[str, nn.Linear] = {}
    dense = _others(model)
    shared = _shared(model)
    for path, module in model.named_modules():
        name = path or "the model"
        if isinstance(module, AcceleratedLinear):
            done.append(name)
        elif isinstance(module, nn.Linear):
            reason = _reason(module, shared)
            if reason is None:
                sparse[name] = module
            else:
                dense[reason].append(name)
    return done, sparse, dense


def _undo(model: nn.Module) -> None:
    count = 0
    for module in model.modules():
        if isinstance(module, AcceleratedLinear):
            module.restore()
            count += 1
    logger.info(f"accelerate: {count} linears have their dense weights back")


def _others(model: nn.Module) -> dict[str, list[str]]:
    """List by reason what is pruned like linears, and is of another class."""
    found: dict[str, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        if type(module).__name__ == "Conv1D":
            found["a Conv1D"].append(name)
        if not isinstance(module, nn.modules.conv._ConvNd):
            found["a stack of experts"] += [
                f"{name}.{key}"
                for key, weight in module.named_parameters(recurse=False)
                if weight.dim() == 3
            ]
    return defaultdict(
        list, {reason: names for reason, names in found.items() if names}
    )


def _reason(linear: nn.Linear, shared: set[int]) -> str | None:
    """Return why a linear stays dense, whatever the device; None if it is 2:4."""
    if type(linear) is not nn.Linear:
        return f"a {type(linear).__name__}, which is no plain linear"
    if "_hf_hook" in linear.__dict__:
        return "a model on several devices, or offloaded, by its device_map"
    is_quantized = linear.weight.dtype in DTYPES_8 or "forward" in linear.__dict__
    if is_quantized and (reason := unsupported_scheme(linear)):
        return reason
    weight = linear.weight.detach()
    if type(weight.data) is not Tensor or weight.is_meta:
        return "a weight that is offloaded or cut"
    if weight.data_ptr() in shared:
        return "a weight that another module shares"
    if weight.dtype not in WORDS:
        return f"weights in {weight.dtype}"
    if not bool(nonzero_bits(weight).any()):
        return "a weight of zeros alone"
    try:
        compress(weight)
    except ValueError as error:
        if "-0.0" in str(error):
            return "a weight with -0.0 (nm-permute convert DIR OUT --clear-zeros)"
        return "a weight that is not 2:4"
    if weight.dtype not in DTYPES_16 + DTYPES_8:
        return f"weights in {weight.dtype}, load them with dtype=torch.bfloat16"
    return None


def _pack(linear: nn.Linear, mode: Mode, host: Host) -> str | None:
    """Pack a 2:4 linear; return why it stays dense, or None."""
    weight = linear.weight.detach()
    made = SparseLinear.prepare(weight, mode, is_checked=True)
    if isinstance(made, str):
        return made
    words = WORDS[weight.dtype]
    back = made.unpack((linear.out_features, linear.in_features), weight.dtype)
    if not torch.equal(back.view(words), weight.view(words)):
        return "values that packing would lose: -0.0, inf or NaN"
    pack_linear(linear, made, host)
    return None


def _shared(model: nn.Module) -> set[int]:
    """Find the addresses of weights that several modules have, such as tied heads."""
    owners = Counter(
        weight.data_ptr()
        for module in model.modules()
        for weight in module._parameters.values()
        if weight is not None and weight.numel()
    )
    return {address for address, count in owners.items() if count > 1}


def _bytes(model: nn.Module) -> int:
    """Sum up the bytes of parameters and buffers, each once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def _told(dense: dict[str, list[str]]) -> str:
    return ", ".join(
        f"{len(names)} ({from_to(names)}: {reason})" for reason, names in dense.items()
    )
