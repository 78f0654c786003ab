# SPDX-License-Identifier: Apache-2.0
"""Keep the zeros of a pruned model while it is trained further."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary, finalize, ref

import torch
from jaxtyping import Bool, Shaped, UInt8
from loguru import logger
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from nm_permute_plugin.checkpoint.bitmask import pack_bits, unpack_bits
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.pruning.arguments import must_be_model, refuse_accelerated


def keep_masks(model: nn.Module, mask_structure: str = "2:4") -> "KeptMasks":
    """
    Keep the zeros of a pruned model from now on, however its weights are trained.

    Weights that are zero now get no gradient, and are set to zero again after every step
    of any torch optimizer that holds them: a loop of your own, transformers' ``Trainer``,
    gradient accumulation and mixed precision need nothing else. Kept are the zeros of
    every weight matrix that follows the pattern. A mask takes one bit a weight.

    >>> import torch
    >>> linear = torch.nn.Linear(4, 1)
    >>> linear.weight.data = torch.tensor([[0.0, 1.0, 2.0, 0.0]])
    >>> optimizer = torch.optim.AdamW(linear.parameters())
    >>> with keep_masks(linear):
    ...     linear(torch.ones(1, 4)).sum().backward()
    ...     _ = optimizer.step()
    >>> (linear.weight == 0).tolist()
    [[True, False, False, True]]

    LoRA's ``merge_and_unload`` adds a dense update to the weights: merge inside of the
    ``with`` block, or call ``apply`` afterwards. What of the update falls on pruned weights
    is lost, and the log says how much it was.

    :param model: a model whose weights lie whole on its devices; FSDP and DeepSpeed's
        ZeRO cut them, which is refused
    :param mask_structure: the N:M pattern that the model was pruned to
    :return: the masks; they stay in force until ``remove``, the end of a ``with``
        block, or the end of the model
    :raises ValueError: if no weight of the model follows the pattern, or for a model that
        is accelerated
    :raises TypeError: for what is no model
    """
    must_be_model(model)
    refuse_accelerated(model)
    pattern = NMPattern.parse(mask_structure)
    if earlier := _KEPT.pop(model, None):
        earlier.remove()
    masks = []
    dense = 0
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.dim() not in (2, 3) or isinstance(module, nn.Embedding):
                continue
            if _follows(weight.detach(), pattern):
                masks.append(_Mask.of(module, name, weight))
            else:
                dense += 1
    if not masks:
        raise ValueError(
            f"no weight of this {type(model).__name__} follows {pattern}, so there are no "
            "zeros to keep. Load the pruned checkpoint, and call keep_masks before the "
            "first step; another pattern is named like keep_masks(model, '4:8')."
        )
    logger.info(
        f"keep_masks keeps the zeros of {len(masks)} {pattern} matrices; dense ones, which "
        f"train as ever: {dense}"
    )
    kept = _KEPT[model] = KeptMasks(model, masks)
    return kept


class KeptMasks:
    """Masks that stay in force while a model trains; ``keep_masks`` makes them."""

    def __init__(self, model: nn.Module, masks: "list[_Mask]") -> None:
        self._model = ref(model)
        self._masks = masks
        self._hooks = [
            weight.register_post_accumulate_grad_hook(mask.clear_gradient)
            for mask in masks
            if (weight := mask.weight()).requires_grad
        ]
        own = ref(self)

        def after_step(optimizer: Optimizer, *_: object) -> None:
            if kept := own():
                kept._after_step(optimizer)

        on_every_step = register_optimizer_step_post_hook(after_step)
        finalize(self, on_every_step.remove)
        self._hooks.append(on_every_step)

    def apply(self) -> int:
        """
        Set the pruned weights to zero again, and say what that takes away.

        :return: how many pruned weights were not zero
        :raises RuntimeError: if a weight has another shape than it had
        """
        count, lost, total = 0, 0.0, 0.0
        for mask in self._masks:
            weight, pruned = mask.weight().detach(), mask.pruned()
            values = weight[pruned].float()
            count += int(values.count_nonzero())
            lost += float(values.square().sum())
            total += float(weight.float().square().sum())
            weight.masked_fill_(pruned, 0)
        if count:
            logger.warning(
                f"{count} pruned weights were not zero any more, and are again: "
                f"{lost / total:.2%} of the weights' sum of squares is lost. A merged "
                "LoRA does that; so does training that no torch optimizer's step ends."
            )
        return count

    def remove(self) -> None:
        """Let the weights train freely again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        model = self._model()
        if model is not None and _KEPT.get(model) is self:
            del _KEPT[model]

    def __enter__(self) -> "KeptMasks":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.apply()
        finally:
            self.remove()

    def _after_step(self, optimizer: Optimizer) -> None:
        stepped = set(map(id, _parameters_of(optimizer)))
        for mask in self._masks:
            owner = mask.owner()
            if id(getattr(owner, mask.name, None)) in stepped:
                mask.weight().detach().masked_fill_(mask.pruned(), 0)


_KEPT: WeakKeyDictionary[nn.Module, KeptMasks] = WeakKeyDictionary()
"""Holds the masks of every model that is alive, whether or not its owner keeps them."""


@dataclass(frozen=True)
class _Mask:
    """
    Says which entries of a weight are pruned.

    :param owner: the module that has the weight; the mask does not keep it alive
    :param shape: the shape of the weight
    :param bits: set where it is pruned, row by row
    """

    owner: "ref[nn.Module]"
    name: str
    shape: torch.Size
    bits: UInt8[Tensor, "rows bytes"]

    @classmethod
    def of(cls, module: nn.Module, name: str, weight: Tensor) -> "_Mask":
        pruned = (weight.detach() == 0).flatten(0, -2)
        return cls(ref(module), name, weight.shape, pack_bits(pruned))

    def weight(self) -> Tensor:
        """The weight as it is now; raises RuntimeError where it was cut."""
        owner: Any = self.owner()
        weight: Tensor = getattr(owner, self.name)
        if weight.shape != self.shape or type(weight.data) is not Tensor:
            raise RuntimeError(
                f"the {self.name} of a {type(owner).__name__} was {list(self.shape)} when "
                f"keep_masks was called, and is a {type(weight.data).__name__} of "
                f"{list(weight.shape)} now. Weights that FSDP or ZeRO cuts are not "
                "supported; DistributedDataParallel is."
            )
        return weight

    def pruned(self) -> Bool[Tensor, "..."]:
        """Tell where the weight is pruned: flags of its shape, on its device."""
        flags = unpack_bits(self.bits.to(self.weight().device))
        return flags[:, : self.shape[-1]].reshape(self.shape)

    def clear_gradient(self, weight: Tensor) -> None:
        if weight.grad is not None:
            weight.grad.masked_fill_(self.pruned(), 0)


def _parameters_of(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _follows(weight: Shaped[Tensor, "..."], pattern: NMPattern) -> bool:
    """
    Say whether a weight follows the pattern along its inputs, however it stores them.

    [..., out, in] is usual, and Conv1D has [in, out]. A weight of zeros alone is not
    pruned: adapters start from it.
    """
    if not weight.is_floating_point() or weight.dtype.itemsize == 1 or weight.is_meta:
        return False
    for oriented in (weight, weight.transpose(-1, -2)):
        if oriented.shape[-1] % pattern.m == 0 and oriented.numel():
            kept = (oriented != 0).unflatten(-1, (-1, pattern.m))
            most = int(kept.sum(-1, dtype=torch.int16).max())
            if 0 < most <= pattern.n:
                return True
    return False
