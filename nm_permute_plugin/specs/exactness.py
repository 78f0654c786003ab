# SPDX-License-Identifier: Apache-2.0
"""Whether a spec is right: fold random orders and compare the model's outputs."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nm_permute_plugin.maths.permutation import Permutation, from_blocks
from nm_permute_plugin.specs.fold import fold
from nm_permute_plugin.specs.spec import ResolvedSpec


def random_perms(resolved: ResolvedSpec, seed: int = 0) -> dict[str, Permutation]:
    """A random permutation of every space that leaves no segment."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: from_blocks(
            torch.rand(
                space.size // space.segment, space.segment, generator=generator
            ).argsort()
        )
        for name, space in resolved.spaces.items()
    }


def change_by_fold(
    model: nn.Module,
    resolved: ResolvedSpec,
    perms: Mapping[str, Permutation],
    batch: Mapping[str, Tensor],
) -> float:
    """
    Fold, and return the largest change of an output, relative to its largest value.

    The model stays folded.

    :param batch: keyword arguments of the model's forward
    :raises ValueError: if an output is not finite
    """
    before = outputs_of(model, batch)
    for name, tensor in before.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"the model's output {name} is not finite before the fold")
    fold(model, resolved, perms)
    after = outputs_of(model, batch)
    return max(
        float((after[name] - tensor).abs().max() / tensor.abs().max())
        for name, tensor in before.items()
    )


def outputs_of(
    model: nn.Module, batch: Mapping[str, Tensor]
) -> dict[str, Float[Tensor, "..."]]:
    """
    What a transformers model gives back, by name; floating-point tensors only.

    A model in float64 stays in it: norms and softmax do not round to float32 inside.
    """
    exact = next(model.parameters()).dtype == torch.float64
    with torch.no_grad(), _Float64() if exact else nullcontext():
        out = model(**batch)
    return {
        name: tensor.detach()
        for name, tensor in out.items()
        if isinstance(tensor, Tensor) and tensor.is_floating_point()
    }


def vary_constants(model: nn.Module, seed: int = 0) -> list[str]:
    """
    Give random values to parameters whose entries are all equal: in a norm of ones or a
    bias of zeros, a forgotten permutation would not show.

    :return: the names of those parameters
    """
    generator = torch.Generator().manual_seed(seed)
    varied = []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.numel() > 1 and bool(
                (parameter == parameter.flatten()[0]).all()
            ):
                noise = torch.rand(parameter.shape, generator=generator) + 0.5
                parameter.copy_(noise)
                varied.append(name)
    return varied


def to_float64(model: nn.Module) -> nn.Module:
    """The model in float64, where a right fold changes outputs by rounding alone."""
    choose = getattr(model, "set_experts_implementation", None)
    if choose is not None:
        choose("eager")  # grouped matrix products know no float64
    return model.double().eval()


class _Float64(TorchFunctionMode):
    """Whatever asks for float32 gets float64."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(
            *(_widened(value) for value in args),
            **{name: _widened(value) for name, value in (kwargs or {}).items()},
        )


def _widened(value: object) -> object:
    return torch.float64 if value is torch.float32 else value
