# SPDX-License-Identifier: Apache-2.0
"""Carry a LoRA adapter of a base model over to a checkpoint whose channels have moved."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from loguru import logger
from safetensors.torch import save_file
from torch import Tensor, nn

from nm_permute_plugin._files import read_json
from nm_permute_plugin.checkpoint import disk, transaction
from nm_permute_plugin.checkpoint.checksums import refuse_changed
from nm_permute_plugin.checkpoint.record import FOLDER, earlier_record
from nm_permute_plugin.checkpoint.saving import writing
from nm_permute_plugin.checkpoint.shards import open_shard
from nm_permute_plugin.checkpoint.source import carry_files
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import (
    Permutation,
    compose,
    invert,
)
from nm_permute_plugin.specs.architectures import head_dim_of, spec_of
from nm_permute_plugin.specs.conv1d import is_transposed
from nm_permute_plugin.specs.fold import check_perms
from nm_permute_plugin.specs.grammar import Axis
from nm_permute_plugin.specs.matching import MovedParameter
from nm_permute_plugin.specs.moving import moved_axis
from nm_permute_plugin.specs.spec import ResolvedSpec, resolve

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_CHANGING = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Ways to start an adapter that change the base's weights whenever it is loaded."""

_ADDED = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector|token_adapter\.trainable_tokens_delta)"
    r"(?:\.(?P<leaf>weight|bias))?"
)
_WRAPPERS = re.compile(r"\.(base_layer|original_module|modules_to_save(\.default)?)\b")


def adapt(
    adapter: Path, checkpoint: Path, out: Path, model: nn.Module
) -> tuple[int, int]:
    """
    Write an adapter of a base model anew, so that it fits a checkpoint made of the base.

    Where no channel has another place than in the base, its tensors stay as they are.

    The columns of ``lora_A`` move as the columns of the weight that it adapts did, the rows
    of ``lora_B`` as its rows; weights that were trained as a whole move as a whole.

    :param adapter: a PEFT folder
    :param checkpoint: a folder with a record of its permutations
    :param out: a new or an empty folder
    :param model: of the checkpoint's class; its values are not read, and may be on the meta
        device
    :return: how many tensors have moved, and how many there are
    :raises FileNotFoundError: if there is no adapter, or no record
    :raises ValueError: for an adapter of another model or another kind, naming the tensor
    :raises FileExistsError: if ``out`` holds something
    """
    config, tensors, metadata = _read_adapter(adapter)
    _refuse_kinds(adapter, config)
    disk.refuse_occupied(out.resolve())
    record = earlier_record(checkpoint)
    if record is None:
        raise FileNotFoundError(
            f"{checkpoint} has no record of a fold ({FOLDER}/permutations.safetensors); "
            "name a checkpoint that `nm-permute prune` or oneshot made with this plugin"
        )
    refuse_changed(checkpoint, FOLDER)
    perms, report = record
    perms = _from_base_of(adapter, config, checkpoint, perms, report)
    stated = cast(Mapping[str, Any], report.get("modifier") or {}).get("spec")
    spec = spec_of(model) if stated is None else stated
    head_dim = head_dim_of(cast(Any, model).config)
    resolved = resolve(model, spec, NMPattern(2, 4), [], head_dim, with_values=False)
    try:
        check_perms(resolved, perms)
    except ValueError as error:
        record_file = checkpoint / FOLDER / "permutations.safetensors"
        raise ValueError(f"{record_file}: {error}") from error
    fold = _Fold(model, resolved, perms, tensors)
    new = {name: fold.moved(name, tensor) for name, tensor in tensors.items()}
    moved = sum(not torch.equal(new[name], tensors[name]) for name in tensors)
    disk.refuse_full(out.resolve(), sum(x.nbytes for x in new.values()))
    with transaction.directory(out.resolve()) as fresh:
        with writing(out):
            save_file(new, fresh / WEIGHTS, metadata)
        content = {**config, "base_model_name_or_path": str(checkpoint)}
        disk.write_json(fresh / CONFIG, content)
        carry_files(adapter.resolve(), fresh)
    return moved, len(new)


@dataclass(frozen=True)
class _Fold:
    """
    A fold of a model's channels, which the tensors of an adapter follow.

    :param tensors: all of the adapter
    """

    model: nn.Module
    resolved: ResolvedSpec
    perms: Mapping[str, Permutation]
    tensors: Mapping[str, Tensor]

    def moved(self, name: str, tensor: Tensor) -> Tensor:
        """
        A tensor of an adapter in the places that the fold gave its channels.

        :raises ValueError: if the model has no such module, or another shape
        """
        found = _ADDED.fullmatch(_WRAPPERS.sub("", name.removeprefix(_PREFIX)))
        if found is None:
            return self._whole(name, tensor)
        part, module = found["part"], found["module"]
        if self._packed(module):
            return self._of_experts(name, module, part, tensor)
        parameter = self._parameter(f"{module}.weight", name)
        axes = parameter.matrices[0]
        if is_transposed(self.model.get_submodule(module)):
            axes = axes[::-1]
        embeds = isinstance(self.model.get_submodule(module), nn.Embedding)
        out, into = (axes[1], axes[0]) if embeds else (axes[0], axes[1])
        if part in ("lora_A", "lora_embedding_A"):
            return self._along(name, tensor, 1, into)
        if part.startswith("token_adapter"):
            return self._along(name, tensor, 1, out)
        # Convolutions keep their magnitudes as [1, out, 1, 1].
        dim = 1 if part == "lora_magnitude_vector" and tensor.dim() > 1 else 0
        return self._along(name, tensor, dim, out)

    def _whole(self, name: str, tensor: Tensor) -> Tensor:
        """A weight or a bias of the model itself, which was trained as a whole."""
        own = _WRAPPERS.sub("", name.removeprefix(_PREFIX))
        parameter = self._parameter(own, name)
        if not parameter.packed:
            return self._matrix(name, tensor, parameter.matrices[0])
        if len(tensor) != len(parameter.matrices):
            raise _other_shape(name, tensor, [len(parameter.matrices)])
        pairs = zip(tensor, parameter.matrices, strict=True)
        return torch.stack([self._matrix(name, part, axes) for part, axes in pairs])

    def _matrix(self, name: str, tensor: Tensor, axes: tuple[Axis, ...]) -> Tensor:
        if tensor.dim() != len(axes):
            raise _other_shape(name, tensor, [_length(axis) for axis in axes])
        for dim, axis in enumerate(axes):
            if any(part.space is not None for part in axis):
                tensor = self._along(name, tensor, dim, axis)
        return tensor

    def _of_experts(self, name: str, module: str, part: str, tensor: Tensor) -> Tensor:
        """
        A factor for a packed stack of matrices: ``lora_A`` [experts x rank, in] or
        ``lora_B`` [out, rank x experts], of whichever stack of the module it fits.
        """
        names = [
            name.replace(f".{part}", f".{other}") for other in ("lora_A", "lora_B")
        ]
        if part not in ("lora_A", "lora_B") or not set(names) <= self.tensors.keys():
            raise ValueError(
                f"{name} belongs to the packed experts of {module}, of which only pairs of "
                "lora_A and lora_B can be carried over"
            )
        first, second = (self.tensors[name].shape for name in names)
        stacks = [
            stack
            for stack in self._packed(module)
            if [_length(axis) for axis in stack.matrices[0]] == [second[0], first[1]]
            and first[0] % len(stack.matrices) == 0
        ]
        if len(stacks) != 1:
            raise ValueError(
                f"{name} {list(tensor.shape)} fits {len(stacks)} of the packed weights of "
                f"{module}; an adapter of experts can be carried over if it fits just one"
            )
        side, dim = (1, 1) if part == "lora_A" else (0, 0)
        axes = [matrix[side] for matrix in stacks[0].matrices]
        factors: Sequence[Tensor]
        if part == "lora_A":
            factors = tensor.unflatten(0, (len(axes), -1)).unbind(0)
        else:
            factors = tensor.unflatten(1, (-1, len(axes))).unbind(2)
        pairs = zip(factors, axes, strict=True)
        new = [self._along(name, factor, dim, axis) for factor, axis in pairs]
        if part == "lora_A":
            return torch.cat(new)
        return torch.stack(new, 2).flatten(1)

    def _packed(self, module: str) -> list[MovedParameter]:
        return [
            parameter
            for parameter in self.resolved.parameters
            for own in parameter.names
            if parameter.packed and own.rpartition(".")[0] == module
        ]

    def _parameter(self, own: str, name: str) -> MovedParameter:
        for parameter in self.resolved.parameters:
            if own in parameter.names:
                return parameter
        raise ValueError(
            f"the adapter's {name} belongs to no weight of {type(self.model).__name__} "
            f"({own}): it is of another model, or of a kind that is not known"
        )

    def _along(self, name: str, tensor: Tensor, dim: int, axis: Axis) -> Tensor:
        if tensor.dim() <= dim or tensor.shape[dim] != _length(axis):
            raise _other_shape(name, tensor, [_length(axis)])
        return moved_axis(tensor, dim, axis, self.resolved, self.perms).contiguous()


def _read_adapter(
    adapter: Path,
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """The config, the tensors and the metadata of a PEFT folder."""
    for name in (CONFIG, WEIGHTS):
        if not (adapter / name).is_file():
            pickled = (adapter / "adapter_model.bin").is_file() and name == WEIGHTS
            raise FileNotFoundError(
                f"{adapter} holds no LoRA adapter of PEFT (no {name})"
                + ("; save it by PEFT's save_pretrained, as safetensors" * pickled)
            )
    config, stored = read_json(adapter / CONFIG), open_shard(adapter / WEIGHTS)
    if not isinstance(config, dict):
        raise ValueError(f"{adapter / CONFIG} must hold an object")
    tensors = {name: stored.read(name) for name in stored.tensors}
    return config, tensors, dict(stored.metadata)


def _refuse_kinds(adapter: Path, config: Mapping[str, Any]) -> None:
    for what in _unfit(config):
        raise ValueError(f"{adapter / CONFIG}: {what}, which cannot be carried over")


def _unfit(config: Mapping[str, Any]) -> Iterator[str]:
    if config.get("peft_type") != "LORA":
        yield f"peft_type {config.get('peft_type')!r} is no LORA"
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGING):
        yield (
            f"init_lora_weights {start!r} changes the base's weights at each loading; have "
            "PEFT's save_pretrained convert it by path_initial_model_for_weight_conversion"
        )
    if config.get("layer_replication"):
        yield "layer_replication gives layers other numbers"
    if config.get("use_qalora"):
        yield "use_qalora takes groups of channels together"


def _from_base_of(
    adapter: Path,
    config: Mapping[str, Any],
    checkpoint: Path,
    perms: dict[str, Tensor],
    report: Mapping[str, object],
) -> dict[str, Tensor]:
    """
    The permutations from the adapter's own base to the checkpoint.

    The base may be an earlier fold of the same model, whose record tells so.
    """
    base = str(config.get("base_model_name_or_path") or "")
    first = str(report.get("base_model") or "")
    if base and Path(base).is_dir():
        earlier = earlier_record(Path(base))
        refuse_changed(Path(base), FOLDER)
        if earlier is not None:
            old, told = earlier
            first = str(told.get("base_model") or "")
            undone = {name: invert(perm) for name, perm in old.items()}
            both = {**undone, **perms}
            for name in undone.keys() & perms.keys():
                both[name] = compose(undone[name], perms[name])
            base, perms = first, both
    if base and first and Path(base).name != Path(first).name:
        logger.warning(
            f"{adapter} was made for {base}, and {checkpoint} of {first}: the result is "
            "right only if these are the same weights"
        )
    return perms


def _length(axis: Axis) -> int:
    return sum(part.length for part in axis)


def _other_shape(name: str, tensor: Tensor, expected: list[int]) -> ValueError:
    return ValueError(
        f"the adapter's {name} has shape {list(tensor.shape)}, and the checkpoint has "
        f"{expected} channels there: it is an adapter of another model"
    )
