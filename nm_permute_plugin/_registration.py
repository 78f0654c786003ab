# SPDX-License-Identifier: Apache-2.0
"""Register our modifiers as soon as llm-compressor is imported, and not before."""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

HOST = "llmcompressor"
MODIFIERS = "nm_permute_plugin.modifiers"


def register_when_imported() -> None:
    """
    Make the modifiers known to recipes now, or when llm-compressor has been imported.

    llm-compressor has no entry points and takes seconds to import, so its import is
    awaited rather than done.
    """
    if HOST in sys.modules:
        importlib.import_module(MODIFIERS)
    elif not any(isinstance(finder, _HostFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _HostFinder())


class _HostFinder(MetaPathFinder):
    """
    Finds the host as it would be found without us, then waits for its end.

    Stays until the host has run: transformers, say, asks for the spec of a package and
    imports it much later.
    """

    def find_spec(
        self,
        fullname: str,
        path: object,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname != HOST:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(HOST, None, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _RegisteringLoader(spec.loader, self)
                return spec
        return None


class _RegisteringLoader(Loader):
    """The host's own loader, with our registration behind it."""

    def __init__(self, loader: Loader, finder: MetaPathFinder) -> None:
        self._loader = loader
        self._finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        importlib.import_module(MODIFIERS)
