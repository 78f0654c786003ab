# SPDX-License-Identifier: Apache-2.0
"""Whether a spec is right is tried out: fold random permutations, compare the outputs."""

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float
from loguru import logger
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import Permutation, from_blocks
from nm_permute_plugin.specs.architectures import head_dim_of
from nm_permute_plugin.specs.fold import Write, fold, invert_all, write_in_place
from nm_permute_plugin.specs.layer_names import counted, merged
from nm_permute_plugin.specs.spec import ResolvedSpec, Spec, resolve

TOLERANCE = 1e-9
"""Rounding in float64 changes outputs by less than this, relative to their norm."""

CHUNK = 1 << 22
"""Outputs are compared by so many elements at a time: a copy of all logits in float64
would take gigabytes beside a large model."""

VOCABULARY, EXPERTS = 1024, 8
"""A model of a few layers keeps no more tokens and experts: specs treat all alike."""

Outputs = Callable[[], Mapping[str, Tensor]]
"""``outputs()`` runs the model as it is now, and gives back its outputs by name."""


def fold_checked(
    model: nn.Module,
    resolved: ResolvedSpec,
    perms: Mapping[str, Permutation],
    outputs: Outputs,
    tolerance: float,
    write: Write = write_in_place,
) -> float:
    """
    Fold, and return how far the outputs moved: ``|after - before| / |before|``, by the
    Euclidean norm, the largest of all outputs.

    A fold that moves them further than ``tolerance`` is undone. Any other stays.

    :param perms: by space, as for ``fold``
    :param outputs: runs the model on always the same batch
    :param tolerance: what rounding explains in the model's dtype; infinite to measure only
    :param write: how a parameter's new value is stored
    :raises ValueError: if the unfolded model has no output, or one that is not finite or
        zero everywhere
    :raises RuntimeError: if the fold changes the function of the model
    """
    with torch.no_grad():
        before = outputs()
        if not before:
            raise ValueError("the model gives back no output that could be compared")
        for name, tensor in before.items():
            _refuse_unfit(name, tensor)
        fold(model, resolved, perms, write)
        after = outputs()
        change = max(_change(tensor, after[name]) for name, tensor in before.items())
    if not change <= tolerance:
        fold(model, resolved, invert_all(perms), write)
        raise RuntimeError(
            f"folding changed the model's outputs by {change:.1e} (relative), more than "
            f"rounding in {next(model.parameters()).dtype} explains: the permutation spec "
            "does not fit this model. The weights are as they were; correct `spec:` in the "
            "recipe."
        )
    return change


def check_on_few_layers(
    model: nn.Module,
    spec: Spec,
    pattern: NMPattern,
    layers: int = 2,
    seed: int = 0,
) -> float | None:
    """
    Try a spec, which fits the model, on a copy of its class with few layers and random
    weights in float64, and return how far random permutations moved the copy's outputs.

    In 16 bits the model itself hides small mistakes: rounding may move its outputs by 5 %,
    a forgotten bias by less. In float64 nothing hides them. The model is not touched, and
    the copy lives on the CPU.

    :param layers: the copy has no more than these
    :return: None, after a warning, if no such copy can be built from the config and run;
        only the model itself can say then whether the spec is right
    :raises RuntimeError: if the spec changes the function of the copy; the error names the
        spaces that do, and parameters that may have been forgotten
    """
    try:
        small = random_model(type(model), model.config, seed, layers)
        vary_constants(small, seed)
        batch = random_batch(small, seed)
        outputs_of(small, batch)
        # Lines of deeper layers fit nothing here; the model has all that they name.
        lines = {f"{line.removesuffix('?')}?": words for line, words in spec.items()}
        resolved = resolve(small, lines, pattern, [], head_dim_of(small.config))
    except Exception as error:  # whatever a class that we do not know may raise
        logger.warning(
            f"the spec is not checked in float64: a {type(model).__name__} with {layers} "
            f"layers cannot be made from its config and run ({error})"
        )
        return None
    perms = random_perms(resolved, seed)

    def change(some: Mapping[str, Permutation]) -> float:
        moved = fold_checked(
            small, resolved, some, lambda: outputs_of(small, batch), math.inf
        )
        fold(small, resolved, invert_all(some))
        return moved

    found = change(perms)
    if found <= TOLERANCE:
        return found
    wrong: list[str] = []
    for kind in counted(perms):
        some = {name: perm for name, perm in perms.items() if kind in counted([name])}
        if not change(some) <= TOLERANCE:
            wrong += some
    raise RuntimeError(
        "the permutation spec is wrong: in float64, random permutations change the outputs "
        f"of a {type(model).__name__} with {layers} layers by {found:.1e} (relative), "
        f"where rounding explains {TOLERANCE:.0e}.{_suspects(resolved, wrong)} The "
        "weights are as they were; correct `spec:` in the recipe."
    )


def _suspects(resolved: ResolvedSpec, wrong: list[str]) -> str:
    """Name the spaces, and what never moves though it is as long as one of them."""
    sizes = {resolved.spaces[name].size for name in wrong}
    still = [
        name
        for parameter in resolved.parameters
        if not parameter.spaces and sizes & set(parameter.shape)
        for name in parameter.names
    ]
    text = f" The permutations of {', '.join(merged(wrong))} do it." if wrong else ""
    if still:
        text += f" See whether these should move with them: {', '.join(merged(still))}."
    return text


def _refuse_unfit(name: str, output: Tensor) -> None:
    if not all(bool(chunk.isfinite().all()) for chunk in _chunks(output)):
        raise ValueError(
            f"the dense model's outputs are not finite ({name}); check its weights, and "
            "load it in bfloat16 or float32"
        )
    if not any(bool(chunk.any()) for chunk in _chunks(output)):
        raise ValueError(
            f"the dense model's output {name} is zero everywhere, so that nothing would "
            "show a wrong fold; check the model's weights"
        )


def _change(before: Tensor, after: Tensor) -> float:
    """Return ``|after - before| / |before|``; infinite if that is no number."""
    moved = size = 0.0
    for old, new in zip(_chunks(before), _chunks(after), strict=True):
        moved += float((new.double() - old.double()).square().sum())
        size += float(old.double().square().sum())
    change = math.sqrt(moved / size)
    return math.inf if math.isnan(change) else change


def _chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    chunks: tuple[Tensor, ...] = tensor.flatten().split(CHUNK)
    return chunks


def random_perms(resolved: ResolvedSpec, seed: int = 0) -> dict[str, Permutation]:
    """Give every space a random permutation that leaves no segment."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: from_blocks(
            torch.rand(
                space.size // space.segment, space.segment, generator=generator
            ).argsort()
        )
        for name, space in resolved.spaces.items()
    }


def random_batch(
    model: nn.Module, seed: int = 0, tokens: int = 24
) -> dict[str, Tensor]:
    """
    Make two rows of random tokens, of pixels of the config's size, or of both.

    :param model: a transformers model; its config says which inputs it takes
    :param tokens: the length of a row of text, at most
    """
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    dtype = next(model.parameters()).dtype
    if hasattr(config, "image_token_id"):
        return _text_with_image(config, generator, dtype, tokens)
    vision = getattr(config, "vision_config", None)
    if vision is not None:
        text = _text(config.text_config, generator, tokens)
        return {**text, **_pixels(vision, generator, dtype)}
    if hasattr(config, "image_size"):
        return _pixels(config, generator, dtype)
    return _text(config, generator, tokens)


def _text(config: Any, generator: torch.Generator, tokens: int) -> dict[str, Tensor]:
    tokens = min(tokens, getattr(config, "max_position_embeddings", tokens) - 2)
    ids = torch.randint(config.vocab_size, (2, tokens), generator=generator)
    pad = getattr(config, "pad_token_id", None)
    if pad is not None:  # classifiers read the last token that is no padding
        ids[ids == pad] = (pad + 1) % config.vocab_size
    return {"input_ids": ids}


def _pixels(
    config: Any, generator: torch.Generator, dtype: torch.dtype
) -> dict[str, Tensor]:
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    shape = (2, getattr(config, "num_channels", 3), height, width)
    return {"pixel_values": torch.randn(shape, generator=generator).to(dtype)}


def _text_with_image(
    config: Any, generator: torch.Generator, dtype: torch.dtype, tokens: int
) -> dict[str, Tensor]:
    """Make one row of text, an image cut into patches, and text, as Qwen2-VL takes it."""
    vision, special = config.vision_config, config.image_token_id
    merge = vision.spatial_merge_size
    height, width = 2 * merge, 3 * merge
    places = height * width // merge**2
    ids = torch.randint(
        min(config.text_config.vocab_size, special), (1, tokens), generator=generator
    )
    before, after = ids[:, : tokens // 2], ids[:, tokens // 2 :]
    image = torch.full((1, places), special)
    ids = torch.cat([before, image, after], dim=1)
    channels = getattr(vision, "in_channels", 3)
    values = channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(height * width, values, generator=generator)
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == special).int(),
        "pixel_values": pixels.to(dtype),
        "image_grid_thw": torch.tensor([[1, height, width]]),
    }


def outputs_of(
    model: nn.Module, batch: Mapping[str, Tensor]
) -> dict[str, Float[Tensor, "..."]]:
    """
    Run a transformers model, and return its floating-point outputs by name.

    A model in float64 stays in it: norms and softmax do not round to float32 inside.

    :param batch: keyword arguments of the model's forward
    """
    exact = next(model.parameters()).dtype == torch.float64
    with torch.no_grad(), _Float64() if exact else nullcontext():
        out = model(**batch)
    return {
        name: tensor.detach()
        for name, tensor in out.items()
        if isinstance(tensor, Tensor) and tensor.is_floating_point()
    }


def random_model(
    kind: Callable[[Any], nn.Module],
    config: Any,
    seed: int = 0,
    layers: int | None = None,
) -> nn.Module:
    """
    Build a model of random weights, in float64 on the CPU.

    :param kind: the model's class, which takes a config
    :param config: stays as it is
    :param layers: cut each tower to this many, and the vocabulary and the experts too;
        None builds all that the config says
    """
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"  # others know no float64, or no CPU
    if layers is not None:
        _cut(config, layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return to_float64(kind(config))


def _cut(config: Any, layers: int) -> None:
    towers = [getattr(config, f"{name}_config", None) for name in ("text", "vision")]
    for part in (config, *(tower for tower in towers if tower is not None)):
        for key in ("num_hidden_layers", "depth"):
            count = getattr(part, key, None)
            if isinstance(count, int) and count > layers:
                setattr(part, key, layers)
                for name, value in list(vars(part).items()):  # such as layer_types
                    listed = isinstance(value, list) and len(value) == count
                    if listed and "layer" in name:
                        setattr(part, name, value[:layers])
        for key in ("num_experts", "num_local_experts"):
            count, used = (
                getattr(part, key, None),
                getattr(part, "num_experts_per_tok", 1),
            )
            if isinstance(count, int) and count > EXPERTS:
                setattr(part, key, max(EXPERTS, used))
        # Images have tokens of their own, perhaps the last of the vocabulary.
        if not hasattr(config, "image_token_id") and hasattr(part, "vocab_size"):
            part.vocab_size = min(part.vocab_size, VOCABULARY)
            if (getattr(part, "pad_token_id", None) or 0) >= part.vocab_size:
                part.pad_token_id = 0


def vary_constants(model: nn.Module, seed: int = 0) -> list[str]:
    """
    Give random values, from 0.5 to 1.5, to parameters whose entries are all equal: in a
    norm of ones or a bias of zeros, a forgotten permutation would not show.

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
    """Turn a model to float64, where a right fold changes outputs by rounding alone."""
    choose = getattr(model, "set_experts_implementation", None)
    if choose is not None:
        choose("eager")  # grouped matrix products know no float64
    return model.double().eval()


class _Float64(TorchFunctionMode):
    """Inside, whatever asks for float32 gets float64."""

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
