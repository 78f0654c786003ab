# SPDX-License-Identifier: Apache-2.0
"""What `fuzz.py` changes: small real files of every kind that the commands read."""

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from nm_permute_plugin.checkpoint.again import FinishAgain
from nm_permute_plugin.checkpoint.saving import save_checkpoint
from nm_permute_plugin.checkpoint.source import Source
from nm_permute_plugin.cli.prune import prune_checkpoint
from nm_permute_plugin.pruning.resuming import Progress, expect, kept, resuming
from nm_permute_plugin.pruning.run import origin_of
from nm_permute_plugin.serving.kernel_table import Bucket, Choice, KernelTable
from nm_permute_plugin.specs.architectures.llama import LLAMA

WORDS = 48
GIVEN = {"seed": 3, "settings": {"method": "learned", "learn": {"steps": 8}}}
OURS = """\
prune_stage:
  permutation_modifiers:
    LearnablePermutationModifier: {fields}
"""
FP8 = {"scheme": "FP8_DYNAMIC", "targets": ["Linear"], "ignore": ["lm_head"]}

CHECKPOINTS: dict[str, tuple[dict[str, Any], str | None, str | None]] = {
    "sparse-24-bitmask": ({"method": "search"}, None, None),
    "sparse-24-shards": ({"method": "search"}, None, "60KB"),
    "dense-shards": ({"method": "search", "format": "dense"}, None, "60KB"),
    "sparse-bitmask": (
        {"method": "search", "mask_structure": "4:8", "format": "sparse-bitmask"},
        None,
        None,
    ),
    "fp8": ({"method": "search"}, "FP8_DYNAMIC", None),
    "int8": ({"method": "search"}, "W8A8", None),
    "w4a16": ({"method": "search"}, "W4A16", None),
}
"""Fields of our modifier, a scheme of quantization, the size of a shard."""

RECIPE = """\
prune_stage:
  permutation_modifiers:
    LearnablePermutationModifier:
      mask_structure: "2:4"
      score: wanda
      method: learned
      batch_size: 4
      learn: {stages: [swaps, multipliers], steps: [20, 30]}
      search: {rounds: 2}
      validation: {every: 5, share: 0.1}
      recover: [end_to_end]
      targets: ["Linear"]
      ignore: ["lm_head", "re:.*q_proj"]
  quantization_modifiers:
    QuantizationModifier:
      scheme: FP8_DYNAMIC
      targets: ["Linear"]
      ignore: ["lm_head"]
"""


@dataclass(frozen=True)
class Subject:
    """
    A folder to change, and who reads it.

    :param readers: names of `fuzz_readers.READERS`
    :param changed: what is changed, below the folder; everything if empty
    """

    name: str
    folder: Path
    readers: tuple[str, ...]
    changed: tuple[str, ...] = field(default=())


def make_subjects(folder: Path, names: Sequence[str] = ()) -> list[Subject]:
    """Make the subjects of these names, all by default, but those that are there."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    dense = folder / "dense-model"
    if not dense.exists():
        make_dense(dense, 64, torch.float32)
    made = []
    for name in names or (*CHECKPOINTS, *OTHERS):
        own = folder / name
        if name in CHECKPOINTS:
            if not own.exists():
                _checkpoint(folder, dense, name)
            made.append(Subject(name, own, CHECKPOINT_READERS))
            continue
        make, readers, changed = OTHERS[name]
        if not own.exists():
            make(own, dense)
        made.append(Subject(name, own, readers, changed))
    return made


def make_dense(folder: Path, width: int, dtype: torch.dtype) -> Path:
    """A tiny random model with a tokenizer of `WORDS` words."""
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    words = models.WordLevel({f"w{i:02}": i for i in range(WORDS)}, unk_token="w00")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w00", pad_token="w01", eos_token="w02"
    ).save_pretrained(folder)
    return folder


def text(rows: int) -> str:
    """A text of so many rows of 16 words that the models know."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(WORDS, (rows * 16,), generator=generator).tolist()
    return " ".join(f"w{token:02}" for token in tokens)


def _rows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(WORDS, (18, 16), generator=generator).tolist()


def _checkpoint(folder: Path, dense: Path, name: str) -> None:
    fields, scheme, shard = CHECKPOINTS[name]
    base = folder / "base" / name
    if shard is None:  # groups of W4A16 are of 128 channels
        width = 128 if scheme == "W4A16" else 64
        dense = make_dense(base, width, torch.bfloat16)
    base.mkdir(parents=True, exist_ok=True)
    recipe = OURS.format(fields=json.dumps(fields | {"search": {"rounds": 1}}))
    if scheme is not None:
        given = json.dumps(FP8 | {"scheme": scheme})
        recipe += f"  quantization_modifiers:\n    QuantizationModifier: {given}\n"
    path, out = base / "recipe.yaml", folder / name
    path.write_text(recipe)
    prune_checkpoint(dense, path, out, _rows(), "cpu")
    if shard is not None:
        _cut(out, shard)
    _without_page(out)


def _cut(out: Path, shard: str) -> None:
    """Save a checkpoint again, in shards."""
    whole = out.rename(out.with_name(f"{out.name}-whole"))
    model = AutoModelForCausalLM.from_pretrained(whole, dtype="auto")
    again, own = FinishAgain(origin_of(model)), Source(whole)
    save_checkpoint(model, out, again, source=own, max_shard_size=shard)
    shutil.rmtree(whole)


def _without_page(out: Path) -> None:
    """Take out of a checkpoint what nobody reads."""
    (out / "nm_permute" / "report.html").unlink(missing_ok=True)
    shutil.rmtree(out / "nm_permute" / "report", ignore_errors=True)


def _nothing(own: Path, dense: Path) -> None:
    """The model is there already."""


def _recipe(own: Path, dense: Path) -> None:
    own.mkdir()
    (own / "recipe.yaml").write_text(RECIPE)


def _spec(own: Path, dense: Path) -> None:
    import yaml

    own.mkdir()
    (own / "spec.yaml").write_text(yaml.safe_dump(dict(LLAMA)))


def _adapter(own: Path, dense: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(dense)
    made = get_peft_model(
        model, LoraConfig(target_modules=["v_proj", "down_proj"], r=4)
    )
    made.save_pretrained(str(own / "adapter"))
    path = own / "recipe.yaml"
    fields = {"method": "search", "format": "dense"}
    path.write_text(OURS.format(fields=json.dumps(fields)))
    prune_checkpoint(dense, path, own / "folded", _rows(), "cpu")
    _without_page(own / "folded")


def _plans(own: Path, dense: Path) -> None:
    own.mkdir()
    quick, dense_one = Choice("mma_sp", (2, 1), 3.25), Choice("dense", (), 4.5)
    fastest = [quick, dense_one]
    buckets = [Bucket(1, quick, fastest), Bucket(64, dense_one, fastest)]
    (own / "plan.json").write_text(KernelTable(64, buckets).to_json())


def _state(own: Path, dense: Path) -> None:
    with suppress(KeyboardInterrupt), resuming(own / "state"):
        found_of_state(lambda made: made)
        raise KeyboardInterrupt  # a run that died has left it


def found_of_state(make: Callable[[Any], Any]) -> list[Any]:
    """
    What a run finds that keeps its state, the like of that of `nm-permute prune`.

    :param make: is called with each value that has to be found anew
    """
    expect(GIVEN, 1000)
    generator = torch.Generator().manual_seed(4)
    statistics = {
        "model.layers.0.up": torch.rand(64, generator=generator),
        "rows": torch.randint(9, (5, 3), generator=generator),
        "counts": (torch.arange(4, dtype=torch.int32), 7, None, "word"),
        "empty": torch.zeros(0, 4, dtype=torch.bfloat16),
    }
    found = [kept(lambda: make(statistics), "statistics", 1)]
    orders = [torch.randperm(64, generator=generator), {"loss": 0.25, 3: [1.5, True]}]
    found.append(kept(lambda: make(orders), "search", "2:4"))
    state = {
        "state": {0: {"step": 5, "exp_avg": torch.rand(8, 8, generator=generator)}}
    }
    with Progress("learning", 8) as progress:
        found.append(progress.value)
        if progress.value is None:
            progress.follow(lambda: state)
            with progress.update(5, 0.5, 1e-3):
                pass
            progress._write()
            found[-1] = make(state)
        found.append((progress.done, progress.losses, progress.rate))
    return found


CHECKPOINT_READERS = (
    "verify",
    "verify",
    "convert",
    "load",
    "load",
    "evaluate",
    "report",
)
OTHERS: dict[str, tuple[Callable[[Path, Path], None], tuple[str, ...], tuple[str, ...]]]
OTHERS = {
    "dense-model": (_nothing, ("evaluate", "spec", "check", "check", "prune"), ()),
    "recipe": (_recipe, ("recipe check", "recipe show"), ()),
    "spec": (_spec, ("spec file",), ()),
    "adapter": (_adapter, ("adapt",), ("adapter", "folded/nm_permute")),
    "plan-cache": (_plans, ("plan",), ()),
    "resume-state": (_state, ("resume",), ()),
}
"""What makes them, who reads them, and what of them is changed."""
