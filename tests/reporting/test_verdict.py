# SPDX-License-Identifier: Apache-2.0
"""The one sentence of a page claims what the record and the evaluations tell, no more."""

import pytest

from nm_permute_plugin.reporting.compared import table
from nm_permute_plugin.reporting.measured import Measured
from nm_permute_plugin.reporting.run import Run
from nm_permute_plugin.reporting.subject import Subject

KL = {"loss": {"divergence": 1.0, "cross_entropy": 0.0}}
WANDA = {"mask_structure": "2:4", "score": "wanda", "method": "learned", "prune": True}
SEARCHED = [{"round": 0, "validation": 2.0}, {"round": 3, "validation": 1.8}]
LEARNED = [{"step": 0, "validation": 1.8}, {"step": 5, "validation": 0.5}]
RECOVERED = {"stage": "blocks", "validation": [0.5, 0.4], "kept": True}


def run(settings: dict[str, object] | None = None, **fields: object) -> Run:
    given = {"retained": [0.8, 0.85], "searched": SEARCHED, "history": LEARNED}
    modifier = WANDA | KL | (settings or {})
    return Run.model_validate({"modifier": modifier} | given | fields)


def verdict(of: Run, *texts: dict[str, object]) -> str:
    form = {"text": "t.txt", "form": "windows of 8 tokens"}
    measured = Measured.model_validate({"texts": [form | text for text in texts]})
    return Subject("out", of, measured, (50, 80)).verdict


@pytest.mark.parametrize(
    ("of", "said"),
    [
        (run(), "loses 20.0 % of the wanda score and has a validation loss of 2.000; "
                "this run brought it to 0.500, which regains 75.0 %"),
        (run(recovered=[RECOVERED]), "brought it to 0.400, which regains 80.0 %"),
        (run(recovered=[RECOVERED | {"kept": False}]), "brought it to 0.500"),
        (run(recovered=[RECOVERED | {"rounded": True}]), "brought it to 0.500"),
        (run(searched=[]), "this run has a validation loss of 0.500"),
        (run({"prune": False}), "pruned nothing (a 2:4 mask would lose 20.0 %"),
        (run({"method": "identity"}, searched=[], history=[]),
         "nothing was searched or learned to regain it"),
        (Run(), "The weights are N:M by the plain mask"),
    ],
    ids=["learned", "recovered", "dropped", "rounded", "older", "unpruned", "identity",
         "empty"],
)  # fmt: skip
def test_what_was_lost_and_regained(of: Run, said: str) -> None:
    assert said in verdict(of)


def test_a_loss_that_is_not_0_for_the_dense_model_has_no_share() -> None:
    text = run({"loss": {"divergence": 1.0, "cross_entropy": 0.5}})
    assert "brought it to 0.500;" in verdict(text)
    assert "regains" not in verdict(text)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ([{"perplexity": 20.0}], "this run brought it to 0.500"),
        ([{"perplexity": 20.0, "dense": 10.0}], "20.00, 2.00 times as much"),
        (
            [{"perplexity": 20.0, "dense": 10.0, "base": 40.0}],
            "regains 50.0 % of the gap",
        ),
        ([{"perplexity": 9.0, "dense": 10.0, "base": 8.0}], "9.00, 0.90 times as much"),
    ],
    ids=["alone", "dense", "base", "no gap"],
)
def test_a_text_tells_more_than_the_validation(texts: list[dict], said: str) -> None:
    assert said in verdict(run(), *texts)


def test_what_serving_costs() -> None:
    assert "because the permutation is folded" in verdict(run(moved=["hidden.0"]))
    assert "folded" not in verdict(run(moved=[]))
    assert "0 kB on disk where dense ones take 0 kB" in verdict(run())
    assert "nothing to fold" in Subject("out", run(moved=[], fold_error=0.0)).fold


@pytest.mark.parametrize(
    ("bases", "said"),
    [
        ((40.0, None), "(dense 10.00, without a permutation 40.00)"),
        ((40.0, 50.0), "(dense 10.00)"),
    ],
)
def test_runs_stand_beside_the_plain_mask_where_one_is_known(
    bases: tuple[float | None, ...], said: str
) -> None:
    subjects = []
    for name, base in zip("ab", bases, strict=True):
        text = {"text": "t.txt", "form": "windows", "perplexity": 20.0, "dense": 10.0}
        measured = Measured.model_validate({"texts": [text | {"base": base}]})
        subjects.append(Subject(name, run(), measured))
    told = [line[0] for line in table(subjects).lines]
    assert f"perplexity on t.txt, windows {said}" in told
