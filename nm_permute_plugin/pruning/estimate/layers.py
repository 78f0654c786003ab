# SPDX-License-Identifier: Apache-2.0
"""What work on one decoder layer after the other takes: the first layers stand for all."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nm_permute_plugin.pruning.data import Data
from nm_permute_plugin.pruning.estimate.amounts import Amounts
from nm_permute_plugin.pruning.estimate.learning import timed
from nm_permute_plugin.pruning.estimate.meter import Meter, Took
from nm_permute_plugin.pruning.estimate.validation import Validation
from nm_permute_plugin.pruning.learn.layerwise import inside_layer
from nm_permute_plugin.pruning.learn.loop import LEARNERS, Learner
from nm_permute_plugin.pruning.problem import Problem, Solution
from nm_permute_plugin.pruning.recover.optimizer import RelativeAdamW
from nm_permute_plugin.pruning.recover.student import Student
from nm_permute_plugin.pruning.running.decoder_layers import LayerStream
from nm_permute_plugin.pruning.running.masked import frozen


@dataclass(frozen=True)
class _Windows:
    """
    A stream of two batches, one of them for validation, at its first window.

    :param begun: what the embedding of all batches takes
    :param advancing: what both streams of all batches take to pass the window
    :param bytes_to_come: hidden states of all other batches, on the CPU
    """

    stream: LayerStream
    window: range
    begun: Took
    advancing: Took
    bytes_to_come: int

    @classmethod
    def measure(
        cls,
        make: Callable[[Data], LayerStream],
        size: int,
        amounts: Amounts,
        meter: Meter,
    ) -> "_Windows":
        """
        Let the streams come to the first window.

        :param size: layers of a window
        """
        few = Data([amounts.batch], [amounts.validation])
        stream, made = meter.took(lambda: make(few))
        window = range(min(size, len(stream.layers)))
        stream.advance(stream.dense, window)
        _, advance = meter.took(lambda: stream.advance(list(stream.pruned), window))
        batches = (amounts.train_batches + amounts.validation_batches) / 2
        held = sum(hidden.nbytes for hidden in stream.dense) * 2
        to_come = int(held * (batches - 1)) if meter.device.type == "cpu" else 0
        return cls(stream, window, made * batches, advance * (2 * batches), to_come)

    @property
    def count(self) -> int:
        """How many windows there are."""
        return -(-len(self.stream.layers) // len(self.window))


def rebuilding(student: Student, amounts: Amounts, meter: Meter) -> tuple[Took, int]:
    """
    Measure a few steps in the first window as ``rebuild_blocks`` takes them.

    :return: the time of all windows, and bytes that are held beside those held here
    """
    settings = amounts.settings.recover.blocks
    make = partial(LayerStream, student.model, student.linears)
    with frozen(student.model):
        at = _Windows.measure(make, settings.window, amounts, meter)
        stream, window = at.stream, at.window
        names = tuple(f"{stream.layers.names[index]}." for index in window)
        masters = student.masters(x for x in student.linears if x.startswith(names))
        optimizer = RelativeAdamW(masters, settings.rate, 1000)

        def step() -> None:
            with torch.enable_grad():
                stream.error(0, window, student.masks(masters)).backward()
            optimizer.step()

        one, _ = timed(step, meter)
        _, validation = meter.took(lambda: stream.validate(window, student.masks()))
    epochs = settings.epochs
    of_window = one * (epochs * amounts.train_batches) + at.advancing
    of_window += validation * ((epochs + 1) * amounts.validation_batches)
    return at.begun + of_window * at.count, at.bytes_to_come


def learning_by_layers(
    problem: Problem,
    start: Solution,
    whole_model: Validation,
    amounts: Amounts,
    meter: Meter,
) -> tuple[None, Took, int]:
    """Measure a few steps in the first layer as ``learn_layerwise`` takes them."""
    settings = amounts.settings
    make = partial(LayerStream, problem.model, problem.linears)
    at = _Windows.measure(make, 1, amounts, meter)
    stream, window = at.stream, at.window
    inside = inside_layer(problem, f"{stream.layers.names[0]}.")
    shared = {
        space
        for space, of in inside.spaces.items()
        if len(of.rows) < len(problem.spaces[space].rows)
    }
    of_layer = at.advancing
    perms = {space: start.perms[space] for space in inside.spaces}
    with frozen(stream.layers.modules[0]), torch.enable_grad():
        for stage, steps in settings.learn.schedule() if inside.spaces else ():
            moves = stage != "multipliers"
            if moves and shared == inside.spaces.keys():
                continue
            options = {"fixed": shared} if moves else {}
            learner = LEARNERS[stage](
                inside, Solution(perms), settings.learn, steps, **options
            )

            def step(learner: Learner = learner) -> None:
                learner.prepare(1)
                stream.error(0, window, learner.masks()).backward()
                learner.update()

            def validate(learner: Learner = learner) -> float:
                masks: dict[str, Tensor] = inside.masks(learner.solution())
                return stream.validate(window, masks)

            one, _ = timed(step, meter)
            validate()
            _, validation = meter.took(validate)
            of_layer += one * (steps * amounts.per_step)
            validations = amounts.validations(steps) * amounts.validation_batches
            of_layer += validation * validations
    took = whole_model.of(2) + at.begun + of_layer * at.count
    return None, took, at.bytes_to_come
