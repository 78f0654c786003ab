# SPDX-License-Identifier: Apache-2.0
"""A vLLM that has lost a name is named in one line; a stub stands for vLLM."""

import ast
import importlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

MODULE = "nm_permute_plugin.serving.vllm_names"
SERVING = Path(importlib.import_module("nm_permute_plugin.serving").__path__[0])
IMPORTS = [
    (node.module, alias.name)
    for node in ast.walk(ast.parse((SERVING / "vllm_names.py").read_text()))
    if isinstance(node, ast.ImportFrom) and str(node.module).startswith("vllm")
    for alias in node.names
]
MEMBERS = {
    "CompressedTensorsConfig": (
        *("apply_vllm_mapper", "from_config", "get_quant_method"),
        "override_quantization_method",
    ),
    "LinearMethodBase": ("apply", "create_weights", "process_weights_after_loading"),
    "RoutedExperts": ("weight_loader",),
    "UnquantizedFusedMoEMethod": (
        *("apply", "create_weights", "process_weights_after_loading"),
    ),
    "WeightsMapper": ("apply_list",),
}
EXPERTS = ("experts", "expert_loading")
LOST = [
    *((module, name) for module, name in IMPORTS if module != "vllm"),
    ("vllm", "_custom_ops"),
]
Stub = Callable[..., None]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    """A factory: puts a package ``vllm`` in place that has all names but the given ones."""

    def make(*lost: tuple[str, str]) -> None:
        for loaded in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
            monkeypatch.delitem(sys.modules, loaded)
        for name in ("vllm_names", "config", *EXPERTS, "method", "product"):
            # put back afterwards, even where a test imports it
            monkeypatch.setitem(sys.modules, f"nm_permute_plugin.serving.{name}", None)
            monkeypatch.delitem(sys.modules, f"nm_permute_plugin.serving.{name}")
        for path, name in IMPORTS:
            parts = path.split(".")
            for end in range(1, len(parts) + 1):
                owner = ".".join(parts[:end])
                if owner not in sys.modules:
                    module = ModuleType(owner)
                    module.__path__ = []  # a package, whose modules may be missing
                    monkeypatch.setitem(sys.modules, owner, module)
            if (path, name) not in lost:
                members = {
                    m: None for m in MEMBERS.get(name, ()) if (name, m) not in lost
                }
                setattr(sys.modules[path], name, type(name, (), members))

    return make


def error_of(stub: Stub, *lost: tuple[str, str]) -> str:
    stub(*lost)
    with pytest.raises(ImportError) as caught:
        importlib.import_module(MODULE)
    assert "\n" not in str(caught.value)
    assert "It works with vLLM 0.24 and 0.32: pip install 'vllm==0.24.*'" in str(
        caught.value
    )
    return str(caught.value)


def test_no_other_module_imports_vllm() -> None:
    """An import deep in a function would be found as well."""
    found = set()
    for file in SERVING.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            if any(name.split(".")[0] == "vllm" for name in names):
                found.add(file.name)
    assert found == {"vllm_names.py"}


def test_with_all_names_it_imports(stub: Stub) -> None:
    stub()
    names = importlib.import_module(MODULE)
    assert {name for _, name in IMPORTS} >= set(names.__all__) - {"ops"}
    assert [kind.__name__ for kind in names.engine()] == ["LLM", "SamplingParams"]


@pytest.mark.parametrize("lost", [x for x in LOST if x[1] not in ("LLM",)], ids=str)
def test_a_name_that_is_gone_is_named(stub: Stub, lost: tuple[str, str]) -> None:
    module, name = lost
    told = f"cannot import name '{name}' from '{module}'. It works"
    assert told in error_of(stub, lost)


@pytest.mark.parametrize(
    ("owner", "member"), [(o, m) for o, members in MEMBERS.items() for m in members]
)
def test_a_method_that_is_gone_is_named(stub: Stub, owner: str, member: str) -> None:
    assert f"{owner} has no '{member}'. It works" in error_of(stub, (owner, member))


def test_a_module_that_is_gone_is_named(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub()
    monkeypatch.delitem(sys.modules, "vllm.model_executor.parameter")
    with pytest.raises(ImportError, match="No module named 'vllm.model_executor.param"):
        importlib.import_module(MODULE)


def test_the_engines_own_names_are_named_as_well(stub: Stub) -> None:
    stub(("vllm", "SamplingParams"))
    names = importlib.import_module(MODULE)
    with pytest.raises(ImportError, match="cannot import name 'SamplingParams'"):
        names.engine()


def test_other_models_are_served_where_a_name_is_gone(
    stub: Stub, caplog: pytest.LogCaptureFixture
) -> None:
    from nm_permute_plugin.serving.plugin import register

    stub(("vllm.platforms", "current_platform"))
    with caplog.at_level(logging.ERROR):
        register()  # which vLLM calls for every model
    (record,) = caplog.records
    assert record.name.startswith("vllm.")
    assert "cannot serve 2:4 checkpoints with vLLM" in record.getMessage()
    assert "cannot import name 'current_platform'" in record.getMessage()
