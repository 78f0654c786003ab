# SPDX-License-Identifier: Apache-2.0
"""
Several processes that find one permutation together, started by ``torchrun``.

Every process (a rank) holds all calibration data and the whole problem, and works on its
own rows of every batch. Sums over rows become sums over ranks, so that N ranks find what
one rank finds on the same data, up to the rounding of sums. What is decided, read or
written once is the work of the first rank.

Without a process group of ``torch.distributed`` there is one rank, and nothing here costs
anything.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, distributed
from torch.utils._pytree import tree_map
from tqdm import tqdm

from nm_permute_plugin.pruning.data import Batch, token_mask
from nm_permute_plugin.pruning.heartbeat import Heartbeat
from nm_permute_plugin.pruning.processes import refuse_strange, started

T = TypeVar("T")

Bar: TypeAlias = "tqdm[Any]"

PATIENCE = timedelta(hours=3)
"""How long ranks wait for the first one, which may search or save meanwhile."""

BYTES_OF_A_BUCKET = 25 << 20
"""Gradients that are summed in one call, which begins while backward goes on."""


def begin(device: torch.device) -> None:
    """
    Join the process group of ``torchrun``, unless that has been done.

    :param device: of this rank; GPUs talk by NCCL, CPUs by gloo
    :raises ValueError: if there are several processes that ``torchrun`` has not started
    """
    if _is_up() or started() == 1:
        return
    refuse_strange()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo", device_id=device if on_gpu else None
    )
    Heartbeat(number(), count())


def count() -> int:
    """How many ranks there are."""
    return distributed.get_world_size() if _is_up() else 1


def number() -> int:
    """The number of this rank, from 0 on."""
    return distributed.get_rank() if _is_up() else 0


def is_first() -> bool:
    """Whether this is the rank that decides, reads, writes and speaks."""
    return number() == 0


def wait() -> None:
    """Go on when every rank is here."""
    if count() > 1:
        distributed.monitored_barrier(_words(), PATIENCE, wait_all_ranks=True)


def of_first(make: Callable[[], T]) -> T:
    """
    What ``make`` makes on the first rank, on all ranks.

    Tensors arrive on the CPU, or on a rank's own GPU if they were on the first one's.

    :param make: makes dicts, lists and tuples of tensors, numbers and words; it is called
        on the first rank alone
    :raises Exception: what ``make`` raises, on all ranks
    """
    if count() == 1:
        return make()
    failed: Exception | None = None
    sent: list[Any] = [None, None]
    made: T | None = None
    if is_first():
        try:
            made = make()
            sent = [None, _packed(made)]
        except Exception as error:
            failed = error
            kind = type(error) if type(error) in (ValueError, OSError) else RuntimeError
            sent = [kind(str(error)), None]
    distributed.broadcast_object_list(sent, src=0, group=_words())
    if failed is not None:
        raise failed
    if sent[0] is not None:
        raise sent[0]
    return cast("T", made) if is_first() else cast("T", _unpacked(sent[1]))


def gathered(value: T) -> list[T]:
    """The value of every rank, in their order; tensors arrive on the CPU."""
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    distributed.all_gather_object(found, tree_map(_on_cpu, value), group=_words())
    return found


def device() -> torch.device:
    """Where ranks sum: on a GPU each, or on CPUs."""
    return torch.device("cuda" if "nccl" in distributed.get_backend() else "cpu")


def total(value: float | int) -> float:
    """The sum over ranks of a number, the same bits on all of them."""
    if count() == 1:
        return float(value)
    summed = torch.tensor(value, dtype=torch.float64, device=device())
    distributed.all_reduce(summed)
    return float(summed)


def totals(values: Sequence[Tensor]) -> list[Tensor]:
    """
    The sums over ranks of tensors, added in float64, in the dtype that they came in.

    :param values: of the same shapes on all ranks
    """
    if count() == 1 or not values:
        return list(values)
    flat = torch.cat([value.to(device(), torch.float64).flatten() for value in values])
    distributed.all_reduce(flat)
    parts = flat.split([value.numel() for value in values])
    return [
        part.view_as(value).to(value.device, value.dtype)
        for part, value in zip(parts, values, strict=True)
    ]


def bar(items: Any = None, desc: str = "", shown: bool = True, **options: Any) -> Bar:
    """A progress bar, which the first rank shows."""
    # Said only where it is not: otherwise the environment may have switched bars off.
    if not (shown and is_first()):
        options["disable"] = True
    made: Bar = tqdm(items, desc, **options)
    return made


def own_part(batch: Batch, turn: int) -> tuple[Batch, float]:
    """
    The rows of a batch that are this rank's, and their share of what counts in it.

    Every rank gets a row at least, so that all of them run the model equally often; where
    there are fewer rows than ranks, some get one with the share 0. A sample of text with
    images, whose rows are no rows, is one rank's.

    :param turn: the number of the batch, by which whole samples take turns
    """
    ranks = count()
    if ranks == 1:
        return batch, 1.0
    counted: Tensor = token_mask(batch)
    if len({len(tensor) for tensor in batch.values()}) > 1:
        return batch, float(turn % ranks == number())
    rows = len(counted)
    # A rank more to the front for every batch, so that short batches are dealt evenly.
    place = (number() + turn) % ranks if rows < ranks else number()
    first, end = rows * place // ranks, rows * (place + 1) // ranks
    if first == end:
        return {name: tensor[:1] for name, tensor in batch.items()}, 0.0
    share = float(counted[first:end].sum() / counted.sum())
    return {name: tensor[first:end] for name, tensor in batch.items()}, share


def dealt(items: Sequence[T]) -> list[tuple[int, T, bool]]:
    """
    The items that are this rank's turn: the number of each, itself, and whether it counts.

    All ranks get equally many, because all of them run the model equally often; the last
    one may come twice, and counts once.

    >>> dealt(["a", "b"])
    [(0, 'a', True), (1, 'b', True)]
    """
    ranks, last = count(), len(items) - 1
    places = range(number(), -(-len(items) // ranks) * ranks, ranks)
    return [(min(i, last), items[min(i, last)], i <= last) for i in places]


class GradientSums:
    """
    Sums the gradients of parameters over ranks, in buckets, while backward goes on.

    :param parameters: in the order of the forward pass, the same on all ranks
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._buckets: list[_Bucket] = []
        self._is_last = False
        self._next = 0
        if count() == 1:
            return
        size = BYTES_OF_A_BUCKET
        for parameter in reversed(list(parameters)):
            # Of one dtype, and near to each other in backward.
            last = self._buckets[-1] if self._buckets else None
            if (
                last is None
                or last.bytes >= size
                or last.dtype is not parameter.dtype
                or last.device != parameter.device
            ):
                last = _Bucket(parameter.dtype, parameter.device)
                self._buckets.append(last)
            last.add(parameter, self._arrived)

    def last_backward(self) -> None:
        """Say that the backward pass to come is the last one before ``finish``."""
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)
        self._is_last, self._next = True, 0

    def finish(self) -> None:
        """Leave the sums where the gradients were."""
        for bucket in self._buckets[self._next :]:
            bucket.begin()
        for bucket in self._buckets:
            bucket.end()
        self._is_last, self._next = False, 0

    def _arrived(self, bucket: "_Bucket") -> None:
        """Begin with the buckets that are whole, in their order, as all ranks do."""
        if not self._is_last or _is_capturing(bucket.device):
            return
        bucket.missing -= 1
        while self._next < len(self._buckets) and not self._buckets[self._next].missing:
            self._buckets[self._next].begin()
            self._next += 1


class _Bucket:
    """Gradients that are summed in one call."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.parameters: list[Tensor] = []
        self.bytes = self.missing = 0
        self._flat: Tensor | None = None
        self._work: Any = None

    def add(self, parameter: Tensor, arrived: Callable[["_Bucket"], None]) -> None:
        self.parameters.append(parameter)
        self.bytes += parameter.nbytes
        parameter.register_post_accumulate_grad_hook(lambda _: arrived(self))

    def begin(self) -> None:
        parts = [
            torch.zeros_like(x) if x.grad is None else x.grad for x in self.parameters
        ]
        self._flat = torch.cat([part.flatten() for part in parts])
        self._work = distributed.all_reduce(self._flat, async_op=True)

    def end(self) -> None:
        self._work.wait()
        assert self._flat is not None
        parts = self._flat.split([x.numel() for x in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            if parameter.grad is None:
                parameter.grad = part.view_as(parameter).clone()
            else:
                parameter.grad.copy_(part.view_as(parameter))
        self._flat = self._work = None


def _is_up() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


_groups: dict[object, Any] = {}


def _words() -> Any:
    """A process group on CPUs, over which objects go; ranks may wait long in it."""
    whole = distributed.group.WORLD
    if whole not in _groups:
        _groups.clear()
        _groups[whole] = distributed.new_group(backend="gloo", timeout=PATIENCE)
    return _groups[whole]


def _on_cpu(leaf: Any) -> Any:
    return leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf


class _FromGpu:
    """A tensor that was on a GPU."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _packed(value: object) -> object:
    def pack(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_cuda:
            return _FromGpu(leaf.detach().cpu())
        return _on_cpu(leaf)

    return tree_map(pack, value)


def _unpacked(value: object) -> object:
    def unpack(leaf: Any) -> Any:
        return leaf.tensor.cuda() if isinstance(leaf, _FromGpu) else leaf

    return tree_map(unpack, value)


def leave() -> None:
    """End the process group, where one was begun; nothing is waited for."""
    if _is_up():
        with suppress(Exception):
            distributed.destroy_process_group()
    _groups.clear()
