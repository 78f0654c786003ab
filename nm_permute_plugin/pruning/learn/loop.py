# SPDX-License-Identifier: Apache-2.0
"""
The training loop: weights are frozen, and what a learner holds is learned.

A step is one forward and one backward pass under the learner's masks, with elementwise
work for every linear. The teacher runs the dense model when a batch is new, and keeps
what enters its output layer: a step costs about a plain training step in the first
epoch, two thirds of it later (``benchmarks/step.py``).

A new learner is a class with the methods of ``Learner``, a name in
``settings.LearnStage`` and a line in ``LEARNERS``. Its masks are tensors, or objects like
``multipliers.MultipliedMask`` (the protocol ``running.masked.LearnedMask``).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from statistics import fmean
from typing import Any, Protocol, runtime_checkable

import torch
from loguru import logger
from torch import Tensor

from nm_permute_plugin.pruning.learn.best import Best, begin_of
from nm_permute_plugin.pruning.learn.multipliers import ScoreMultipliers
from nm_permute_plugin.pruning.learn.published import SoftPlaces, StraightThrough
from nm_permute_plugin.pruning.learn.sharded import ShardedMultipliers
from nm_permute_plugin.pruning.learn.swaps import ChannelSwaps
from nm_permute_plugin.pruning.problem import Problem, Solution
from nm_permute_plugin.pruning.resuming import Progress
from nm_permute_plugin.pruning.running.backward import Backward
from nm_permute_plugin.pruning.running.forecast import Forecast
from nm_permute_plugin.pruning.running.masked import Mask, frozen
from nm_permute_plugin.pruning.search import History
from nm_permute_plugin.pruning.settings import LearnStage, Settings


@runtime_checkable
class Learner(Protocol):
    """
    A learner holds what is trained, and turns it into masks.

    On a GPU a step may be replayed as a CUDA graph, so with ``use_graph`` the tensors
    behind the masks stay where they are in memory, ``masks`` does the same operations
    at every step, and gradients are zeroed in place.
    """

    @property
    def use_graph(self) -> bool:
        """Whether a step may be replayed."""
        ...

    @property
    def rate(self) -> float:
        """How far the next step goes, for the record: a learning rate, a share of swaps."""
        ...

    def prepare(self, step: int) -> None:
        """Get ready for the masks of a step, counted from 1; runs outside of a graph."""
        ...

    def masks(self) -> Mapping[str, Mask]:
        """The masks of all linears, whose parameters get gradients in backward."""
        ...

    @property
    def parameters(self) -> Sequence[Tensor]:
        """What gets gradients, in the order of the forward pass."""
        ...

    def update(self) -> None:
        """Follow the gradients of a backward pass, and zero them."""
        ...

    def solution(self) -> Solution:
        """What has been learned, as it stands, with hard permutations."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that changes from step to step: tensors and numbers, in dicts and lists."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of a learner that began with the same start."""
        ...


LEARNERS: dict[LearnStage, Callable[..., Learner]] = {
    "multipliers": ScoreMultipliers,
    "swaps": ChannelSwaps,
    "soft": SoftPlaces,
    "straight_through": StraightThrough,
}
"""
The learner of every stage, called with a problem, a start, its settings and its steps.
"""


def learn(
    problem: Problem,
    start: Solution,
    settings: Settings,
    callback: Callable[[int, Learner], object] = lambda step, learner: None,
) -> tuple[Solution, History]:
    """
    Learn what the settings' stages say, one after the other, end to end.

    The start is validated first, so what comes back is never worse than the start on the
    validation data. The same seed gives the same solution.

    :param callback: is shown the learner before every validation, and leaves it as it is
    :raises ValueError: if a loss is not finite, or there is nothing to train on
    """
    data = problem.data
    if not data.train or not data.validation:
        raise ValueError(
            "learning needs data to train on and data for validation, got "
            f"{len(data.train)} and {len(data.validation)} batches; give the run more "
            "calibration samples"
        )
    best = Best(problem.complete(start), problem.validate, callback)
    shards = settings.memory.shard
    progress = Progress("the learning", problem.known, keeps=not shards)
    batches = islice(data.batches(settings.seed), progress.done, None)
    done = 0
    forecast = Forecast.of_training(settings, progress.done, best.seconds)
    with frozen(problem.model), torch.enable_grad(), progress:
        for stage, steps in settings.learn.schedule():
            numbers = range(done + 1, done + steps + 1)
            done += steps
            begin = begin_of(numbers, best, progress)
            if begin is None:
                continue
            make = ShardedMultipliers.of if shards else LEARNERS[stage]
            learner = make(problem, begin, settings.learn, steps)
            backward = Backward(
                problem.teacher,
                learner.masks,
                learner.parameters,
                data.train,
                settings.memory,
                learner.use_graph,
            )

            def step(
                prepare: Callable[[], None], backward: Backward = backward
            ) -> float:
                return backward(next(batches), prepare)

            every = settings.validation.interval(steps)
            after = forecast.step
            train(learner, begin, numbers, step, best, every, stage, progress, after)
    solution = problem.agreed(best.solution)
    logger.info(
        f"Learned {', '.join(settings.learn.stages)} in {done} steps: validation loss "
        f"{best.history[0]['validation']:.4f} -> {best.loss:.4f}"
    )
    return solution, best.history


def train(
    learner: Learner,
    begin: Solution,
    numbers: range,
    step: Callable[[Callable[[], None]], float],
    best: Best,
    validate_every: int,
    what: str,
    progress: Progress,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """
    Train a learner for some steps, and let the best of its solutions be kept.

    :param begin: the solution that the learner began with
    :param numbers: of the steps
    :param step: ``step(prepare)`` runs a batch forward and backward and returns its loss;
        it calls ``prepare`` before the masks are made
    :param what: is learned, for the progress bar
    :param progress: steps that are behind it are not taken again
    :param after_step: is called after every step
    """
    kept = progress.value
    if kept is not None and kept["first"] == numbers[0]:
        learner.load_state_dict(kept["learner"])
    progress.follow(
        lambda: {
            "first": numbers[0],
            "begin": begin.state_dict(),
            "best": best.state_dict(),
            "learner": learner.state_dict(),
        }
    )
    bar = progress.bar(numbers, f"Learning {what}")
    for number in numbers:
        if number > progress.done:
            training, rate = step(partial(learner.prepare, number)), learner.rate
            with progress.update(number, training, rate):
                learner.update()
            after_step()
            bar.update()
            bar.set_postfix(loss=f"{training:.4f}", best=f"{best.loss:.4f}")
        ends = number % validate_every == 0 or number == numbers[-1]
        if ends and number > best.history[-1]["step"]:
            best.consider(number, fmean(progress.losses), progress.rate, learner)
            progress.losses.clear()
        progress.keep()
    bar.close()
