# SPDX-License-Identifier: Apache-2.0
"""The modifier that a recipe names: order, fold and prune in one step."""

from contextlib import nullcontext
from dataclasses import asdict
from importlib.metadata import version

from compressed_tensors.offload import (
    disable_offloading,
    disable_onloading,
    update_offload_parameter,
)
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from llmcompressor.utils.helpers import DisableQuantization
from loguru import logger
from pydantic import PrivateAttr

from nm_permute_plugin.checkpoint.finish import Finish
from nm_permute_plugin.checkpoint.model_card import Card
from nm_permute_plugin.checkpoint.plan import experts_of
from nm_permute_plugin.checkpoint.saved_names import saved_names
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.modifiers.fields import OrderFields
from nm_permute_plugin.modifiers.names import name_experts_for_saving
from nm_permute_plugin.modifiers.neighbours import is_pruned_later, refuse_shared_pass
from nm_permute_plugin.modifiers.save import after_save
from nm_permute_plugin.modifiers.targets import (
    base_model_of,
    match_linears,
    refuse_packed,
    refuse_tied,
    transposed_of,
)
from nm_permute_plugin.pruning.data import read_samples
from nm_permute_plugin.pruning.pipeline import (
    Record,
    permute_and_prune,
    refuse_inexact,
)
from nm_permute_plugin.specs.architectures import head_dim_of, spec_of
from nm_permute_plugin.specs.spec import ResolvedSpec, resolve

VERSIONED = (
    "nm-permute-plugin",
    "llmcompressor",
    "compressed-tensors",
    "transformers",
    "torch",
)


class LearnablePermutationModifier(OrderFields, Modifier):
    """
    Finds an order of the model's channels in which N:M pruning loses little, writes the
    order into the weights (the model computes the same function, nothing is permuted at
    run time), and prunes. After https://arxiv.org/abs/2601.22980, restricted to orders
    that fold exactly.

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

    - on_initialize: match targets, resolve the permutation spec, refuse what cannot be
    - on_calibration_start: measure the dense model, find the order, fold it, prune, and
      change the kept weights if `recover` says so
    - on_finalize: report; every save from then on is held to the pattern, whatever
      modifiers came after, ends in the chosen format, and has a model card and the
      run's record in the folder `nm_permute`

    What it can be told stands at ``OrderFields``.
    """

    _prunable: list[str] = PrivateAttr(default_factory=list)
    _resolved: ResolvedSpec | None = PrivateAttr(default=None)
    _started: bool = PrivateAttr(default=False)
    _record: Record | None = PrivateAttr(default=None)
    _promised: list[str] = PrivateAttr(default_factory=list)
    _base_model: str = PrivateAttr(default="")
    _transposed: list[str] = PrivateAttr(default_factory=list)

    @property
    def record(self) -> Record | None:
        """What the run did; None before it ran."""
        return self._record

    def on_initialize(self, state: State, **kwargs: object) -> bool:
        model = state.model
        self._prunable = match_linears(model, self.targets, self.ignore)
        spec = self.spec if self.spec is not None else spec_of(model)
        # Offloaded tensors are handed out as fresh copies; ties show only without.
        with disable_onloading():
            refuse_tied(model, self._prunable)
            self._resolved = resolve(
                model,
                spec,
                NMPattern.parse(self.mask_structure),
                self._prunable,
                head_dim_of(model.config),
            )
        self._base_model = base_model_of(model)
        if experts_of(name for name, _ in model.named_modules()):
            name_experts_for_saving(model)
        names = saved_names(model, self._prunable)
        transposed = transposed_of(model, self._prunable, self.format)
        self._transposed = saved_names(model, transposed)
        if self.prune or is_pruned_later(self, self.mask_structure):
            self._promised = names
        refuse_packed(self._resolved)
        for line in self._resolved.listing(self.spaces):
            logger.info(line)
        return True

    def on_calibration_start(
        self, state: State, event: Event, **kwargs: object
    ) -> None:
        self._started = True
        refuse_shared_pass(self)
        if self._resolved is None:
            raise RuntimeError("on_calibration_start ran before on_initialize")
        model = state.model
        samples = read_samples(
            model, state.data.calib, self.batch_size, self.validation, self.seed
        )
        logger.info(
            f"{self.method} order for {self.mask_structure} {self.score}: "
            f"{len(self._prunable)} linears, {samples} to train on"
        )
        settings = self.settings()
        # Weights stay on the device that they are fetched to: each is read many times.
        held = nullcontext() if settings.layer_wise else disable_offloading()
        with DisableQuantization(model), held:
            if self.spec is not None:
                refuse_inexact(
                    model, self._resolved, samples.train[0], update_offload_parameter
                )
            self._record = permute_and_prune(
                model,
                self._resolved,
                self._prunable,
                samples,
                settings,
                write=update_offload_parameter,
                hold=disable_offloading,
            )

    def on_finalize(self, state: State, **kwargs: object) -> bool:
        if self._record is None and self._started:
            return False  # the run was refused; its own error says why
        if self._record is None:
            raise RuntimeError(
                "LearnablePermutationModifier never ran: the pipeline sent no "
                "calibration start. Use oneshot's pipeline='independent'."
            )
        after_save(state.model, self._finish(self._record))
        before, after = self._record.retained
        logger.info(
            f"retained score {before:.4f} -> {after:.4f}, outputs moved by the fold "
            f"{self._record.fold_error:.1e}"
        )
        return True

    def _finish(self, record: Record) -> Finish:
        versions = {name: version(name) for name in VERSIONED}
        card = Card(
            base_model=self._base_model,
            pattern=NMPattern.parse(self.mask_structure),
            pruned=self._promised,
            fold_error=record.fold_error,
            retained=record.retained,
            history=record.history,
            versions=versions,
            transposed=self._transposed,
        )
        report = {
            "modifier": self.model_dump(),
            "versions": versions,
            "pruned": self._promised,
            "transposed": self._transposed,
            "fold_error": record.fold_error,
            "retained": record.retained,
            "seconds": record.seconds,
            "history": record.history,
            "recovered": [asdict(stage) for stage in record.recovered],
        }
        return Finish(self.format, card, record.perms, report)
