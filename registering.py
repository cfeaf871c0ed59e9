"""Registers our classes with transformers' Auto classes, without importing transformers for it.

`import metaembed` is also what `metaembed --help` does, and transformers takes seconds to import. So the classes are
registered when both sides are there: when somebody imports transformers, or a file of ours that imports it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def register() -> None:
    """Register the classes: `AutoModel` and the others then load a checkpoint without code of its repository."""
    from transformers import AutoConfig, AutoModel, AutoProcessor

    from .configuration_metaembed import MetaEmbedConfig
    from .modeling_metaembed import MetaEmbedModel
    from .processing_metaembed import MetaEmbedProcessor

    AutoConfig.register(MetaEmbedConfig.model_type, MetaEmbedConfig)
    AutoModel.register(MetaEmbedConfig, MetaEmbedModel)
    AutoProcessor.register(MetaEmbedConfig, MetaEmbedProcessor)


def register_with_transformers() -> None:
    """Register the classes now if transformers is imported, else as soon as it is."""
    if "transformers" in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, Watch())


class Watch(MetaPathFinder):
    """Watches the imports of transformers and of our files that may import it, until the classes are registered."""

    def __init__(self) -> None:
        self.running = 0  # imports that are watched: a module that is half imported has no classes yet

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return how to import a module that is watched, as the other finders do."""
        package, _, name = fullname.rpartition(".")
        if fullname != "transformers" and not (package == __package__ and name.endswith("_metaembed")):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = Watched(spec.loader, self)
        return spec

    def end(self) -> None:
        """Register the classes if no import that is watched runs any more, and remove the watch."""
        if not self.running and "transformers" in sys.modules and self in sys.meta_path:
            sys.meta_path.remove(self)
            register()


class Watched(Loader):
    """Imports a module by its own loader, which the module keeps, and tells the watch when that has ended."""

    def __init__(self, loader: Any, watch: Watch) -> None:
        self.loader, self.watch = loader, watch

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Return what the loader makes."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module."""
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.watch.running += 1
        try:
            self.loader.exec_module(module)
        finally:
            self.watch.running -= 1
        self.watch.end()
