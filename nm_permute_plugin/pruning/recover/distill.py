# SPDX-License-Identifier: Apache-2.0
"""The kept weights of the whole model, trained to predict what the dense model predicts."""

import time
from functools import partial
from itertools import islice
from statistics import fmean

import torch

from nm_permute_plugin.pruning.data import Data
from nm_permute_plugin.pruning.recover.optimizer import RelativeAdamW
from nm_permute_plugin.pruning.recover.student import Student, Values
from nm_permute_plugin.pruning.resuming import Progress
from nm_permute_plugin.pruning.running.backward import Backward
from nm_permute_plugin.pruning.running.forecast import Forecast
from nm_permute_plugin.pruning.running.masked import frozen
from nm_permute_plugin.pruning.running.teacher import Teacher
from nm_permute_plugin.pruning.search import History
from nm_permute_plugin.pruning.settings import Settings


def distill(
    student: Student,
    teacher: Teacher,
    data: Data,
    settings: Settings,
    known: str = "",
) -> tuple[Values, History]:
    """
    Train all kept weights against the dense model's predictions; the masks stay.

    :param known: by which a run that goes on knows what it begins with
    :return: the best values by the validation loss, none if none are better, and one
        entry a validation: its step, the validation loss and, from the first step on,
        the mean training loss since the validation before, and the relative learning rate
    :raises ValueError: if a loss is not finite
    """
    steps = settings.recover.end_to_end.steps
    every = settings.validation.interval(steps)
    masters = student.masters(student.linears)
    optimizer = RelativeAdamW(masters, settings.recover.end_to_end.rate, steps)
    before = time.perf_counter()
    best = teacher.validate(student.masks(), data.validation)
    took = time.perf_counter() - before
    better: Values = {}
    history: History = [{"step": 0, "validation": best}]
    progress = Progress("the distilling", known)
    left = steps - progress.done
    forecast = Forecast("the recovery end_to_end", left, -(-left // every), took)
    if progress.value is not None:
        with torch.no_grad():
            for name, master in masters.items():
                master.copy_(progress.value["masters"][name])
        optimizer.load_state_dict(progress.value["optimizer"])
        best, better, history = progress.value["best"]
    progress.follow(
        lambda: {
            "masters": masters,
            "optimizer": optimizer.state_dict(),
            "best": (best, better, history),
        }
    )
    served = student.served(masters)
    with frozen(student.model), torch.enable_grad(), progress:
        backward = Backward(
            teacher,
            partial(student.masks, masters, served),
            masters.values(),
            data.train,
            settings.memory,
            use_graph=True,
        )
        batches = islice(data.batches(settings.seed), progress.done, None)
        bar = progress.bar(range(1, steps + 1), "Distilling the kept weights")
        for step in range(1, steps + 1):
            if step > progress.done:
                training, rate = backward(next(batches)), optimizer.rate
                with progress.update(step, training, rate):
                    optimizer.step()
                    student.served(masters, into=served)
                forecast.step()
                bar.update()
                bar.set_postfix(loss=f"{training:.4f}", best=f"{best:.4f}")
            ends = step % every == 0 or step == steps
            if ends and step > history[-1]["step"]:
                now = student.rounded(masters)
                loss = teacher.validate(student.masks(now), data.validation)
                if loss < best:
                    best, better = loss, now
                history.append(
                    {
                        "step": step,
                        "validation": loss,
                        "loss": fmean(progress.losses),
                        "rate": progress.rate,
                    }
                )
                progress.losses.clear()
            progress.keep()
        bar.close()
    return better, history
