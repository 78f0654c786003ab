# SPDX-License-Identifier: Apache-2.0
"""
Compile the elementwise parts of a model's layers: on a GPU each becomes one kernel.

As transformers writes them, a norm, a rotary embedding and a gated activation are chains of
small kernels, each of which reads and writes all activations of a layer. Of a small model's
training step they take a third.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nm_permute_plugin.pruning.running.fast_dtype import hands_out_copies
from nm_permute_plugin.pruning.running.masked import forwards

STEPS = 100
"""Training steps from which on the seconds that compiling takes are regained."""

BACKEND = "inductor"

VARIANTS = 64
"""Of one function, by axes, lengths and what needs gradients; TorchDynamo's own limit of 8
leaves the norms of Qwen3 (of hidden states, of queries, of keys) to Python."""

SCALES = (1.0, 1e2, 1e4)
"""Of the samples that tell a gated feed-forward layer from one that clamps, for example."""

ROTARY = "apply_rotary_pos_emb"
"""What transformers calls rotary embeddings, in the module of every model that has them."""

ORIGINAL = "_before_nm_permute"
"""Where a compiled rotary embedding has the one that it was made from."""

HELD = "_original_forward_func"
"""Where compressed-tensors keeps the forward of a module whose weights it holds."""

GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")
"""The parts of a feed-forward layer with a gate."""


@contextmanager
def compiled_elementwise(model: nn.Module, steps: int) -> Iterator[None]:
    """
    Run norms, rotary embeddings and gated activations compiled while the context lasts.

    They stay as they are where nothing would be gained: on a CPU, for a model in shards or
    offloaded, for few steps, and where PyTorch cannot compile, which is logged. A compiled
    chain rounds to 16 bit at its end only; the dense and the pruned model alike.

    :param model: with its weights where it runs
    :param steps: training steps that will be taken
    """
    if steps < STEPS or not _is_on_one_gpu(model) or not _can_compile(model):
        yield
        return
    names = {type(part).__module__ for part in model.modules()}
    with ExitStack() as stack:
        stack.enter_context(torch._dynamo.config.patch(recompile_limit=VARIANTS))
        for module in filter(None, map(sys.modules.get, sorted(names))):
            stack.enter_context(_compiled_rotary(module))
        stack.enter_context(forwards({**_norms(model), **_gated(model)}))
        yield


@contextmanager
def _compiled_rotary(module: ModuleType) -> Iterator[None]:
    """Let the layers of a module of transformers find a compiled rotary embedding."""
    found = getattr(module, ROTARY, None)
    if not callable(found):
        yield
        return
    rotary = getattr(found, ORIGINAL, found)  # of a run beside this one
    ours = _compiled(rotary)
    setattr(ours, ORIGINAL, rotary)
    setattr(module, ROTARY, ours)
    try:
        yield
    finally:
        if getattr(module, ROTARY) is ours:
            setattr(module, ROTARY, rotary)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, backend=BACKEND)


def _is_on_one_gpu(model: nn.Module) -> bool:
    """Whether all weights are whole on one GPU, and no hook of a host moves them."""
    if any(map(_is_hooked, model.modules())) or find_spec("triton") is None:
        return False
    places = {
        (isinstance(p, DTensor), p.device.type, p.device) for p in model.parameters()
    }
    return len(places) == 1 and next(iter(places))[:2] == (False, "cuda")


def _is_hooked(module: nn.Module) -> bool:
    """
    Whether a host moves the weights of a module, or runs it in a way of its own.

    llm-compressor holds those of a model that fits on a GPU there, behind a forward that
    moves inputs only.
    """
    wrapped = "forward" in module.__dict__ and not hasattr(module, HELD)
    return wrapped or hands_out_copies(module)


def _can_compile(model: nn.Module) -> bool:
    """Whether a compiled product can be run, forward and backward."""
    parameter = next(model.parameters())
    x = torch.ones(2, 64, dtype=parameter.dtype, device=parameter.device)
    x.requires_grad_()
    try:
        with torch.enable_grad():
            _compiled(_gate_of(nn.functional.silu))(x, x).sum().backward()
    except Exception as error:  # a compiler, its headers, or a driver is missing
        reason = (str(error) or repr(error)).splitlines()[0]
        logger.info(f"Elementwise parts are not compiled: {reason}")
        return False
    return True


def _norms(model: nn.Module) -> dict[nn.Module, Callable[..., Any]]:
    """The norms that are written in Python, compiled once a class."""
    found = {
        module: type(module)
        for module in model.modules()
        if type(module).__name__.endswith("RMSNorm") and not list(module.children())
    }
    made = {kind: _compiled(kind.forward) for kind in set(found.values())}
    return {
        module: partial(_norm_of, module, made[kind]) for module, kind in found.items()
    }


def _norm_of(
    module: nn.Module, norm: Callable[[nn.Module, Tensor], Tensor], x: Tensor
) -> Tensor:
    return norm(_as_loaded(module), x)


def _as_loaded(module: nn.Module) -> nn.Module:
    """A module with the same weights in a plain dictionary, which PyTorch can trace."""
    if type(module._parameters) is dict:
        return module
    plain = type(module).__new__(type(module))
    plain.__dict__.update(module.__dict__)
    for name in ("forward", HELD):
        plain.__dict__.pop(name, None)
    for name in ("_parameters", "_buffers"):
        plain.__dict__[name] = dict(module.__dict__[name].items())
    return plain


def _gated(model: nn.Module) -> dict[nn.Module, Callable[..., Any]]:
    """The feed-forward layers that are a gated activation between linears."""
    found: dict[nn.Module, Callable[..., Any]] = {}
    made: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}
    for module in model.modules():
        if sorted(name for name, _ in module.named_children()) != sorted(GATED):
            continue
        known: Any = module
        name = repr(known.act_fn)
        if name not in made:
            plain = _gate_of(known.act_fn)
            made[name] = plain, _compiled(plain)
        # What is compiled is shared by layers that give the same with it.
        shared, compiled = made[name]
        if _is_gated(known, shared):
            found[module] = partial(_forward, module, compiled)
    return found


def _gate_of(activation: Callable[..., Any]) -> Callable[..., Any]:
    def gated(gate: Tensor, up: Tensor) -> Tensor:
        out: Tensor = activation(gate) * up
        return out

    return gated


def _forward(module: Any, gated: Callable[..., Any], x: Tensor) -> Tensor:
    out: Tensor = module.down_proj(gated(module.gate_proj(x), module.up_proj(x)))
    return out


def _is_gated(module: Any, gate: Callable[..., Any]) -> bool:
    """Whether the layer computes ``down(act(gate(x)) * up(x))``, seen on samples."""
    weight = module.gate_proj.weight
    x = torch.linspace(-1, 1, weight.shape[1], dtype=weight.dtype, device=weight.device)
    samples = torch.stack([scale * x for scale in SCALES])
    try:
        with torch.no_grad():
            ours, theirs = _forward(module, gate, samples), module(samples)
    except Exception:  # it is called in another way
        return False
    return torch.equal(ours, theirs)  # not where one is no number
