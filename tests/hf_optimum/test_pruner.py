# SPDX-License-Identifier: Apache-2.0
"""``NMPruner`` does what ``nm_permute_plugin`` does, with the face of optimum."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from optimum.quantization_base import OptimumQuantizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import nm_permute_plugin as nmp
from nm_permute_plugin.optimum import NMConfig, NMPruner

SEARCH = {"method": "search", "search": {"rounds": 1}}


@pytest.fixture
def samples(chain_rows) -> list[dict[str, list[int]]]:
    """Twelve tokenised samples of 32 tokens."""
    return [{"input_ids": row} for row in chain_rows(12, 32, seed=4).tolist()]


@pytest.fixture
def texts(chain_rows, words) -> list[str]:
    """Twelve texts of 32 tokens."""
    return [words(row) for row in chain_rows(12, 32, seed=4)]


def assert_same_files(first: Path, second: Path) -> None:
    stored = [load_file(folder / "model.safetensors") for folder in (first, second)]
    assert stored[0].keys() == stored[1].keys()
    assert [x for x in stored[0] if not torch.equal(*(s[x] for s in stored))] == []


def test_it_is_a_quantizer_of_optimum() -> None:
    assert issubclass(NMPruner, OptimumQuantizer)


def test_tokenised_samples_prune_as_the_package_does(
    tiny_model, samples, chain_rows, tmp_path: Path
) -> None:
    fields = {"batch_size": 4, "learn": {"steps": 2}, "search": {"rounds": 1}}
    model = tiny_model("llama")
    data = nmp.read_samples(model, [{"input_ids": chain_rows(12, 32, seed=4)}], 4)
    nmp.save(model, tmp_path / "ours", nmp.prune(model, data, nmp.Settings(**fields)))

    model = tiny_model("llama")
    pruner = NMPruner(dataset=samples, **fields)
    assert pruner.prune_model(model) is model
    pruner.save(model, tmp_path / "optimum")
    assert_same_files(tmp_path / "ours", tmp_path / "optimum")
    assert nmp.verify(tmp_path / "optimum").good


def test_texts_of_a_folders_model_become_a_checkpoint_with_its_tokenizer(
    tiny_checkpoint, texts, samples, tmp_path: Path, assert_exactly
) -> None:
    dense, out = tiny_checkpoint(), tmp_path / "out"
    fields = {"sequence_length": 32, **SEARCH}
    NMPruner.from_pretrained(dense).quantize(out, dataset=texts, **fields)
    assert nmp.verify(out).good
    assert_exactly(AutoModelForCausalLM.from_pretrained(out))
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer(texts[0]).input_ids == samples[0]["input_ids"]

    pruner = NMPruner.from_pretrained(dense)
    pruner.quantize(tmp_path / "again", config=NMConfig(dataset=samples, **SEARCH))
    assert_same_files(out, tmp_path / "again")


def test_it_is_made_again_from_what_it_says(texts) -> None:
    said = json.loads(json.dumps(NMPruner(dataset=texts, rows=5, **SEARCH).to_dict()))
    assert NMPruner.from_dict(said).config == NMConfig(dataset=texts, rows=5, **SEARCH)


def test_no_more_rows_than_asked_for(tiny_model, samples, tmp_path: Path) -> None:
    model = tiny_model("llama")
    pruner = NMPruner(dataset=samples, rows=9, **SEARCH)
    pruner.prune_model(model)
    batches = pruner._batches(model, None)
    assert [len(batch["input_ids"]) for batch in batches] == [1] * 9


def test_a_file_is_read_as_the_command_reads_it(
    tiny_model, tiny_checkpoint, texts, tmp_path: Path
) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "texts.jsonl").write_text(lines)
    dense, model = tiny_checkpoint(), tiny_model("llama")
    named = NMPruner(dataset=str(tmp_path / "texts.jsonl"), **SEARCH)
    given = NMPruner(dataset=texts, **SEARCH)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    batches = [pruner._batches(model, tokenizer) for pruner in (named, given)]
    rows = [[batch["input_ids"].tolist() for batch in found] for found in batches]
    assert rows[0] == rows[1]
    assert len(rows[0]) == len(texts)


@pytest.mark.parametrize(
    ("name", "message"),
    [("nobody/nothing", "nobody/nothing"), ("no_such.jsonl", "does not exist; give a")],
)
def test_a_data_set_that_cannot_be_had_is_one_line(
    tiny_checkpoint, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    pruner = NMPruner.from_pretrained(tiny_checkpoint())
    with pytest.raises((ValueError, OSError), match=message) as error:
        pruner.quantize("never", dataset=name, **SEARCH)
    assert "\n" not in str(error.value)
    assert not Path("never").exists()


def test_what_cannot_be_is_said_before_any_work(
    tiny_checkpoint, tiny_model, texts, tmp_path: Path
) -> None:
    dense, model = tiny_checkpoint(), tiny_model("llama")
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("mine")
    loaded = NMPruner.from_pretrained(dense)
    before = {name: p.clone() for name, p in loaded._loaded.state_dict().items()}
    for message, call in {
        "no calibration data: give dataset=": lambda: NMPruner().prune_model(model),
        "give prune_model.* the model's tokenizer": lambda: NMPruner(
            dataset=texts
        ).prune_model(model),
        "call prune_model before save": lambda: NMPruner().save(model, tmp_path / "x"),
        "there is no model to prune": lambda: NMPruner(dataset=texts).quantize("x"),
        "file_prefix='a'.*leave file_prefix out": lambda: loaded.quantize("x", "a"),
        "file_name='a'": lambda: NMPruner.from_pretrained(dense, "a"),
        r"or its fields \(score\), and not both": lambda: NMPruner(
            NMConfig(), score="ria"
        ),
        f"{full} ": lambda: loaded.quantize(
            full, dataset=texts, sequence_length=32, **SEARCH
        ),
    }.items():
        with pytest.raises((ValueError, OSError), match=message):
            call()
    after = loaded._loaded.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [file.name for file in full.iterdir()] == ["file"]


def test_a_model_is_not_pruned_twice(tiny_checkpoint, texts, tmp_path: Path) -> None:
    pruner = NMPruner.from_pretrained(tiny_checkpoint())
    pruner.quantize(tmp_path / "a", dataset=texts, sequence_length=32, **SEARCH)
    with pytest.raises(ValueError, match="pruned already: load it again"):
        pruner.quantize(tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_without_optimum_one_line_says_how_to_get_it() -> None:
    code = (
        "import sys; sys.modules['optimum.quantization_base'] = None\n"
        "try:\n    import nm_permute_plugin.optimum\n"
        "except ModuleNotFoundError as error:\n    print(error)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert run.stdout == (
        "nm_permute_plugin.optimum needs optimum, which is not installed: "
        "pip install '.[optimum]' in the folder of nm-permute-plugin's repository\n"
    )
