# SPDX-License-Identifier: Apache-2.0
"""Which groups of linears stay dense under a budget, and what each choice is worth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Bool
from loguru import logger
from torch import Tensor, nn

from nm_permute_plugin.pruning.budget.fused import FusedLinears, fused_linears
from nm_permute_plugin.pruning.budget.record import BudgetRecord, GroupFigures, Point
from nm_permute_plugin.pruning.budget.shares import shares_of_loss
from nm_permute_plugin.pruning.budget.times import measured_times
from nm_permute_plugin.pruning.data import Data
from nm_permute_plugin.pruning.running.teacher import Teacher
from nm_permute_plugin.pruning.settings import BudgetSettings, Settings
from nm_permute_plugin.specs.conv1d import weight_of
from nm_permute_plugin.specs.spec import ResolvedSpec

CURVE = (0.05, 0.1, 0.2, 0.35, 0.5)
"""The shares of weights that stay dense at which the loss is measured for the report."""


Times = Sequence[tuple[float, float]]
"""Of each group the microseconds of a product, dense and by the fastest kernel."""


def times_of(
    model: nn.Module, groups: Sequence[FusedLinears], budget: BudgetSettings
) -> Times:
    """
    The times that a budget is about; none where it is not about times.

    :raises OSError: as ``measured_times``
    :raises ValueError: as ``measured_times``, and where even the fastest kernels together
        are not as fast as asked for
    """
    if budget.min_speedup is None or budget.kernels is None:
        return ()
    first = model.get_submodule(groups[0].linears[0])
    dtype = str(weight_of(first).dtype).removeprefix("torch.")
    folder = Path(budget.kernels).expanduser()
    times = measured_times(folder, groups, dtype, budget.tokens)
    most = sum(dense for dense, _ in times) / sum(fastest for _, fastest in times)
    if most < budget.min_speedup:
        raise ValueError(
            f"budget.min_speedup: {budget.min_speedup:g} cannot be reached: with all "
            f"linears sparse, products of {budget.tokens} tokens are {most:.2f} times as "
            f"fast as dense ones by the tables in {folder}. Ask for less"
        )
    return times


@dataclass(frozen=True)
class Order:
    """Groups in the order in which they would stay dense, the most worth it first."""

    groups: Sequence[FusedLinears]
    times: Times
    order: Sequence[int]

    def share(self, dense: set[int]) -> float:
        """The share of the weights that stay dense."""
        whole = sum(group.weights for group in self.groups)
        return sum(self.groups[i].weights for i in dense) / whole

    def speedup(self, dense: set[int]) -> float | None:
        """How many times as fast as dense all products are together."""
        if not self.times:
            return None
        taken = [of[0] if i in dense else of[1] for i, of in enumerate(self.times)]
        return sum(of[0] for of in self.times) / sum(taken)

    def up_to_share(self, share: float) -> set[int]:
        """As many groups as fit into a share of the weights."""
        dense: set[int] = set()
        for index in self.order:
            if self.share(dense | {index}) <= share:
                dense.add(index)
        return dense

    def down_to_speedup(self, least: float) -> set[int]:
        """As many groups as leave the rest fast enough."""
        dense: set[int] = set()
        for index in self.order:
            if (self.speedup(dense | {index}) or 0) >= least:
                dense.add(index)
        return dense


def choose_dense(
    teacher: Teacher,
    masks: Mapping[str, Bool[Tensor, "_out _in"]],
    groups: Sequence[FusedLinears],
    times: Times,
    data: Data,
    settings: Settings,
    before: BudgetRecord | None = None,
) -> BudgetRecord:
    """
    Choose what stays dense, by what each group's masks cost on the validation data.

    Groups stay dense in the order of their share of the loss for each weight, or for each
    microsecond that sparse kernels save where ``min_speedup`` is asked for.

    Masks that will be learned lose far less afterwards. So for ``max_loss_increase`` none
    stays dense at first, and once that was learned and lost too much, as many more do as
    are expected to bring the loss after learning below the limit, by ``before.expected``.

    :param masks: of all linears that may be pruned, channels in their old places
    :param times: of ``times_of``
    :param before: the last choice, after whose learning too much was lost
    """
    batches, budget = data.validation, settings.budget
    shares = shares_of_loss(teacher, masks, groups, batches, settings.memory).tolist()
    saved = [dense - fastest for dense, fastest in times]
    costs = saved if budget.min_speedup else [group.weights for group in groups]
    worth = [
        share / cost if cost > 0 else float("inf")
        for share, cost in zip(shares, costs, strict=True)
    ]
    order = Order(groups, times, sorted(range(len(groups)), key=lambda i: -worth[i]))

    def measured(dense: set[int]) -> Point:
        left = {n for i, g in enumerate(groups) if i not in dense for n in g.linears}
        loss = teacher.validate({n: masks[n] for n in masks if n in left}, batches)
        return Point(order.share(dense), loss, order.speedup(dense))

    dense_loss = teacher.validate({}, batches)
    if budget.dense_share is not None:
        dense = order.up_to_share(budget.dense_share)
    elif budget.min_speedup is not None:
        dense = order.down_to_speedup(budget.min_speedup)
    else:
        assert budget.max_loss_increase is not None
        fewest, most = 0, len(groups)
        if before is not None:
            fewest = 1 + sum(group.stays_dense for group in before.groups)
            logger.info(
                f"After learning {before.reached - before.dense_loss:.4f} is lost, and "
                f"`budget` allows {before.asked:g}: more linears stay dense, and the masks "
                "of the others are learned again"
            )
        elif settings.method == "learned":
            most = 0
        while fewest < most:
            middle = (fewest + most) // 2
            lost = measured(set(order.order[:middle])).validation - dense_loss
            expected = lost if before is None else before.expected(lost)
            if expected <= budget.max_loss_increase:
                most = middle
            else:
                fewest = middle + 1
        dense = set(order.order[:fewest])
    chosen = measured(dense)
    others = [set[int](), *(order.up_to_share(share) for share in CURVE)]
    curve = [chosen, *(measured(other) for other in others if other != dense)]
    goal = str(budget.goal)
    record = BudgetRecord(
        goal,
        getattr(budget, goal),
        dense_loss,
        chosen,
        [
            GroupFigures(
                group.linears,
                group.weights,
                shares[i],
                i in dense,
                *(times[i] if times else ()),
            )
            for i, group in enumerate(groups)
        ],
        sorted(curve, key=lambda point: point.dense_share),
        [] if before is None else before.learned,
    )
    speed = (
        "" if chosen.speedup is None else f", {chosen.speedup:.2f} x as fast as dense"
    )
    when = ", before learning" if settings.method == "learned" else ""
    logger.info(
        f"{len(dense)} of {len(groups)} groups of linears stay dense, "
        f"{chosen.dense_share:.1%} of the weights{speed}: validation loss "
        f"{record.curve[0].validation:.4f} -> {chosen.validation:.4f}{when}"
    )
    if len(dense) == len(groups):
        logger.warning(
            f"All linears stay dense and nothing is pruned: with any of them sparse, the "
            f"loss is above what `budget` allows ({goal}: {record.asked:g}). Allow more"
        )
    return record


def turns(settings: Settings) -> int:
    """
    How often linears are chosen, and masks learned, in most runs.

    With ``max_loss_increase`` what learning leaves of a loss is known only afterwards.
    """
    again = settings.method == "learned" and settings.budget.goal == "max_loss_increase"
    return 2 if again else 1


def validations(groups: int, settings: Settings) -> int:
    """How often choices among so many groups are validated, in most runs."""
    bounded = settings.budget.goal == "max_loss_increase"
    halvings = groups.bit_length() if bounded else 0
    # Dense, all sparse, what was chosen, and the curve.
    return halvings + (3 + len(CURVE)) * turns(settings)


def groups_of(
    model: nn.Module,
    resolved: ResolvedSpec,
    prunable: Sequence[str],
    settings: Settings,
) -> tuple[list[FusedLinears], Times]:
    """
    The groups that a budget chooses from, with their times; none without a budget.

    :raises OSError: as ``times_of``
    :raises ValueError: as ``times_of``
    """
    if settings.budget.goal is None:
        return [], ()
    groups = fused_linears(model, resolved, prunable)
    return groups, times_of(model, groups, settings.budget)
