# SPDX-License-Identifier: Apache-2.0
"""``lm-eval`` runs tasks on checkpoints of every format, and keeps what it found."""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from commands import assert_one_error, listing, nm_permute, prune
from helpers import ours, quantize

from nm_permute_plugin.evaluation.harness import task_results
from nm_permute_plugin.evaluation.results import read_evaluations

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{gold}}}}"
doc_to_choice: "choices"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.fixture
def tasks(tmp_path: Path, chain_rows, words, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two tasks: one of a local file, one whose file is not there."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    generator = torch.Generator().manual_seed(4)
    lines = []
    for row in chain_rows(16, 12, seed=7):
        endings = torch.randint(48, (4, 4), generator=generator)
        gold = int(endings[0, 0]) % 4
        endings[gold] = row[8:]
        choices = [words(ending) for ending in endings]
        lines.append(
            json.dumps({"query": words(row[:8]), "gold": gold, "choices": choices})
        )
    (folder / "items.jsonl").write_text("\n".join(lines) + "\n")
    for name, file in (("chain", "items.jsonl"), ("gone", "none.jsonl")):
        task = TASK.format(name=name, file=folder / file)
        (folder / f"{name}.yaml").write_text(task)
    return folder


@pytest.fixture
def pruned(
    trained_checkpoint: Path, text_file: Path, tmp_path: Path
) -> Callable[[str], Path]:
    """A factory: the trained model pruned, by a recipe that goes on so."""

    def make(then: str = "") -> Path:
        (tmp_path / "dense").symlink_to(trained_checkpoint)
        recipe = ours(method="identity", mask_structure="2:4", ignore=["lm_head"])
        (tmp_path / "recipe.yaml").write_text(recipe + then)
        result = prune(tmp_path, "--text", text_file)
        assert result.exit_code == 0, result.output
        return tmp_path / "out"

    return make


def lm_eval(folder: Path, tasks: Path, *words: object) -> Result:
    given = ["--include_path", tasks, "--device", "cpu", *words]
    return nm_permute("lm-eval", folder, *given)


@pytest.mark.parametrize("then", ["", quantize("FP8_DYNAMIC")], ids=["sparse", "fp8"])
def test_tasks_run_on_sparse_checkpoints(
    pruned: Callable[[str], Path],
    trained_checkpoint: Path,
    tasks: Path,
    tmp_path: Path,
    then: str,
) -> None:
    out = pruned(then)
    more = [
        "--dense",
        trained_checkpoint,
        "--card",
        "--output_path",
        tmp_path / "found",
    ]
    more += ["--log_samples", "--batch_size", "auto"]
    result = lm_eval(out, tasks, "--tasks", "chain", "--limit", 12, *more)
    assert result.exit_code == 0, result.output
    acc, acc_norm = read_evaluations(out).tasks
    assert (acc.task, acc.metric, acc.items) == ("chain", "acc", 12)
    assert acc_norm.metric == "acc_norm"
    assert acc.dense == pytest.approx(11 / 12, abs=0.1)
    assert 0 < acc.value <= 1
    assert acc.error is not None
    assert "|chain|" not in result.stdout  # lm-eval's own tables would say it again
    row = (
        f"| chain | acc | 12 | {acc.value:.4f} ± {acc.error:.4f} | {acc.dense:.4f} ± "
        f"{acc.dense_error:.4f} | {acc.recovery:.1%} | {acc.flips:.2%} |"
    )
    assert row in result.stdout.splitlines()
    assert row in (out / "README.md").read_text().splitlines()
    assert nm_permute("verify", out).exit_code == 0
    # What lm-eval itself wrote of both models says the same.
    files = sorted((tmp_path / "found").rglob("samples_*.jsonl"))
    assert len(files) == 2
    answers = [
        {item["doc_id"]: item["acc"] for item in map(json.loads, file.open())}
        for file in files
    ]
    assert acc.flips == sum(answers[0][i] != answers[1][i] for i in answers[0]) / 12
    means = {sum(of.values()) / 12 for of in answers}
    assert means == {acc.value, acc.dense}


def test_what_must_fail_fails_before_a_model_is_loaded(
    tiny_checkpoint, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint()
    (folder / "model.safetensors").unlink()  # loading it would be another error
    before = listing(folder)

    def refused(*words: object, message: str) -> None:
        assert_one_error(lm_eval(folder, tasks, *words), message)

    refused(message=r"give --tasks TASK; `lm-eval ls tasks` lists all")
    chain = ["--tasks", "chain"]
    refused(
        *chain, "--frobnicate", message="unrecognized arguments: --frobnicate .*lm-ev"
    )
    refused(*chain, "--limit", "few", message="--limit/-L: invalid float value: 'few'")
    refused(
        *chain, "--batch_size", "many", message="--batch_size many is neither a numb"
    )
    refused(*chain, "--model", "vllm", message="leave out --model vllm")
    refused(
        *chain, "--model_args", "dtype=float16", message="--model_args dtype says how"
    )
    refused(*chain, "--log_samples", message="--output_path")
    refused(*chain, "--wandb_args", "project=a", message="--wandb_args is not followed")
    refused(*chain, "--card", message=r"README\.md has no place")
    gone = r"the data of --tasks gone cannot be loaded: .*none\.jsonl'?$"
    refused("--tasks", "gone", message=gone)
    first = nm_permute("lm-eval", "--tasks", "chain", folder)
    assert_one_error(first, "the checkpoint stands first, before --tasks")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert_one_error(lm_eval(empty, tasks, *chain), "empty holds no checkpoint")
    assert_one_error(
        lm_eval(folder, tasks, *chain, "--dense", empty), "empty holds no ch"
    )
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "nm_permute_plugin.evaluation.harness.find_spec",
        lambda name: None if name == "lm_eval" else find(name),
    )
    remedy = re.escape("pip install '.[eval]' in the folder of")
    refused(*chain, message=remedy)
    assert listing(folder) == before


def test_tasks_of_the_hub_are_refused_in_one_line_without_it(
    tiny_checkpoint, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def offline(*args: object, **kwargs: object) -> None:  # as load_dataset fails then
        raise ConnectionError("Couldn't reach 'a/b' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    said = (
        r"--tasks chain cannot be loaded: Couldn't reach 'a/b' .*; where the hub cannot"
    )
    assert_one_error(lm_eval(tiny_checkpoint(), tasks, "--tasks", "chain"), said)


def test_what_lm_eval_asserts_is_one_line(tiny_checkpoint, tasks: Path) -> None:
    beyond = ["--samples", '{"chain": [99]}']
    result = lm_eval(tiny_checkpoint(), tasks, "--tasks", "chain", *beyond)
    assert_one_error(result, "lm-eval refuses this: Elements of --samples should be in")


@pytest.mark.slow
def test_a_task_that_nobody_knows_is_named(tiny_checkpoint, tasks: Path) -> None:
    result = lm_eval(tiny_checkpoint(), tasks, "--tasks", "chain,frobnicate")
    assert_one_error(result, "Tasks not found: frobnicate")


def test_metrics_are_read_as_lm_eval_writes_them() -> None:
    ours = {
        "results": {
            "qa": {
                "alias": "qa",
                "exact_match,strict": 0.5,
                "exact_match_stderr,strict": "N/A",
                "sample_len": 2,
            },
            "wiki": {"word_perplexity,none": 12.0, "word_perplexity_stderr,none": 0.5},
        },
        "n-shot": {"qa": 5, "wiki": 0},
        "n-samples": {"qa": {"effective": 2}},
        "higher_is_better": {"wiki": {"word_perplexity": False}},
        "samples": {
            "qa": [
                {"doc_id": 0, "filter": "strict", "exact_match": 1.0},
                {"doc_id": 1, "filter": "strict", "exact_match": 0.0},
                {"doc_id": 1, "filter": "flexible", "exact_match": 1.0},
            ],
            "wiki": [{"doc_id": 0, "filter": "none", "word_perplexity": (3.0, 4)}],
        },
    }
    theirs = json.loads(json.dumps(ours))
    theirs["samples"]["qa"][0]["exact_match"] = 0.0
    theirs["results"]["wiki"]["word_perplexity,none"] = 6.0
    match, words = task_results(ours, theirs)
    assert (match.task, match.metric) == ("qa (5-shot)", "exact_match,strict")
    assert (match.error, match.items, match.flips) == (None, 2, 0.5)
    assert match.recovery == 1.0
    assert (words.task, words.metric) == ("wiki", "word_perplexity")
    assert (words.error, words.dense, words.flips) == (0.5, 6.0, None)
    assert words.recovery is None
    assert [row.flips for row in task_results(ours)] == [None, None]
