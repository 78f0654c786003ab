# SPDX-License-Identifier: Apache-2.0
"""The modifier that a recipe names: permute, fold and prune in one step."""

from contextlib import nullcontext

from compressed_tensors.offload import (
    disable_offloading,
    disable_onloading,
    remove_dispatch,
)
from llmcompressor.core import Event, State, active_session
from llmcompressor.modifiers import Modifier
from llmcompressor.utils.helpers import DisableQuantization
from loguru import logger
from pydantic import PrivateAttr

from nm_permute_plugin.checkpoint.plan import experts_of
from nm_permute_plugin.modifiers.calibration import all_samples
from nm_permute_plugin.modifiers.fields import PermutationFields
from nm_permute_plugin.modifiers.names import name_experts_for_saving
from nm_permute_plugin.modifiers.neighbours import is_pruned_later
from nm_permute_plugin.modifiers.offloaded import write_once
from nm_permute_plugin.modifiers.preflight import look_of, refuse_strangers
from nm_permute_plugin.modifiers.recipe import refuse_shared_pass
from nm_permute_plugin.modifiers.rounding import roundings_of
from nm_permute_plugin.modifiers.save import after_save
from nm_permute_plugin.pruning import ranks
from nm_permute_plugin.pruning.pipeline import Record, permute_and_prune
from nm_permute_plugin.pruning.reading import read_samples
from nm_permute_plugin.pruning.recover.rounding import Rounding
from nm_permute_plugin.pruning.run import Pruned, PrunePlan
from nm_permute_plugin.pruning.targets import refuse_packed


class LearnablePermutationModifier(PermutationFields, Modifier):
    """
    Finds a permutation of the model's channels with which N:M pruning loses little,
    folds it into the weights (the model computes the same function, nothing is permuted
    at run time), learns the mask, and prunes. After https://arxiv.org/abs/2601.22980,
    restricted to permutations that fold exactly.

    Sample recipe:

    ```yaml
    prune_stage:
      permutation_modifiers:
        LearnablePermutationModifier:
          mask_structure: "2:4"
          score: wanda
          method: learned
          ignore: ["lm_head"]
    ```

    Lifecycle:

    - on_initialize: check everything, match targets, resolve the permutation spec,
      refuse what cannot be
    - on_calibration_start: measure the dense model, search and learn, fold, prune, and
      change the kept weights if `recover` says so
    - on_finalize: report; every save from then on is checked against the pattern, whatever
      modifiers came after, is stored in the chosen format, and gets a model card and the
      run's record in the folder `nm_permute`

    The fields are those of ``pruning.settings.Settings``.
    """

    _plan: PrunePlan | None = PrivateAttr(default=None)
    _started: bool = PrivateAttr(default=False)
    _record: Record | None = PrivateAttr(default=None)
    _is_pruned: bool = PrivateAttr(default=True)
    _roundings: dict[str, Rounding] = PrivateAttr(default_factory=dict)

    @property
    def record(self) -> Record | None:
        """What the run did; None before it ran."""
        return self._record

    def on_initialize(self, state: State, **kwargs: object) -> bool:
        model, settings = state.model, self.settings()
        refuse_strangers()
        if not ranks.is_first():
            logger.disable("nm_permute_plugin")
        modifiers = active_session().lifecycle.recipe.modifiers
        with disable_onloading():
            look_of(self, modifiers, state).refuse()
        if experts_of(name for name, _ in model.named_modules()):
            name_experts_for_saving(model)
        # Offloaded tensors are handed out as fresh copies; ties show only without.
        with disable_onloading():
            self._plan = PrunePlan.of(model, settings)
        self._is_pruned = self.prune or is_pruned_later(self, modifiers)
        if self.recover.stages and not self.memory.shard:
            self._roundings = roundings_of(self, modifiers, model)
        refuse_packed(self._plan.resolved)
        self._plan.log(settings)
        return True

    def on_calibration_start(
        self, state: State, event: Event, **kwargs: object
    ) -> None:
        self._started = True
        refuse_shared_pass(self)
        if self._plan is None:
            raise RuntimeError("on_calibration_start ran before on_initialize")
        model, plan, settings = state.model, self._plan, self.settings()
        data = read_samples(
            model,
            all_samples(state.data.calib),
            settings.batch_size,
            settings.validation.share,
            settings.seed,
        )
        logger.info(
            f"{len(plan.prunable)} linears are pruned {self.mask_structure} by "
            f"{self.score}, method {self.method}; {data} to learn from, on "
            f"{next(model.parameters()).device}"
        )
        if self._roundings:
            logger.info(
                f"The recovery trains {len(self._roundings)} linears with weights rounded "
                "as the quantization that follows rounds them; its losses are of those"
            )
        if settings.memory.shard:
            remove_dispatch(model)  # GPUs get shards, and the CPU has the whole
        # Weights stay on the device that they are fetched to: each is read many times.
        held = nullcontext() if settings.layer_wise else disable_offloading()
        with DisableQuantization(model), held:
            plan.try_spec(model, settings, data, write_once)
            self._record = permute_and_prune(
                model,
                plan.resolved,
                plan.prunable,
                data,
                settings,
                write=write_once,
                hold=disable_offloading,
                roundings=self._roundings,
            )

    def on_finalize(self, state: State, **kwargs: object) -> bool:
        if self._record is None and self._started:
            return False  # the run was refused; its own error says why
        if self._record is None or self._plan is None:
            raise RuntimeError(
                "LearnablePermutationModifier never ran: the pipeline sent no "
                "calibration start. Use oneshot's pipeline='independent'."
            )
        promised = self._plan.promised(self._record) if self._is_pruned else []
        pruned = Pruned(self.settings(), self._plan, self._record, promised)
        before, after = self._record.retained
        said = f"{after:.1%} of the {self.score} score kept by the best masks"
        after_save(state.model, pruned.finish(), self._plan.source, said)
        logger.info(
            f"Retained score {before:.4f} -> {after:.4f}; the fold moved the outputs by "
            f"{self._record.fold_error:.1e}"
        )
        return True
