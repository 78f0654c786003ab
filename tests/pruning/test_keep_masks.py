# SPDX-License-Identifier: Apache-2.0
"""A pruned model that trains keeps its zeros, and trains as a masked model would."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from loguru import logger
from torch import Tensor, distributed, nn
from torch.nn.utils import prune as masked
from torch.optim.optimizer import _global_optimizer_post_hooks
from transformers.pytorch_utils import Conv1D

from nm_permute_plugin.maths.masks import nm_mask
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.pruning.keep_masks import keep_masks

TWO_FOUR = NMPattern(2, 4)
OPTIMIZERS: dict[str, Callable[[Iterator[Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.1),
    "muon": lambda p: torch.optim.Muon(p, 0.1),
}


def pruned_(weight: Tensor, pattern: NMPattern = TWO_FOUR) -> Tensor:
    """The mask of a weight [..., in], which is pruned in place."""
    flat = weight.data.flatten(0, -2)
    mask = nm_mask(flat.abs(), pattern).view(weight.shape)
    weight.data.masked_fill_(~mask, 0)
    return mask


def stack() -> nn.Sequential:
    """Two linears, the first of them pruned."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(16, 12, False), nn.ReLU(), nn.Linear(12, 4, False)
        )
    pruned_(model[0].weight)
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(seed))
    model(x).square().sum().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What is logged while a test runs."""
    lines: list[str] = []
    number = logger.add(lambda message: lines.append(str(message)), format="{message}")
    yield lines
    logger.remove(number)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_zeros_stay_and_the_other_weights_move(kind: str) -> None:
    model = stack()
    before = model[0].weight.detach().clone()
    dense = model[2].weight.detach().clone()
    keep_masks(model)
    optimizer = OPTIMIZERS[kind](model.parameters())
    for seed in range(3):
        step(model, optimizer, seed)
    after = model[0].weight
    assert torch.equal(after == 0, before == 0)
    assert bool((after != before)[before != 0].all())
    assert bool((model[2].weight != dense).all())


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_it_trains_as_a_masked_parametrization_does(kind: str) -> None:
    """Gradients are clipped and decayed as if the pruned weights were not there."""
    model, other = stack(), stack()
    masked.custom_from_mask(other[0], "weight", (other[0].weight != 0).float())
    keep_masks(model)
    for one in (model, other):
        optimizer = OPTIMIZERS[kind](one.parameters())
        for seed in range(4):
            step(one, optimizer, seed)
    masked.remove(other[0], "weight")
    torch.testing.assert_close(model[0].weight, other[0].weight)
    torch.testing.assert_close(model[2].weight, other[2].weight)


def test_momentum_from_before_the_pruning_does_not_bring_weights_back() -> None:
    model = stack()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    step(model, optimizer)
    mask = pruned_(model[0].weight)
    keep_masks(model)
    step(model, optimizer)
    assert bool((model[0].weight[~mask] == 0).all())


def test_mixed_precision_with_a_scaler_and_accumulated_gradients() -> None:
    model = stack()
    zeros = model[0].weight == 0
    keep_masks(model)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    scaler = torch.amp.GradScaler("cpu")
    for number in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(torch.full((2, 16), number + 1.0)).square().sum()
        scaler.scale(loss).backward()
        assert bool((model[0].weight.grad[zeros] == 0).all())
        if number % 2:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert torch.equal(model[0].weight == 0, zeros)


@pytest.mark.parametrize("case", ["conv1d", "experts", "4:8"])
def test_every_way_to_store_a_pruned_weight_is_found(case: str) -> None:
    model = nn.Sequential(nn.Linear(16, 16, False))
    weight = model[0].weight
    if case == "conv1d":
        model = nn.Sequential(Conv1D(12, 16))
        weight = model[0].weight
        mask = nm_mask(weight.data.t().abs(), TWO_FOUR).t()
        weight.data.masked_fill_(~mask, 0)
    elif case == "experts":
        weight = nn.Parameter(torch.randn(3, 6, 8))
        model = nn.Module()
        model.register_parameter("gate_up_proj", weight)
        mask = pruned_(weight)
    else:
        mask = pruned_(weight, NMPattern(4, 8))
    keep_masks(model, case if ":" in case else "2:4")
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    weight.square().sum().backward()
    weight.data.add_(1)
    optimizer.step()
    assert torch.equal(weight != 0, mask)


def test_adapters_that_begin_as_zeros_train() -> None:
    model = stack()
    model.append(nn.Linear(4, 4, False))
    model[3].weight.data.zero_()
    keep_masks(model)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    (model(torch.ones(2, 16)) - 1).square().sum().backward()
    optimizer.step()
    assert bool((model[3].weight != 0).any())


def test_a_block_ends_with_the_masks_applied_and_says_what_was_lost(said) -> None:
    model = stack()
    mask = model[0].weight != 0
    with keep_masks(model):
        model[0].weight.data.add_(1)  # as an adapter is merged
    assert torch.equal(model[0].weight != 0, mask)
    (line,) = [line for line in said if "not zero any more" in line]
    assert line.startswith(f"{int((~mask).sum())} pruned weights")
    step(model, OPTIMIZERS["adamw"](model.parameters()))
    assert bool((model[0].weight != 0).all()), "the masks outlived their block"


def test_masks_that_nothing_touched_say_nothing(said) -> None:
    model = stack()
    kept = keep_masks(model)
    step(model, OPTIMIZERS["adamw"](model.parameters()))
    assert kept.apply() == 0
    assert [line for line in said if "lost" in line] == []


def test_an_error_in_the_block_removes_the_masks_and_is_raised() -> None:
    model = stack()
    with pytest.raises(ZeroDivisionError), keep_masks(model):
        raise ZeroDivisionError
    step(model, OPTIMIZERS["adamw"](model.parameters()))
    assert bool((model[0].weight != 0).all())


def test_masks_go_with_their_model() -> None:
    before = len(_global_optimizer_post_hooks)
    model = stack()
    keep_masks(model)
    kept = keep_masks(model)
    assert len(_global_optimizer_post_hooks) == before + 1
    other = stack()
    optimizer = OPTIMIZERS["adamw"](other.parameters())
    del model
    gc.collect()
    step(other, optimizer)
    del kept
    gc.collect()
    assert len(_global_optimizer_post_hooks) == before


def test_a_model_of_several_processes_keeps_them(tmp_path: Path) -> None:
    """One process here: it takes the way of DistributedDataParallel all the same."""
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = stack()
        zeros = model[0].weight == 0
        keep_masks(model)
        parallel = nn.parallel.DistributedDataParallel(model)
        optimizer = OPTIMIZERS["adamw"](parallel.parameters())
        step(parallel, optimizer)
        assert torch.equal(model[0].weight == 0, zeros)
    finally:
        distributed.destroy_process_group()


def test_a_dense_model_has_nothing_to_keep() -> None:
    with pytest.raises(ValueError, match="no weight of this Linear follows 2:4"):
        keep_masks(nn.Linear(8, 8))


def test_weights_that_were_cut_since_are_refused() -> None:
    model = stack()
    keep_masks(model)
    model[0].weight = nn.Parameter(model[0].weight.data[:6].clone())
    model[2] = nn.Linear(6, 4, False)
    with pytest.raises(RuntimeError, match=r"was \[12, 16\].* of \[6, 16\] now.*FSDP"):
        step(model, OPTIMIZERS["adamw"](model.parameters()))
