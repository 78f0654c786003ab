# SPDX-License-Identifier: Apache-2.0
"""What the page says, of whole records and of those with parts missing."""

import json
import re
import sys
from html import unescape
from pathlib import Path

import pytest

import nm_permute_plugin as nmp
from nm_permute_plugin.checkpoint.report import EVALUATIONS, PAGE, make_page, subject_of
from nm_permute_plugin.evaluation.results import (
    FILE,
    Evaluations,
    TaskResult,
    TextResult,
    write_evaluations,
)
from nm_permute_plugin.reporting.page import write_comparison, write_page

TEXT = TextResult(
    text="test.txt", form="windows of 32 tokens", tokens=64, perplexity=20.0
)
COMPARED = TEXT.model_copy(update={"dense": 10.0, "base": 40.0, "divergence": 0.25})
TASK = TaskResult(task="arc", metric="acc", value=0.3, dense=0.4, items=99)


def words(folder: Path) -> str:
    """The words of a page, without its marks."""
    page = (folder / "nm_permute" / "report.html").read_text()
    body = page[page.index("<body>") :]
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", body)).split())


def remake(folder: Path) -> None:
    """Make a page without the pictures beside it, which takes half as long."""
    write_page(subject_of(folder), folder / PAGE)


def change(folder: Path, **fields: object) -> None:
    """Change the record; a field of None is taken out."""
    path = folder / "nm_permute" / "report.json"
    report = json.loads(path.read_text()) | fields
    kept = {name: value for name, value in report.items() if value is not None}
    path.write_text(json.dumps(kept))


def test_evaluations_are_read_where_they_are_written() -> None:
    assert EVALUATIONS == FILE


def test_a_save_leaves_a_page_and_verify_stays_good(
    tiny_model, chain_rows, tmp_path: Path, pages: None
) -> None:
    model, out = tiny_model("llama"), tmp_path / "out"
    data = nmp.read_samples(model, [{"input_ids": chain_rows(12, 24, seed=0)}], 4)
    nmp.save(model, out, nmp.prune(model, data, nmp.Settings(method="search")))
    said = words(out)
    assert "28.1 %" in said or "score" in said
    assert ".unfinished" not in said
    assert "nm-permute verify out" in said
    drawn = {path.stem for path in (out / "nm_permute" / "report").iterdir()}
    assert drawn == {"search", "retained", "sensitivity", "channels"}
    assert nmp.verify(out).good
    make_page(out)
    assert words(out) == said
    assert nmp.verify(out).good
    nmp.convert(out, tmp_path / "dense", "dense")
    assert "where dense ones take" in said
    assert "where dense ones take" not in words(tmp_path / "dense")


def test_the_page_tells_the_whole_run(learned: Path) -> None:
    said = words(learned)
    for part in ("Learning", "Search", "Recovery", "What the masks keep"):
        assert part in said
    assert "LlamaForCausalLM, 2:4, score wanda, method learned" in said
    assert "Permuting the channels moved the dense model's outputs by" in said
    assert "learn.steps: 4" in said
    assert "threads" in said
    assert "Nothing was measured on a test text yet" in said
    assert re.search(r"has a validation loss of .* regains .* % of what was lost", said)


def test_a_run_that_went_on_says_that_its_times_are_not_all(learned: Path) -> None:
    told = "what it had done before is not counted here"
    assert told not in words(learned)
    change(learned, environment={"device": "cpu", "resumed": "yes"})
    make_page(learned)
    assert told in words(learned)


def test_what_was_measured_later_comes_onto_the_page(learned: Path) -> None:
    other = TEXT.model_copy(update={"text": "other.txt"})
    write_evaluations(learned, Evaluations(texts=(other, COMPARED), tasks=(TASK,)))
    remake(learned)
    said = words(learned)
    assert "other.txt, windows of 32 tokens 64 20.00" in said
    assert "this run's 20.00 regains 50.0 % of the gap" in said
    assert "0.2500" in said
    assert "arc, acc 99 0.3000 0.4000 75.0%" in said


def test_a_plain_mask_has_a_page_without_curves(plain: Path) -> None:
    said = words(plain)
    assert "nothing was searched or learned to regain it" in said
    assert "Learning" not in said
    assert "No channel moved" in said
    drawn = {path.stem for path in (plain / "nm_permute" / "report").iterdir()}
    assert drawn == {"retained", "sensitivity"}


def test_a_record_of_an_older_version_shows_what_there_is(learned: Path) -> None:
    older = ("figures", "memory", "environment", "searched", "recovered")
    change(learned, **dict.fromkeys(older))
    make_page(learned)
    said = words(learned)
    assert "Learning" in said
    assert "What the masks keep" not in said
    # Their first loss is that of what the search found.
    assert "this run has a validation loss of" in said
    # Pictures of the page before are gone as well.
    drawn = {path.stem for path in (learned / "nm_permute" / "report").iterdir()}
    assert drawn == {"learning"}
    change(
        learned,
        **dict.fromkeys(
            json.loads((learned / "nm_permute" / "report.json").read_text())
        ),
    )
    make_page(learned)
    assert "a model" in words(learned)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("history", 3, "history"),
        ("figures", {"linears": [{"name": "a"}]}, "figures.linears.0"),
        ("retained", ["x", 1], "retained.0"),
        ("seconds", {"learn": "long"}, "seconds.learn"),
        ("history", [{"step": 0, "validation": float("nan")}], "history.0.validation"),
        ("memory", {"learn": 10**400}, "memory.learn"),
    ],
)
def test_a_damaged_record_is_named(
    learned: Path, field: str, value: object, said: str
) -> None:
    change(learned, **{field: value})
    with pytest.raises(ValueError, match=rf"report\.json is damaged \({said}.*"):
        make_page(learned)


def test_strange_numbers_and_sizes_are_no_obstacle(learned: Path) -> None:
    """Records that no run writes, but that are what they must be."""
    report = json.loads((learned / "nm_permute" / "report.json").read_text())
    report["figures"]["crop"]["after"] = ["01"]
    report["figures"]["linears"] = report["figures"]["linears"][:1]
    report["history"][1]["validation"] = -1e-9
    report["modifier"]["loss"] = 3
    change(learned, **report | {"retained": [0.0, 0.0], "seconds": {"a": 0}})
    remake(learned)
    assert "Where the channels went" not in words(learned)


def test_names_are_words_and_never_marks(learned: Path) -> None:
    evil = "<script>alert(1)</script>$x_{$ & \"'"
    report = json.loads((learned / "nm_permute" / "report.json").read_text())
    for linear in report["figures"]["linears"]:
        linear["name"] = linear["name"].replace("q_proj", evil)
    report["figures"]["crop"]["name"] = evil
    change(learned, **report | {"base_model": evil, "versions": {evil: evil}})
    write_evaluations(
        learned,
        Evaluations(texts=(COMPARED.model_copy(update={"text": evil, "form": evil}),)),
    )
    remake(learned)
    page = (learned / "nm_permute" / "report.html").read_text()
    assert "<script" not in page
    assert words(learned).count("alert(1)") >= 4
    out = learned.parent / "several.html"
    write_comparison([subject_of(learned, evil), subject_of(learned, evil)], out)
    assert "<script" not in out.read_text()


def test_a_page_loads_nothing(learned: Path) -> None:
    page = (learned / "nm_permute" / "report.html").read_text()
    assert "default-src 'none'" in page
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert sources
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)


def test_without_matplotlib_a_save_succeeds_and_one_line_says_so(
    tiny_model,
    chain_rows,
    tmp_path: Path,
    pages: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from loguru import logger

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    lines: list[str] = []
    sink = logger.add(lambda line: lines.append(str(line)), level="WARNING")
    model, out = tiny_model("llama"), tmp_path / "out"
    data = nmp.read_samples(model, [{"input_ids": chain_rows(12, 24, seed=0)}], 4)
    nmp.save(model, out, nmp.prune(model, data, nmp.Settings(method="identity")))
    logger.remove(sink)
    assert [line for line in lines if "pip install matplotlib" in line] == lines
    assert len(lines) == 1
    assert not (out / "nm_permute" / "report.html").exists()
    assert "figures" in json.loads((out / "nm_permute" / "report.json").read_text())
    assert nmp.verify(out).good


def test_a_budget_is_told_with_its_choice_and_the_others(
    tiny_model, chain_rows, tmp_path: Path, pages: None
) -> None:
    model, out = tiny_model("llama"), tmp_path / "out"
    data = nmp.read_samples(model, [{"input_ids": chain_rows(12, 24, seed=0)}], 4)
    settings = nmp.Settings(method="identity", budget={"dense_share": 0.3})
    nmp.save(model, out, nmp.prune(model, data, settings))
    said, budget = words(out), subject_of(out).run.budget
    assert f"{budget.chosen.dense_share:.1%} of the weights that could be" in said
    dense = {n for group in budget.groups if group.stays_dense for n in group.linears}
    kinds = ["q_proj, k_proj, v_proj", "o_proj", "gate_proj, up_proj", "down_proj"]
    assert [line[0] for line in budget.table.lines] == kinds
    for kind, layers, _ in budget.table.lines:
        last = kind.rpartition(" ")[2]
        there = [name.split(".")[2] for name in dense if name.endswith(last)]
        assert layers == (", ".join(sorted(there)) or "none")
    assert "if more or fewer groups of linears stay dense" in said
    assert f"{len(dense)} of the 14 linears" in (out / "README.md").read_text()
    assert "(asked for: dense_share 0.3): the loss on validation rows is" in said
    assert "learning" not in budget.words


def test_a_budget_of_learned_masks_tells_before_and_after(
    tiny_model, chain_rows, tmp_path: Path, pages: None
) -> None:
    model, out = tiny_model("llama"), tmp_path / "out"
    data = nmp.read_samples(model, [{"input_ids": chain_rows(12, 24, seed=0)}], 4)
    learn = {"learn": {"steps": 2}, "search": {"rounds": 2}}
    settings = nmp.Settings(budget={"max_loss_increase": 1e-4}, **learn)
    nmp.save(model, out, nmp.prune(model, data, settings))
    run = subject_of(out).run
    said, budget = words(out), run.budget
    assert budget.words in said
    assert "(asked for: max_loss_increase 0.0001). Before learning, by the" in said
    assert len(budget.learned) > 1
    last = budget.learned[-1].validation
    assert f"After the masks of what stays sparse were learned it is {last:.4f}" in said
    assert f"is {last:.4f}, {last - budget.dense_loss:.4f} above the dense" in said
    assert last - budget.dense_loss <= 1e-4
    assert "before learning, and stars are after it" in said
