# SPDX-License-Identifier: Apache-2.0
"""Prune with the face of ``optimum.gptq.GPTQQuantizer``."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from optimum.quantization_base import OptimumQuantizer
from torch import Tensor, nn

from nm_permute_plugin.checkpoint.disk import refuse_occupied
from nm_permute_plugin.checkpoint.transaction import directory
from nm_permute_plugin.cli.common import find_device
from nm_permute_plugin.evaluation.corpus import Corpus, spread
from nm_permute_plugin.evaluation.data_sets import read_data_set
from nm_permute_plugin.evaluation.data_sources import data_source
from nm_permute_plugin.evaluation.model_names import must_be_model
from nm_permute_plugin.evaluation.pretrained import load_model, tokenizer_of
from nm_permute_plugin.evaluation.records import Document
from nm_permute_plugin.evaluation.text import TextTokenizer
from nm_permute_plugin.optimum.config import NMConfig
from nm_permute_plugin.pruning.positions import fit_length
from nm_permute_plugin.pruning.reading import read_samples
from nm_permute_plugin.pruning.run import Pruned, prune, save

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class NMPruner(OptimumQuantizer):
    """
    Permutes and prunes a model N:M, as ``nm_permute_plugin.prune`` does.

    :param config: what is done; may be given as its fields instead, which are those of
        ``NMConfig``: ``NMPruner(dataset=texts, mask_structure="2:4")``
    :raises ValueError: as ``NMConfig``, or if both are given
    """

    def __init__(self, config: NMConfig | None = None, **fields: Any) -> None:
        self.config = _config(config, fields) or NMConfig()
        self._loaded: PreTrainedModel | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._pruned: Pruned | None = None

    @classmethod
    def from_pretrained(
        cls, model_or_path: str | Path, file_name: str | None = None
    ) -> "NMPruner":
        """
        Load a model, which ``quantize`` then prunes, onto a GPU if there is one.

        :param model_or_path: its folder, or its name on the Hugging Face hub
        :param file_name: must be None: a model is a folder
        :raises FileNotFoundError: if there is no such model
        :raises ValueError: for a model that cannot be read, or that wants code of its own
        """
        if file_name is not None:
            raise ValueError(
                f"file_name={file_name!r}: a model is a folder; leave file_name out"
            )
        must_be_model(model_or_path)
        pruner = cls()
        pruner._tokenizer = tokenizer_of(model_or_path)
        pruner._loaded = load_model(model_or_path).to(find_device(None)).eval()
        return pruner

    def prune_model(
        self, model: nn.Module, tokenizer: "PreTrainedTokenizerBase | str | None" = None
    ) -> nn.Module:
        """
        Permute and prune a transformers model in place, and return it.

        :param tokenizer: the model's, or its folder; tokenised samples need none
        :raises ValueError: if there is no data to calibrate on, and as
            ``nm_permute_plugin.prune``
        :raises RuntimeError: if the fold changes the function of the model
        """
        if isinstance(tokenizer, str | Path):
            tokenizer = tokenizer_of(tokenizer)
        settings = self.config.settings
        data = read_samples(
            model,
            self._batches(model, tokenizer),
            settings.batch_size,
            settings.validation.share,
            settings.seed,
        )
        self._pruned = prune(model, data, settings)
        self._tokenizer = tokenizer
        return model

    def save(self, model: nn.Module, folder: str | Path) -> None:
        """
        Save the model that ``prune_model`` pruned, and its tokenizer, as a checkpoint.

        :raises ValueError: if nothing was pruned yet, or if a pruned module does not
            follow the pattern any more
        """
        if self._pruned is None:
            raise ValueError("nothing is pruned yet: call prune_model before save")
        save(model, folder, self._pruned)
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(folder)

    def quantize(
        self,
        save_dir: str | Path,
        file_prefix: str | None = None,
        config: NMConfig | None = None,
        **fields: Any,
    ) -> None:
        """
        Prune the model that ``from_pretrained`` loaded, and save it.

        :param save_dir: a folder, new or empty; it is complete afterwards or not there
        :param file_prefix: must be None: the files of a checkpoint have fixed names
        :param config: what is done; may be given as its fields instead
        :raises ValueError: if there is no model, or one that was pruned already, and as
            ``prune_model``
        :raises OSError: if the folder holds files, or cannot be written
        """
        if file_prefix is not None:
            raise ValueError(
                f"file_prefix={file_prefix!r}: the files of a checkpoint have the names "
                "that transformers looks for; leave file_prefix out"
            )
        model, tokenizer = self._loaded, self._tokenizer
        if model is None:
            raise ValueError(
                "there is no model to prune: NMPruner.from_pretrained(MODEL) loads one, "
                "and prune_model(model, tokenizer) takes one"
            )
        if self._pruned is not None:
            raise ValueError(
                "the loaded model is pruned already: load it again by "
                "NMPruner.from_pretrained(MODEL)"
            )
        self.config = _config(config, fields) or self.config
        out = Path(save_dir).resolve()
        refuse_occupied(out)
        with directory(out, was_empty=True) as unfinished:
            self.prune_model(model, tokenizer)
            self.save(model, unfinished)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of the config."""
        return self.config.to_dict()

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> "NMPruner":
        """
        Make a pruner of what ``to_dict`` returned.

        :raises ValueError: as ``NMConfig``
        """
        return cls(NMConfig.from_dict(config_dict))

    def _batches(self, model: nn.Module, tokenizer: Any) -> list[dict[str, Tensor]]:
        """The calibration data, a row a batch."""
        dataset, rows = self.config.dataset, self.config.rows
        if dataset is None:
            raise ValueError(
                "there is no calibration data: give dataset=, a list of texts for example"
            )
        if isinstance(dataset, list) and not isinstance(dataset[0], str):
            return [_batch(sample) for sample in spread(dataset, rows)]
        if tokenizer is None:
            raise ValueError(
                "dataset is text: give prune_model(model, tokenizer) the model's "
                "tokenizer, or a dataset of tokenised samples"
            )
        asked = self.config.sequence_length
        length = fit_length(model.config, asked, 1024, "sequence_length")
        if isinstance(dataset, str):
            corpus = read_data_set(data_source(dataset), rows)
        else:
            texts = (Document(f"dataset[{i}]", text) for i, text in enumerate(dataset))
            corpus = Corpus(documents=list(texts))
        found = TextTokenizer(tokenizer).rows(corpus, length, rows)
        return [_batch({"input_ids": row}) for row in spread(found, rows)]


def _config(config: NMConfig | None, fields: Mapping[str, Any]) -> NMConfig | None:
    if config is not None and fields:
        raise ValueError(
            f"give a config, or its fields ({', '.join(fields)}), and not both"
        )
    return NMConfig(**fields) if fields else config


def _batch(sample: Mapping[str, list[int]]) -> dict[str, Tensor]:
    return {name: torch.tensor([values]) for name, values in sample.items()}
