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


def test_an_unknown_modifier_is_refused(written) -> None:
    text = f"prune_stage:{OURS}".replace("LearnablePerm", "LearnedPerm")
    with pytest.raises(ValueError, match="LearnedPermutationModifier"):
        read_recipe(written(text))


def test_a_misspelt_field_is_refused(written) -> None:
    text = f"prune_stage:{OURS}".replace("method", "methud")
    with pytest.raises(ValueError, match="methud"):
        read_recipe(written(text))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        read_recipe(tmp_path / "none.yaml")
