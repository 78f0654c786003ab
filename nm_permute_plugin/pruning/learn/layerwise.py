# SPDX-License-Identifier: Apache-2.0
"""Learn one decoder layer after the other, for models that do not fit on their device."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import islice

import torch
from loguru import logger
from torch import Tensor

from nm_permute_plugin.pruning import ranks
from nm_permute_plugin.pruning.data import endless
from nm_permute_plugin.pruning.learn.best import Best, begin_of
from nm_permute_plugin.pruning.learn.loop import LEARNERS, Learner, train
from nm_permute_plugin.pruning.problem import Problem, Solution
from nm_permute_plugin.pruning.resuming import Progress, kept
from nm_permute_plugin.pruning.running.decoder_layers import LayerStream
from nm_permute_plugin.pruning.running.loss import check_finite
from nm_permute_plugin.pruning.running.masked import frozen, masked
from nm_permute_plugin.pruning.search import History
from nm_permute_plugin.pruning.settings import Settings

Hold = Callable[[], AbstractContextManager[None]]
"""A context in which offloaded weights stay where they were fetched to."""


def learn_layerwise(
    problem: Problem, start: Solution, settings: Settings, hold: Hold = nullcontext
) -> tuple[Solution, History]:
    """
    Learn the stages of the settings inside each decoder layer, layer by layer.

    What enters a layer comes from the pruned layers before it, the target from the
    dense layers on their own inputs. A layer is learned on the relative error of its
    output, and the validation data chooses its best solution, the start among them. A
    permutation that several layers share, as the residual stream's, stays as it is; the
    multipliers of its consumers are learned. Gradients, activations and scores of one
    layer at a time are where the model runs, the inputs of the next on the CPU.

    The loss of the whole model validates the end: if it is no better than the start,
    the start comes back.

    :param hold: entered for each layer
    :raises ValueError: if there are no decoder layers, if they do not run on their own,
        or if an error is not finite
    """
    stream = LayerStream(problem.model, problem.linears, problem.data)
    found = start = problem.complete(start)
    before = problem.validate(start)
    for index, layer in enumerate(stream.layers.modules):
        # Weights that are fetched for every use would be frozen, and forgotten.
        with hold(), frozen(layer), torch.enable_grad():
            found = _learn_layer(problem, stream, index, found, settings)
    after = problem.validate(found)
    logger.info(
        f"Learned {len(stream.layers)} layers, {', '.join(settings.learn.stages)}: "
        f"validation loss {before:.4f} -> {after:.4f}"
    )
    last = sum(steps for _, steps in settings.learn.schedule())
    history: History = [
        {"step": 0, "validation": before},
        {"step": last, "validation": after},
    ]
    return (found if after < before else start), history


def _learn_layer(
    problem: Problem,
    stream: LayerStream,
    index: int,
    solution: Solution,
    settings: Settings,
) -> Solution:
    """Learn one layer, and let both streams pass it; the solution with the layer's part."""
    name, window = stream.layers.names[index], range(index, index + 1)
    inside = inside_layer(problem, f"{name}.")
    shared = {
        space
        for space, of in inside.spaces.items()
        if len(of.rows) < len(problem.spaces[space].rows)
    }
    stream.advance(stream.dense, window)

    def validate(now: Solution) -> float:
        return stream.validate(window, inside.masks(now))

    def learned() -> dict[str, dict[str, Tensor]]:
        perms = {space: solution.perms[space] for space in inside.spaces}
        best = Best(Solution(perms), validate)
        progress = Progress(f"the learning of {name}", problem.known)
        numbers = endless(len(stream.train), settings.seed)
        numbers = islice(numbers, progress.done, None)
        done = 0
        for stage, steps in settings.learn.schedule():
            moves = stage != "multipliers"
            if moves and shared == inside.spaces.keys():
                continue  # every permutation of this layer is another layer's too
            span = range(done + 1, done + steps + 1)
            done += steps
            begin = begin_of(span, best, progress)
            if begin is None:
                continue
            options = {"fixed": shared} if moves else {}
            learner = LEARNERS[stage](inside, begin, settings.learn, steps, **options)

            sums = ranks.GradientSums(learner.parameters)

            def step(
                prepare: Callable[[], None],
                learner: Learner = learner,
                sums: ranks.GradientSums = sums,
            ) -> float:
                prepare()
                error = stream.error(next(numbers), window, learner.masks())
                error.backward()
                sums.finish()
                return check_finite(ranks.total(float(error.detach())), "training loss")

            every = settings.validation.interval(len(span))
            with progress:
                of = f"{stage} of {name}"
                train(learner, begin, span, step, best, every, of, progress)
        return best.solution.state_dict()

    if inside.spaces:
        better = kept(learned, f"learning of {name}", problem.known)
        solution = Solution(
            solution.perms | better["perms"],
            solution.multipliers | better["multipliers"],
        )
    with masked(problem.model, inside.masks(solution)):
        stream.advance(stream.pruned, window)
    return solution


def inside_layer(problem: Problem, prefix: str) -> Problem:
    """The part of a problem that lies in one layer, its scores where the model runs."""
    spaces = {}
    for name, space in problem.spaces.items():
        names = [c.name for c in space.space.consumers if c.name.startswith(prefix)]
        part = space.only(names)
        if part is not None:
            spaces[name] = replace(part, score=part.score.to(problem.device))
    fixed = {n: score for n, score in problem.fixed.items() if n.startswith(prefix)}
    return replace(problem, spaces=spaces, fixed=fixed)
