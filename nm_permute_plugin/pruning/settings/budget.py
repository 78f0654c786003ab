# SPDX-License-Identifier: Apache-2.0
"""Which linears stay dense."""

from pydantic import Field, model_validator

from nm_permute_plugin.pruning.settings.frozen import Frozen, refuse_unread


class BudgetSettings(Frozen):
    """
    How much may stay dense, or how much may be lost; without one of the first three fields
    no linear stays dense for it.

    Linears that serving fuses (queries, keys and values; gate and up) stay dense together,
    those first whose masks cost most on the validation data for what they save. They are
    chosen under the search's masks (plain ones with ``method: identity``), and then the
    masks of what stays sparse are learned.

    :param max_loss_increase: by how much the loss on the validation data (in nats a token,
        by default) may lie above the dense model's, after learning and before the recovery;
        as many linears stay dense as that takes. Where all sparse lose more, ``method:
        learned`` learns again, mostly once
    :param dense_share: share of the weights of the linears to prune that stay dense
    :param min_speedup: how many times as fast as dense the products of all linears to prune
        must be together, by the times in ``kernels``
    :param kernels: the folder of kernel tables that serving measured on the GPU that shall
        serve the checkpoint (``NM_PERMUTE_CACHE``, by default ``~/.cache/nm-permute``)
    :param tokens: of the products that ``min_speedup`` is for: sequences that are decoded
        at a time
    """

    max_loss_increase: float | None = Field(default=None, gt=0)
    dense_share: float | None = Field(default=None, gt=0, lt=1)
    min_speedup: float | None = Field(default=None, gt=1)
    kernels: str | None = None
    tokens: int = Field(default=16, ge=1)

    @property
    def goal(self) -> str | None:
        """The name of the field that says how much; None without a budget."""
        goals = ("max_loss_increase", "dense_share", "min_speedup")
        return next((n for n in goals if getattr(self, n) is not None), None)

    @model_validator(mode="after")
    def _say_one_thing(self) -> "BudgetSettings":
        for name in ("dense_share", "min_speedup"):
            if name != self.goal and getattr(self, name) is not None:
                raise ValueError(
                    f"budget has two goals, {self.goal} and {name}: give one"
                )
        if self.min_speedup is None:
            for name in ("kernels", "tokens"):
                refuse_unread(self, name, "budget.", "no min_speedup")
        elif self.kernels is None:
            raise ValueError(
                "budget.min_speedup needs the times of the kernels: give budget.kernels, "
                "the folder where serving keeps its kernel tables"
            )
        return self
