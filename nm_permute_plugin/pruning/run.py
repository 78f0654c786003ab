# SPDX-License-Identifier: Apache-2.0
"""A run on a model in memory, from its settings to its checkpoint, without a recipe."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from loguru import logger
from torch import nn

from nm_permute_plugin.checkpoint.again import FinishAgain, Origin
from nm_permute_plugin.checkpoint.base_card import base_matter
from nm_permute_plugin.checkpoint.finish import Finish
from nm_permute_plugin.checkpoint.model_card import Card
from nm_permute_plugin.checkpoint.saved_names import saved_names
from nm_permute_plugin.checkpoint.saving import save_checkpoint
from nm_permute_plugin.checkpoint.source import Source
from nm_permute_plugin.maths.permutation import is_identity
from nm_permute_plugin.pruning import ranks
from nm_permute_plugin.pruning.arguments import must_be, must_be_model
from nm_permute_plugin.pruning.budget.choice import groups_of
from nm_permute_plugin.pruning.data import Data
from nm_permute_plugin.pruning.describe import describe
from nm_permute_plugin.pruning.folding import refuse_inexact
from nm_permute_plugin.pruning.pipeline import Record, permute_and_prune
from nm_permute_plugin.pruning.settings import Settings
from nm_permute_plugin.pruning.source import source_of
from nm_permute_plugin.pruning.targets import (
    base_model_of,
    match_linears,
    refuse_packed,
    refuse_tied,
    transposed_of,
)
from nm_permute_plugin.specs.architectures import head_dim_of, spec_of
from nm_permute_plugin.specs.exactness import check_on_few_layers
from nm_permute_plugin.specs.fold import Write, write_in_place
from nm_permute_plugin.specs.spec import ResolvedSpec, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERSIONED = (
    "nm-permute-plugin",
    "llmcompressor",
    "compressed-tensors",
    "transformers",
    "torch",
)
"""The packages whose versions the record and the card of a checkpoint tell."""


@dataclass(frozen=True)
class PrunePlan:
    """
    What a run will do to a model: everything that is known before any data is read.

    :param prunable: the linears to prune
    :param resolved: which axes move together
    :param saved: what the pruned linears are called on disk
    :param transposed: those of ``saved`` that are stored as [in, out]
    :param base_model: the hub name of the model, or the name of its folder
    :param source: the folder that the model was loaded from, if there is one
    :param said: how much is pruned, and what stays dense and why
    """

    prunable: list[str]
    resolved: ResolvedSpec
    saved: list[str]
    transposed: list[str]
    base_model: str
    source: Source | None = None
    said: Sequence[str] = ()

    def __repr__(self) -> str:
        """The main figures, in a line."""
        spaces = len(self.resolved.spaces)
        return (
            f"PrunePlan({self.base_model}: {len(self.prunable)} linears to prune, "
            f"{spaces} spaces of channels)"
        )

    @classmethod
    def of(cls, model: nn.Module, settings: Settings) -> "PrunePlan":
        """
        Match the targets and resolve the spec.

        :param model: a transformers model
        :raises ValueError: for a target, a spec or a format that does not fit the
            model, and for an architecture that is not known
        """
        prunable = match_linears(model, settings.targets, settings.ignore)
        refuse_tied(model, prunable)
        spec = settings.spec if settings.spec is not None else spec_of(model)
        head_dim = head_dim_of(cast(Any, model).config)
        resolved = resolve(model, spec, settings.pattern, prunable, head_dim)
        groups_of(model, resolved, prunable, settings)  # refuses before the work
        transposed = transposed_of(model, prunable, settings.format)
        hosted = cast("PreTrainedModel", model)
        return cls(
            prunable,
            resolved,
            saved_names(hosted, prunable),
            saved_names(hosted, transposed),
            base_model_of(model),
            source_of(model, resolved, settings),
            describe(model, prunable, settings),
        )

    def promised(self, record: Record) -> list[str]:
        """What follows the pattern in the checkpoint: what a budget left dense does not."""
        dense = record.dense_linears
        names = zip(self.prunable, self.saved, strict=True)
        return [saved for name, saved in names if name not in dense]

    def lines(self, settings: Settings) -> list[str]:
        """
        Say what will be done: how much is pruned, what stays dense, which settings are
        not the defaults, and which space permutes the inputs of which linears.
        """
        moves = settings.method != "identity"
        listing = self.resolved.listing(settings.spaces) if moves else []
        return [*self.said, *listing]

    def log(self, settings: Settings) -> None:
        """Say what will be done, before it is."""
        logger.info("\n".join(["This run prunes", *self.lines(settings)]))

    def try_spec(
        self, model: nn.Module, settings: Settings, data: Data, write: Write
    ) -> None:
        """
        Try a spec of the settings' own with random permutations, before any work.

        A copy of the model's class with few layers is tried in float64, where no rounding
        hides a small mistake, then the model itself.

        :raises RuntimeError: if a fold changes the function of the model
        """
        if settings.spec is not None:
            check_on_few_layers(model, settings.spec, settings.pattern)
            refuse_inexact(model, self.resolved, data.train[0], write)


@dataclass(frozen=True)
class Pruned:
    """
    What ``prune`` did to a model, and all that its checkpoint needs.

    :param promised: the modules that follow the pattern in the checkpoint
    """

    settings: Settings
    plan: PrunePlan
    record: Record
    promised: Sequence[str]

    def __repr__(self) -> str:
        """The main figures, in a line."""
        before, after = self.record.retained
        losses = [entry["validation"] for entry in self.record.history]
        loss = (
            f", validation loss {losses[0]:.3f} -> {min(losses):.3f}" if losses else ""
        )
        return (
            f"Pruned({self.plan.base_model}: {self.settings.mask_structure} in "
            f"{len(self.promised)} linears by {self.settings.method}, "
            f"{before:.1%} -> {after:.1%} of the {self.settings.score} score kept{loss})"
        )

    def finish(self) -> Finish:
        """What is left to do with each checkpoint of the model."""
        versions = {name: v for name in VERSIONED if (v := _version(name))}
        record, plan = self.record, self.plan
        transposed = [name for name in plan.transposed if name in set(self.promised)]
        card = Card(
            base_model=plan.base_model,
            pattern=self.settings.pattern,
            pruned=list(self.promised),
            fold_error=record.fold_error,
            retained=record.retained,
            history=record.history,
            versions=versions,
            transposed=transposed,
            base=base_matter(plan.source.path) if plan.source is not None else {},
            stays_dense=len(record.dense_linears),
        )
        report = {
            "base_model": plan.base_model,
            "modifier": self.settings.model_dump(),
            "versions": versions,
            "pruned": list(self.promised),
            "transposed": transposed,
            "moved": [n for n, perm in record.perms.items() if not is_identity(perm)],
            "fold_error": record.fold_error,
            "retained": record.retained,
            "seconds": record.seconds,
            "memory": record.memory,
            "environment": record.environment,
            "searched": record.searched,
            "history": record.history,
            "recovered": [asdict(stage) for stage in record.recovered],
            "figures": asdict(record.figures),
            "budget": None if record.budget is None else asdict(record.budget),
        }
        return Finish(self.settings.format, card, record.perms, report, plan.source)


def prune(model: nn.Module, data: Data, settings: Settings | None = None) -> Pruned:
    """
    Permute and prune a transformers model in memory, in place.

    >>> import tempfile, torch
    >>> import nm_permute_plugin as nmp
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> size = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    >>> heads = dict(num_attention_heads=4, num_key_value_heads=2, vocab_size=64)
    >>> model = LlamaForCausalLM(LlamaConfig(**size, **heads)).eval()
    >>> tokens = torch.randint(64, (12, 32))
    >>> data = nmp.read_samples(model, [{"input_ids": tokens}], batch_size=4)
    >>> pruned = nmp.prune(model, data, nmp.Settings(method="search"))
    >>> weight = model.model.layers[0].mlp.down_proj.weight
    >>> float((weight == 0).float().mean())
    0.5
    >>> folder = tempfile.mkdtemp() + "/sparse"
    >>> nmp.save(model, folder, pruned)
    >>> nmp.verify(folder).good
    True

    The channels go back to their old places by the inverse permutations:

    >>> back = {name: perm.argsort() for name, perm in pruned.record.perms.items()}
    >>> nmp.fold(model, pruned.plan.resolved, back)

    :param data: of ``read_samples``
    :param settings: the defaults of a recipe if None
    :raises TypeError: for an argument of another kind
    :raises ValueError: as ``PrunePlan.of`` and ``permute_and_prune``
    :raises RuntimeError: if the fold changes the function of the model
    """
    must_be_model(model)
    must_be(data, Data, "data", "what nm_permute_plugin.read_samples returned")
    settings = Settings() if settings is None else settings
    must_be(
        settings, Settings, "settings", 'nm_permute_plugin.Settings(method="learned")'
    )
    plan = PrunePlan.of(model, settings)
    refuse_packed(plan.resolved)
    plan.log(settings)
    plan.try_spec(model, settings, data, write_in_place)
    record = permute_and_prune(model, plan.resolved, plan.prunable, data, settings)
    promised = plan.promised(record) if settings.prune else []
    return Pruned(settings, plan, record, promised)


def save(model: nn.Module, folder: str | Path, pruned: Pruned | None = None) -> None:
    """
    Save a pruned model: check it, store it as asked, describe it.

    The folder holds what it held before until everything is written, by one of several
    ranks. What the model's own
    folder holds beside its weights travels along. Save the tokenizer into it as ever.

    :param pruned: what ``prune`` returned; None for a model that was pruned in an earlier
        session and has been trained under ``keep_masks`` since, or quantized. It must
        be as sparse as the checkpoint that it was read from says it is
    :raises ValueError: if a pruned module does not follow the pattern any more, or if the
        model is a PEFT model whose adapter is not merged yet
    :raises TypeError: for an argument of another kind
    """
    must_be_model(model)
    if pruned is not None:
        must_be(pruned, Pruned, "pruned", "what nm_permute_plugin.prune returned")
    if hasattr(model, "merge_and_unload"):
        raise ValueError(
            f"{type(model).__name__} would save its adapter alone: merge it first, "
            "`model = model.merge_and_unload()`, and `apply()` the masks again"
        )
    hosted = cast("PreTrainedModel", model)
    if pruned is not None:
        finish: Callable[[Path], None] = pruned.finish()
        source = pruned.plan.source
    else:
        origin = origin_of(hosted)
        finish = FinishAgain(origin)
        source = None if origin.folder is None else Source(origin.folder)
    if ranks.is_first():
        save_checkpoint(hosted, folder, finish, source=source)
    ranks.wait()


def origin_of(model: "PreTrainedModel") -> Origin:
    """Tells where a model was read from."""
    name = model.name_or_path
    folder = Path(name) if name and Path(name, "config.json").exists() else None
    return Origin(folder, base_model_of(model), model.base_model_prefix)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
