# SPDX-License-Identifier: Apache-2.0
"""The benchmark of quality as it is called."""

import json
from pathlib import Path

import pytest

import quality
from nm_permute_plugin.pruning import solving


@pytest.fixture
def run(arguments: list[str], text_file, tmp_path: Path, capsys):
    """A factory: measure some methods into a file; the record and what was printed."""

    def measure(out: str, *options: str) -> tuple[dict, str]:
        test = ["--test", text_file("test", 1000)]
        sizes = [*test, "--window", "32", "--windows", "6", "--steps", "2"]
        options += ("--validation-share", "0.1", "--out", str(tmp_path / out))
        quality.main([*arguments, *sizes, *options])
        return json.loads((tmp_path / out).read_text()), capsys.readouterr().out

    return measure


def test_methods_are_measured_over_seeds(run) -> None:
    record, printed = run(
        "all.json", "--methods", "wanda", "search", "free-mask", "--seeds", "0", "1"
    )
    runs = [(result["method"], result["seed"]) for result in record["results"]]
    both = [(method, seed) for seed in (0, 1) for method in ("search", "free-mask")]
    assert runs == [("wanda", 0), *both]
    wanda, *others = (result["perplexity"] for result in record["results"])
    assert record["dense"] < wanda
    assert len(set(others)) > 1
    assert record["results"][-1]["tokens"] == 2 * 4 * 32
    assert record["results"][-1]["settings"]["learn"]["steps"] == 2
    assert "| search | 2 |" in printed


def test_runs_are_judged_by_fidelity_and_by_a_task(run, tmp_path: Path) -> None:
    items = ["w01 w02 w03", "1", "w04 w05", "w06", "w07 w08 w09", "w10"] * 5
    (tmp_path / "items.raw").write_text("\n".join(items) + "\n")
    task = ["--hellaswag", str(tmp_path / "items.raw"), "--items", "4"]
    methods = ["--methods", "wanda", "search", "--seeds", "0", "1"]
    record, printed = run("judged.json", *methods, *task)
    assert len(record["dense_hellaswag"]["acc_norm"]) == 4
    for result in record["results"]:
        assert result["divergence"] > 0
        assert 0 < result["agreement"] < 1
        assert 0 < result["flips"] < 1
        assert len(result["hellaswag"]["acc"]) == 4
    assert "| method | seeds | KL divergence |" in printed
    assert "| dense |  |  |  |  | " in printed
    assert "hellaswag" not in printed.split("| method")[0].split("dense perplexity")[1]
    without = ["--resume", *methods]
    with pytest.raises(
        ValueError, match="hellaswag None and .*items.raw|items.raw and N"
    ):
        run("judged.json", *without)


def test_a_setting_is_varied_after_one_learning(run, monkeypatch) -> None:
    learned = []
    learn = solving.learn
    monkeypatch.setattr(
        solving, "learn", lambda *args: (learned.append(args), learn(*args))[1]
    )
    methods = ["--methods", "learned", "learned+end_to_end", "--seeds", "0"]
    steps = "learned+end_to_end.recover.end_to_end.steps"
    record, printed = run(
        "varied.json", *methods, "--recover-steps", "1", "--vary", f"{steps}=[2, 3]"
    )
    recovered = [f"learned+end_to_end{end}" for end in ("", ", steps 2", ", steps 3")]
    names = [result["method"] for result in record["results"]]
    assert names == ["learned", *recovered]
    assert len(learned) == 1
    histories = [r["recovered"][0]["history"] for r in record["results"][1:]]
    assert [history[-1]["step"] for history in histories] == [1, 2, 3]
    assert "| learned+end_to_end, steps 3 | 1 |" in printed


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("learned.recover.end_to_end.steps=[2]", "nothing in learned reads"),
        ("learned.learn.steps=2", "give a list of values"),
    ],
)
def test_what_cannot_be_varied_is_refused(run, said: str, answer: str) -> None:
    with pytest.raises(ValueError, match=answer):
        run("none.json", "--methods", "learned", "--vary", said)


@pytest.mark.slow
def test_sparsegpt_survives_the_disk(run) -> None:
    methods = ["wanda", "sparsegpt", "learned+sparsegpt"]
    record, _ = run("host.json", "--methods", *methods, "--seeds", "0")
    wanda, *updated = (result["perplexity"] for result in record["results"])
    assert record["dense"] < min(updated)
    assert max(updated) < 2 * wanda
    assert record["results"][-1]["settings"]["learn"]["stages"] == ["swaps"]


def test_stopped_run_is_resumed(run, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = run("part.json", "--methods", "wanda")
    ran: list[str] = []
    prune = quality.prune
    monkeypatch.setattr(
        quality, "prune", lambda *args: (ran.append(args[2]), prune(*args))[1]
    )
    methods = ["--methods", "wanda", "search", "--seeds", "0"]
    whole, _ = run("part.json", *methods, "--resume")
    assert ran == ["search"]
    assert whole["results"][0] == first["results"][0]
    with pytest.raises(ValueError, match="pattern 2:4 and 4:8|pattern 4:8 and 2:4"):
        run("part.json", *methods, "--resume", "--pattern", "4:8")


def test_a_stream_is_measured_as_published(run, tmp_path: Path) -> None:
    wanda = ["--methods", "wanda"]
    plain, said = run("plain.json", *wanda)
    assert "tested on windows of 32 tokens\n" in said
    stream, said = run("stream.json", *wanda, "--stream")
    assert "tested on one stream in windows of 32 tokens\n" in said
    # This tokenizer adds nothing to a text.
    assert stream["dense"] == plain["dense"]
    with pytest.raises(ValueError, match="stream True and False|stream False and True"):
        run("stream.json", *wanda, "--resume")
    # Records from before there was a choice are of streams.
    del stream["arguments"]["stream"]
    (tmp_path / "old.json").write_text(json.dumps(stream))
    assert run("old.json", *wanda, "--resume", "--stream")[0]["results"]


def test_parts_of_a_run_are_merged(
    run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("wanda", "search"):
        run(f"{name}.json", "--methods", name, "--seeds", "0")
    parts = [str(tmp_path / f"{name}.json") for name in ("wanda", "search")]
    whole, picture = tmp_path / "whole.json", tmp_path / "gaps.png"
    quality.main(["--merge", *parts, "--out", str(whole), "--plot", str(picture)])
    record = json.loads(whole.read_text())
    assert [result["method"] for result in record["results"]] == ["wanda", "search"]
    assert "| search | 1 |" in capsys.readouterr().out
    assert picture.stat().st_size > 0


def test_model_and_texts_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        quality.main(["--methods", "wanda"])
    assert "give a model, --train and --test, or --merge" in capsys.readouterr().err


def test_change_that_nothing_reads_is_refused(run) -> None:
    change = "learned.learn.steps=3"
    with pytest.raises(ValueError, match="nothing in wanda reads this"):
        run("none.json", "--methods", "wanda", "--set", change)


def test_text_that_fills_no_row_is_refused(run) -> None:
    with pytest.raises(ValueError, match="has 768 tokens, fewer than two rows of 4096"):
        run("none.json", "--methods", "wanda", "--sequence-length", "4096")


def test_a_budget_is_told_before_and_after_its_own_learning(run) -> None:
    vary = [
        f"learned.budget.{goal}"
        for goal in ("dense_share=[0.5]", "max_loss_increase=[1e-6]")
    ]
    methods = ["--methods", "learned", "--seeds", "0", "--vary", *vary]
    record, _ = run("budget.json", *methods)
    free, share, bounded = record["results"]
    assert free["budget"] is None
    assert 0 < share["budget"]["chosen"]["dense_share"] <= 0.5
    assert share["budget"]["reached"] <= share["budget"]["chosen"]["validation"]
    assert share["tokens"] == free["tokens"] == 2 * 4 * 32
    learned = bounded["budget"]["learned"]
    assert learned[0]["validation"] == min(e["validation"] for e in free["history"])
    assert learned[-1]["dense_share"] > 0
    assert bounded["tokens"] == len(learned) * free["tokens"]
