# SPDX-License-Identifier: Apache-2.0
"""The card says what is true of the files beside it, and takes evaluations."""

from pathlib import Path

import pytest
import yaml
from checkpoint_files import MakeDense
from huggingface_hub import ModelCard

from nm_permute_plugin.checkpoint.card_file import (
    keep_foreign_card,
    read_evaluation,
    write_evaluation,
)
from nm_permute_plugin.checkpoint.directory import open_checkpoint
from nm_permute_plugin.checkpoint.model_card import Card, write_card, write_storage
from nm_permute_plugin.checkpoint.record import Promise
from nm_permute_plugin.checkpoint.writer import convert
from nm_permute_plugin.maths.pattern import NMPattern

HISTORY = [{"step": 0, "validation": 1.5}, {"step": 9, "validation": 1.25}]


def make_card(path: Path, format: str, modules: tuple[str, ...], **more) -> str:
    """The card of a checkpoint, as text."""
    fields = {
        "base_model": 'some/"model"',
        "pattern": NMPattern(2, 4),
        "pruned": modules,
        "fold_error": 3.2e-4,
        "retained": (0.7, 0.75),
        "history": HISTORY,
        "versions": {"torch": "2.13.0"},
        "format": format,
        "reason": "asked for",
    }
    write_card(open_checkpoint(path), Card(**fields | more))
    return (path / "README.md").read_text()


@pytest.fixture
def sparse(tmp_path: Path, make_dense: MakeDense) -> tuple[Path, tuple[str, ...]]:
    """A sparse checkpoint, and its sparse modules."""
    dense = make_dense("fp8")
    (dense / "recipe.yaml").write_text("prune_stage: {}\n")
    done = convert(dense, tmp_path / "sparse", "sparse-24-bitmask")
    return tmp_path / "sparse", done.compressed


def test_the_hubs_own_library_reads_the_front_matter(sparse) -> None:
    path, modules = sparse
    make_card(path, "sparse-24-bitmask", modules)
    data = ModelCard.load(path / "README.md").data
    assert data.base_model == 'some/"model"'
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert {"nm-permute-plugin", "2of4"} <= set(data.tags)


@pytest.mark.parametrize("pruned", [True, False])
def test_a_card_says_how_to_train_what_is_pruned(sparse, pruned: bool) -> None:
    path, modules = sparse
    text = make_card(path, "sparse-24-bitmask", modules if pruned else ())
    assert ("keep_masks(model)" in text) == pruned


def test_a_card_of_weights_that_changed_later_says_so(sparse) -> None:
    path, modules = sparse
    text = make_card(path, "sparse-24-bitmask", modules, changed_later=True)
    assert "In a later session the kept weights were trained further" in text
    assert "LoRA adapters" not in text
    moved = make_card(
        path, "sparse-24-bitmask", modules, changed_later=True, moved=True
    )
    assert "nothing that was made for the channels of" in moved
    assert "`nm-permute adapt ADAPTER FOLDER OUT`" in moved


def test_the_card_of_a_sparse_checkpoint(sparse) -> None:
    path, modules = sparse
    text = make_card(path, "sparse-24-bitmask", modules, moved=True)
    _, front, body = text.split("---\n", 2)
    matter = yaml.safe_load(front)
    assert matter["base_model"] == 'some/"model"'
    assert matter["library_name"] == "transformers"
    assert "2of4" in matter["tags"]
    said = [
        "- 2:4: 14 modules: `",
        "`model.layers.*.self_attn.q_proj` (2)",
        "`lm_head`",
        "quantization: `float-quantized`",
        "moved by 3.2e-04",
        "0.7500 of the total score",
        "from 1.5000 to 1.2500",
        "import nm_permute_plugin",
        "--legacy",
        "**Without the plugin**",
        "torch 2.13.0",
        "```yaml\nprune_stage: {}\n```",
    ]
    assert [part for part in said if part not in body] == []


def test_the_card_says_where_no_channel_moved(sparse) -> None:
    path, modules = sparse
    text = make_card(path, "sparse-24-bitmask", modules)
    assert (
        "whose channels stay where they are. The recipe below kept 2 of every 4" in text
    )
    assert "hold 0.7500 of the total score." in text
    assert "channels permuted" not in text
    assert "moved by" not in text


def test_what_holds_of_the_base_stays_in_the_front_matter(sparse) -> None:
    path, modules = sparse
    base = {
        "license": "other",
        "license_name": "own: terms",
        "language": ["en", "no"],
        "base_model": ["a/b", "c/d"],
        "tags": ["chat", "sparsity"],
    }
    text = make_card(path, "dense", modules, base_model="folder", base=base)
    matter = yaml.safe_load(text.split("---\n")[1])
    assert {name: matter[name] for name in base if name != "tags"} == {
        name: value for name, value in base.items() if name != "tags"
    }
    assert matter["tags"][:2] == ["chat", "sparsity"]
    assert {"nm-permute-plugin", "2of4"} < set(matter["tags"])
    assert len(matter["tags"]) == len(set(matter["tags"]))
    # The hub's name of the source says more than its own card.
    text = make_card(path, "dense", modules, base=base)
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == 'some/"model"'


def test_what_was_made_for_the_base_does_not_fit_where_channels_moved(sparse) -> None:
    path, modules = sparse
    said = "LoRA adapters, draft models that read hidden states, probes and steering"
    text = make_card(path, "dense", modules, moved=True)
    assert said in text
    assert "`nm-permute adapt ADAPTER FOLDER OUT` carries a LoRA adapter over" in text
    assert said in make_card(path, "dense", (), moved=True)
    assert "nm-permute adapt" not in make_card(path, "dense", modules)


def test_the_card_of_a_dense_checkpoint_needs_no_plugin(make_dense: MakeDense) -> None:
    dense = make_dense()
    modules = ("model.layers.0.mlp.down_proj",)
    text = make_card(dense, "dense", modules, base_model="folder")
    assert "base_model" not in text
    assert "load it with no plugin" in text
    assert "import nm_permute_plugin" not in text
    assert "Without the plugin" not in text
    assert "quantization: none" in text


def test_the_card_of_a_fold_alone_promises_no_zeros(make_dense: MakeDense) -> None:
    text = make_card(make_dense(), "dense", (), history=[])
    assert "Nothing is pruned." in text
    assert "2of4" not in text
    assert "validation" not in text


def test_tables_of_results_are_written_and_replaced(sparse) -> None:
    path, modules = sparse
    text = make_card(path, "sparse-24-bitmask", modules)
    assert read_evaluation(path) == ""
    for table in ("| a |\n|---|\n| 1 |", "| b |\n|---|"):
        write_evaluation(path, table)
        assert read_evaluation(path) == table
        after = (path / "README.md").read_text()
        assert after.replace(f"\n\n{table}\n\n", "\n") == text


def test_a_card_without_a_place_for_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"README\.md has no place"):
        read_evaluation(tmp_path)
    (tmp_path / "README.md").write_text("# Mine\n")
    with pytest.raises(ValueError, match=r"README\.md has no place"):
        write_evaluation(tmp_path, "| a |")
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


def test_another_way_of_storing_is_said_and_the_rest_stays(sparse) -> None:
    path, modules = sparse
    promise = Promise(list(modules), NMPattern(2, 4), [])
    make_card(path, "sparse-24-bitmask", modules)
    card = path / "README.md"
    card.write_text(card.read_text().replace("## Evaluation", "My own words."))
    write_evaluation(path, "| c.txt | 2048 |")
    before = card.read_text()
    convert(path, path, "dense")
    write_storage(path, promise, "dense", "converted")
    text = card.read_text()
    assert "stored dense, zeros included: converted" in text
    assert "Without the plugin" not in text
    assert "My own words." in text
    assert "| c.txt | 2048 |" in text
    convert(path, path, "sparse-24-bitmask", modules=modules)
    write_storage(path, promise, "sparse-24-bitmask", "asked for")
    assert card.read_text() == before


def test_foreign_cards_are_kept_each_under_its_own_name(tmp_path: Path) -> None:
    folder, fresh = tmp_path / "folder", tmp_path / "fresh"
    folder.mkdir()
    fresh.mkdir()
    (folder / "README.md").write_text("one")
    keep_foreign_card(folder, fresh)
    assert list(fresh.iterdir()) == []
    (fresh / "README.md").write_text("new")
    keep_foreign_card(folder, fresh)
    (folder / "README.old.md").write_text("zero")
    keep_foreign_card(folder, fresh)
    found = {file.name: file.read_text() for file in fresh.iterdir()}
    expected = {"README.md": "new", "README.old.md": "one", "README.old2.md": "one"}
    assert found == expected
