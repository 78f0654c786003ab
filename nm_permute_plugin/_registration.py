# SPDX-License-Identifier: Apache-2.0
"""Register with each host as soon as the host is imported, and not before."""

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import cast


def register_when_imported() -> None:
    """
    Make modifiers and reader known now, or when their hosts have been imported.

    The hosts take seconds to import, so their import is awaited rather than done.
    """
    # By name: a package that was imported anew has another class of finders, and two
    # finders that wait for one host would ask each other for ever.
    sys.meta_path[:] = [
        finder for finder in sys.meta_path if type(finder).__name__ != FINDER
    ]
    for host, register in REGISTER.items():
        if host in sys.modules:
            register()
        else:
            sys.meta_path.insert(0, _HostFinder(host, register))


def _register_modifiers() -> None:
    hosts = importlib.import_module("nm_permute_plugin.checkpoint.tested_hosts")
    hosts.warn_if_untested("llmcompressor")
    importlib.import_module("nm_permute_plugin.modifiers")


def _register_reader() -> None:
    try:
        importlib.import_module("transformers.core_model_loading")
        reader = importlib.import_module(
            "nm_permute_plugin.checkpoint.transformers_reader"
        )
        reader.register_reader()
    except Exception as error:
        # transformers 4 beside an old vLLM: nothing else may fail because of us
        hosts = importlib.import_module("nm_permute_plugin.checkpoint.tested_hosts")
        warnings.warn(
            "nm-permute-plugin cannot read sparse checkpoints with this version of "
            f"transformers ({error}): pip install '{hosts.requirement('transformers')}'",
            stacklevel=2,
        )


def _register_refusal() -> None:
    refusal = importlib.import_module(
        "nm_permute_plugin.checkpoint.transformers_refusal"
    )
    refusal.register_refusal()


REGISTER: dict[str, Callable[[], None]] = {
    "llmcompressor": _register_modifiers,
    "transformers.quantizers.auto": _register_reader,
    "transformers.modeling_utils": _register_refusal,
}
"""What to do once a module of a host has been imported."""


FINDER = "_HostFinder"
"""What the class below is called, in whichever import of this package."""


class _HostFinder(MetaPathFinder):
    """
    Finds a host as it would be found without us, then waits for its end.

    Stays until the host has run: transformers, say, asks for the spec of a package and
    imports it much later.
    """

    def __init__(self, host: str, register: Callable[[], None]) -> None:
        self.host = host
        self._register = register

    def find_spec(
        self,
        fullname: str,
        path: object,  # the import system's own sequences, namespace paths among them
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname != self.host:
            return None
        places = cast("Sequence[str] | None", path)
        for finder in sys.meta_path:
            spec = None
            if finder is not self:
                spec = finder.find_spec(fullname, places, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _RegisteringLoader(spec.loader, self)
                return spec
        return None

    def finish(self) -> None:
        """Register, once the host is there; there is nothing more to wait for."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        self._register()


class _RegisteringLoader(Loader):
    """The host's own loader, with our registration behind it."""

    def __init__(self, loader: Loader, finder: _HostFinder) -> None:
        self._loader = loader
        self._finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._finder.finish()
