# SPDX-License-Identifier: Apache-2.0
"""What learning takes: a few steps of every stage of it."""

from collections.abc import Callable
from functools import partial
from itertools import count

import torch

from nm_permute_plugin.pruning.budget.choice import turns
from nm_permute_plugin.pruning.data import micro_batches
from nm_permute_plugin.pruning.estimate.amounts import Amounts
from nm_permute_plugin.pruning.estimate.meter import Meter, Took
from nm_permute_plugin.pruning.estimate.validation import Validation
from nm_permute_plugin.pruning.learn.loop import LEARNERS, Learner
from nm_permute_plugin.pruning.problem import Problem, Solution
from nm_permute_plugin.pruning.running.backward import Backward
from nm_permute_plugin.pruning.running.forecast import TIMED, WARM_UPS
from nm_permute_plugin.pruning.running.masked import frozen
from nm_permute_plugin.pruning.running.teacher import Teacher


def timed(step: Callable[[], object], meter: Meter) -> tuple[Took, Took]:
    """
    Time a few steps, after those that warm up: a GPU replays them from then on.

    :return: what one step takes, and what the first ones took beyond that
    """
    warm_ups = WARM_UPS if meter.device.type == "cuda" else 1
    _, first = meter.took(step, warm_ups)
    _, one = meter.took(step, TIMED)
    return one, first.less(one) * warm_ups


def learning(
    problem: Problem,
    start: Solution,
    whole_model: Validation,
    amounts: Amounts,
    meter: Meter,
) -> tuple[None, Took, int]:
    """Measure a few steps of every stage as ``learn`` takes them."""
    settings, data, batch = amounts.settings, amounts.data, amounts.batch
    took = whole_model.of(1)  # of the start
    with frozen(problem.model), torch.enable_grad():
        took += dense_passes(problem.teacher, amounts, amounts.steps, meter)
        for stage, steps in settings.learn.schedule():
            make = partial(LEARNERS[stage], problem, start, settings.learn, steps)
            learner, made = meter.took(make)
            backward, begun = meter.took(
                partial(
                    Backward,
                    problem.teacher,
                    learner.masks,
                    learner.parameters,
                    data.train,
                    settings.memory,
                    learner.use_graph,
                )
            )
            numbers = count(1)

            def step(
                backward: Backward = backward,
                learner: Learner = learner,
                numbers: "count[int]" = numbers,
            ) -> None:
                backward(batch, partial(learner.prepare, next(numbers)))
                learner.update()

            one, once = timed(step, meter)
            solution = learner.solution()
            problem.masks(solution)
            _, masks = meter.took(partial(problem.masks, solution))
            validation = masks + whole_model.passing
            stage_took = made + begun + once + one * (steps * amounts.per_step)
            stage_took += validation * amounts.validations(steps)
            took += stage_took * turns(settings)
            del learner, backward, step, make
    return None, took, problem.teacher.bytes_to_come([*data.train, *data.validation])


def dense_passes(
    teacher: Teacher, amounts: Amounts, steps: int, meter: Meter, before: int = 0
) -> Took:
    """
    The time of the dense model in all steps, beside what a step with a known batch takes.

    :param before: steps that were taken with the same batches, in the same order
    """
    if not teacher.keep_training:
        return Took()  # it is a part of every step
    batch = {name: tensor.clone() for name, tensor in amounts.batch.items()}
    size = amounts.settings.memory.micro_batch_size
    parts = [part for part, _ in micro_batches(batch, size)]

    def run() -> None:
        for part in parts:
            teacher(part)

    _, first = meter.took(run)
    _, again = meter.took(run)
    data = amounts.data
    kept = teacher.share_kept([*data.train, *data.validation])
    there = len(data.train)
    new = min(before + steps, there) - min(before, there)
    runs = new + (steps - new) * (1 - kept)
    return first.less(again) * (runs * amounts.per_step)
