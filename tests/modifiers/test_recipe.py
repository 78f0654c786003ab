# SPDX-License-Identifier: Apache-2.0
"""A recipe that llm-compressor would read in part is refused, and the file is named."""

from pathlib import Path

import pytest

from nm_permute_plugin.modifiers.recipe import read_recipe

OURS = """
  permutation_modifiers:
    LearnablePermutationModifier:
      method: search
"""
WANDA = """
  sparsity_modifiers:
    WandaPruningModifier:
      sparsity: 0.5
"""


@pytest.fixture
def written(tmp_path: Path):
    """A factory: the path of a recipe with this text."""

    def write(text: str) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize(
    "text",
    [f"prune_stage:{OURS}", f"a_stage:{OURS}b_stage:{WANDA}", f"a_stage:{OURS}{WANDA}"],
    ids=["ours alone", "two stages", "two groups"],
)
def test_a_whole_recipe_is_read_word_for_word(written, text: str) -> None:
    assert read_recipe(written(text)) == text


REFUSED = {
    "a stage without _stage": (f"prune:{OURS}", "leave out LearnablePermutationM"),
    "a group without _modifiers": (
        f"prune_stage:{OURS}".replace("permutation_modifiers", "permutation"),
        "leave out LearnablePermutationModifier",
    ),
    "a flat recipe": (
        "LearnablePermutationModifier:\n  method: search\n",
        "leave out LearnablePermutationModifier",
    ),
    "a list of modifiers": (
        "prune_stage:\n  permutation_modifiers:\n"
        "    - LearnablePermutationModifier: {method: search}\n",
        "leave out LearnablePermutationModifier",
    ),
    "another modifier dropped": (
        f"prune_stage:{OURS}then:{WANDA}",
        "leave out WandaPruningModifier",
    ),
    "the second of two dropped": (
        f"a_stage:{OURS}{WANDA}then:{WANDA}",
        "leave out WandaPruningModifier",
    ),
    "an empty body": (
        "prune_stage:\n  permutation_modifiers:\n    LearnablePermutationModifier:\n",
        "LearnablePermutationModifier has an empty body",
    ),
    "none of ours": (
        f"prune_stage:{WANDA}",
        "holds no LearnablePermutationModifier .it holds WandaPruningModifier",
    ),
    "no modifier at all": ("prune_stage: {}\n", "it holds nothing"),
    "not YAML": ("prune_stage: [1, 2", "is no YAML"),
    "a word": ("hello", "holds no stages"),
    "a list": ("- a\n- b\n", "holds no stages"),
    "an empty file": ("", "holds no stages"),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_a_recipe_that_would_be_read_in_part_is_refused(
    written, text: str, message: str
) -> None:
    with pytest.raises(ValueError, match=rf"mine\.yaml.*{message}"):
        read_recipe(written(text))


NEAR = {
    "a misspelt modifier": (
        f"prune_stage:{OURS}".replace("Modifier:", "Modifer:"),
        r"no modifier LearnablePermutationModifer; did you mean LearnablePermutationMod",
    ),
    "half a modifier": (
        f"prune_stage:{OURS}".replace("PermutationModifier", "Permutation"),
        r"no modifier LearnablePermutation; did you mean LearnablePermutationModifier\?",
    ),
    "a misspelt modifier of the host": (
        f"a_stage:{OURS}{WANDA}".replace("WandaPruning", "WandaPruner"),
        r"no modifier WandaPrunerModifier; did you mean WandaPruningModifier",
    ),
    "a modifier like none": (
        f"a_stage:{OURS}{WANDA}".replace("WandaPruningModifier", "Xyz"),
        r"no modifier Xyz; there are .*LearnablePermutationModifier.*WandaPruningModif",
    ),
    "a misspelt field": (
        f"prune_stage:{OURS}".replace("method", "methud"),
        r"LearnablePermutationModifier: methud: there is no such field; did you mean "
        r"method\?",
    ),
    "a misspelt field of the host": (
        f"a_stage:{OURS}{WANDA}".replace("sparsity:", "sparsty:"),
        r"WandaPruningModifier: .*sparsty: there is no such field; did you mean sparsity",
    ),
    "a pattern without quotes": (
        f"prune_stage:{OURS}      mask_structure: 2:4\n",
        r'write it in quotes, mask_structure: "2:4"',
    ),
    "a list of fields": (
        f"prune_stage:{OURS}".replace("method", "- method"),
        r"LearnablePermutationModifier takes fields, 'method: search' for example",
    ),
    "a field twice": (
        f"prune_stage:{OURS}      method: learned\n",
        r"'method' stands twice",
    ),
}


@pytest.mark.parametrize(("text", "message"), NEAR.values(), ids=NEAR)
def test_a_mistake_leads_to_the_remedy_in_one_line(
    written, text: str, message: str
) -> None:
    with pytest.raises(ValueError, match=rf"recipe .*mine\.yaml.*{message}") as refusal:
        read_recipe(written(text))
    assert "\n" not in str(refusal.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        read_recipe(tmp_path / "none.yaml")
