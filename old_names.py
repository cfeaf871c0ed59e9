"""Old names, kept for one version, with a warning that says the new one."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# The modules of version 0.1 that its documents and examples imported, and what they are called now.
MOVED = {
    "adapter_metaembed": "training.lora",
    "authors_metaembed": "backbones.paper_checkpoint",
    "card_metaembed": "cards.card",
    "cascade_metaembed": "retrieval.cascade",
    "collection_metaembed": "retrieval.collection",
    "evaluation_metaembed": "evaluation.budgets",
    "mteb_metaembed": "evaluation.mteb",
    "precision_metaembed": "retrieval.quantization",
    "rotation_metaembed": "retrieval.pca",
    "training_metaembed": "training.losses",
    "tuning_metaembed": "retrieval.tune_cascade",
}


def warn_renamed(old: str, new: str) -> None:
    """Warn the caller's caller that `old` is now called `new`."""
    warnings.warn(f"{old} is now called {new}; the old name will be removed", DeprecationWarning, stacklevel=3)


class OldModules(MetaPathFinder, Loader):
    """Imports a module of the package under the name that it had in version 0.1."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return how to import `fullname` if it is an old name."""
        package, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if package == __package__ and name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Put the module of today in the place of `module`."""
        new = f"{__package__}.{MOVED[module.__name__.rpartition('.')[2]]}"
        warn_renamed(module.__name__, new)
        sys.modules[module.__name__] = import_module(new)
