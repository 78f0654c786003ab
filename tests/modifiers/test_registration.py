# SPDX-License-Identifier: Apache-2.0
"""Recipes find the modifier however, and however often, the two packages are imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FOUND = """
from llmcompressor.recipe import Recipe
text = '''
prune_stage:
  permutation_modifiers:
    LearnablePermutationModifier:
      method: search
'''
(modifier,) = Recipe.create_instance(text).modifiers
assert type(modifier).__module__ == "nm_permute_plugin.modifiers.permutation"
assert modifier.method == "search"
import importlib.machinery, sys
import llmcompressor
assert type(llmcompressor.__loader__) is importlib.machinery.SourceFileLoader
assert llmcompressor.__spec__.loader is llmcompressor.__loader__
assert not [f for f in sys.meta_path if getattr(f, "host", "") == "llmcompressor"]
print("found")
"""

BEFORE = {
    "host first, twice": """
import importlib, llmcompressor, nm_permute_plugin
importlib.reload(nm_permute_plugin)
""",
    "plugin first": """
import importlib, nm_permute_plugin
from llmcompressor.modifiers.factory import ModifierFactory
assert "LearnablePermutationModifier" in ModifierFactory._registered_registry
importlib.reload(nm_permute_plugin)
""",
    "imported anew, as tests and notebooks do": """
import sys
import nm_permute_plugin
for name in [n for n in sys.modules if n.startswith("nm_permute_plugin")]:
    del sys.modules[name]
import nm_permute_plugin
""",
    "probed, and imported twice": """
import importlib, importlib.util
import nm_permute_plugin
importlib.reload(nm_permute_plugin)
for _ in range(2):
    # transformers, for one, asks like this whether a package is installed
    spec = importlib.util.find_spec("llmcompressor")
    assert spec is not None and spec.submodule_search_locations
import llmcompressor
""",
}


def python(
    code: str, *arguments: Path, flags: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *flags, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


@pytest.mark.slow
@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
def test_a_recipe_finds_the_modifier(before: str) -> None:
    run = python(before + FOUND)
    assert run.stdout.splitlines()[-1:] == ["found"], run.stderr


def test_a_machine_without_the_host_says_so_as_before() -> None:
    # -S: without site-packages there is no llm-compressor
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import importlib.util, nm_permute_plugin\n"
        "assert importlib.util.find_spec('llmcompressor') is None\n"
        "try:\n    import llmcompressor\n"
        "except ModuleNotFoundError as error:\n    print(error.name)"
    )
    run = python(code, flags=("-S",))
    assert run.stdout.strip() == "llmcompressor", run.stderr


def test_a_host_that_fails_to_import_fails_as_before(tmp_path: Path) -> None:
    # A stand-in for a broken installation; the real one is not ours to break.
    (tmp_path / "llmcompressor").mkdir()
    (tmp_path / "llmcompressor" / "__init__.py").write_text("raise OSError('broken')")
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]\n"
        "import nm_permute_plugin\n"
        "for _ in range(2):\n"
        "    try:\n        import llmcompressor\n"
        "    except OSError as error:\n        print(error)\n"
        "assert 'llmcompressor' not in sys.modules"
    )
    run = python(code, flags=("-S",))
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["broken", "broken"]


def test_another_transformers_is_left_as_it_is(tmp_path: Path) -> None:
    # A stand-in for transformers 4, which has no loader that can be extended.
    package = tmp_path / "transformers" / "quantizers"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("")
    (package / "__init__.py").write_text("from .auto import NAME")
    (package / "auto.py").write_text("NAME = 4")
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]\n"
        "import nm_permute_plugin, transformers.quantizers\n"
        "print(transformers.quantizers.NAME)"
    )
    run = python(code, flags=("-S",))
    assert run.stdout.strip() == "4", run.stderr
    assert "cannot read sparse checkpoints with this version" in run.stderr
    assert "pip install 'transformers>=" in run.stderr
