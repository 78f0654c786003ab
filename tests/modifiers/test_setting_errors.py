# SPDX-License-Identifier: Apache-2.0
"""A setting that is not taken says what was got, what is taken, and what to write."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from nm_permute_plugin.modifiers import LearnablePermutationModifier
from nm_permute_plugin.pruning.settings import Settings
from nm_permute_plugin.pruning.settings.errors import one_line

CASES = {
    "mask_structure: 2:4": 'mask_structure: write it in quotes, mask_structure: "2:4"; '
    "without them YAML reads the number 124",
    "mask_structure: 4:8": 'mask_structure: write it in quotes, mask_structure: "4:8"; '
    "without them YAML reads the number 248",
    "mask_structure: 7": 'mask_structure: write it in quotes, mask_structure: "2:4"; '
    "without them YAML reads the number 7",
    "mask_structure: yes": "mask_structure: must be text, in quotes, got true",
    "mask_struct: '2:4'": "mask_struct: there is no such field; did you mean "
    "mask_structure?",
    "iterations: 3": "iterations: there is no such field; there are "
    + ", ".join(Settings.model_fields),
    "learn: {step: 1}": "learn.step: there is no such field; did you mean steps?",
    "learn: {multipliers: {rat: 1}}": "learn.multipliers.rat: there is no such field; "
    "did you mean rate?",
    "method: learnt": "method: must be 'learned', 'search' or 'identity', got 'learnt'; "
    "did you mean learned?",
    "score: wand": "score: must be 'wanda', 'ria' or 'magnitude', got 'wand'; did you "
    "mean wanda?",
    "format: sparse-24bitmask": "format: must be 'auto', 'dense', 'sparse-24-bitmask' or "
    "'sparse-bitmask', got 'sparse-24bitmask'; did you mean sparse-24-bitmask or "
    "sparse-bitmask?",
    "spaces: [hiden]": "spaces.0: must be 'residual', 'hidden' or 'value', got 'hiden'; "
    "did you mean hidden?",
    "recover: end-to-end": "recover.stages.0: must be 'rescale', 'blocks' or "
    "'end_to_end', got 'end-to-end'; did you mean end_to_end?",
    "learn: 200": "learn: is a group of fields, got 200: write learn: {stages: ...}; its "
    "fields are stages, steps, multipliers, swaps, published",
    "learn: {steps: many}": "learn.steps: must be a whole number, got 'many'",
    "learn: {steps: 0}": "learn.steps: must be greater than or equal to 1, got 0",
    "learn: {steps: [1, x]}": "learn.steps.1: must be a whole number, got 'x'",
    "search: {rounds: null}": "search.rounds: must be a whole number, got null",
    "spaces: []": "spaces: must name at least one, got []",
    "spec: {a.weight: 1}": "spec.a.weight: must be text, in quotes, got 1",
    "ignore: ['re:[']": "ignore: 're:[' is no regular expression: unterminated character "
    "set at position 0; write a backslash before a sign that stands for itself",
    "loss: {divergence: 0}": "loss: all weights of the loss are 0: nothing would be "
    "learned",
    "learn: {swaps: {share: 0.5}}": "learn.swaps is set, and nothing reads it with "
    "stages: ['multipliers']; leave it out",
    "mask_structure: 2/4": "mask_structure: the pattern '2/4' is not of the form "
    "'N:M', '2:4' for example",
    "{mask_structure: '4:2', learn: {stages: [swaps], swaps: {block_size: 6}}}": ""
    "mask_structure: 4:2 is no sparsity pattern: N:M keeps N of every M weights, so 0 < N "
    "< M is needed. Use 2:4 or 4:8, say.",
    "{method: learnt, seed: x}": "method: must be 'learned', 'search' or 'identity', got "
    "'learnt'; did you mean learned?; seed: must be a whole number, got 'x'",
}


@pytest.mark.parametrize("kind", [Settings, LearnablePermutationModifier])
@pytest.mark.parametrize(("body", "message"), CASES.items(), ids=CASES)
def test_a_setting_that_is_not_taken_leads_to_the_remedy(
    kind: type[Settings], body: str, message: str
) -> None:
    fields: dict[str, Any] = yaml.safe_load(body)
    with pytest.raises(ValidationError) as refusal:
        kind(**fields)
    assert one_line(refusal.value) == message
    # What `oneshot` and a notebook show says the same, a field a paragraph.
    shown = " ".join(str(refusal.value).split())
    for found in refusal.value.errors():
        assert " ".join(found["msg"].split()) in shown


@pytest.mark.parametrize("written", [str, Path], ids=["text", "path"])
def test_a_spec_may_be_a_file(tmp_path: Path, written: type) -> None:
    lines = {"model.norm.weight": "residual"}
    file = tmp_path / "spec.yaml"
    file.write_text(yaml.safe_dump(lines))
    settings = Settings(spec=written(file))
    assert settings == Settings(spec=lines)
    # What is written down of the run holds the lines and needs no file.
    assert settings.model_dump()["spec"] == lines


def test_a_spec_file_that_is_no_spec_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"spec file .*none\.yaml does not exist"
    ):
        Settings(spec=str(tmp_path / "none.yaml"))
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ValidationError, match=r"list\.yaml holds no spec"):
        Settings(spec=str(tmp_path / "list.yaml"))
