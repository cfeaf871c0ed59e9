"""Old names, kept for one version."""

from __future__ import annotations

import warnings


def warn_renamed(old: str, new: str) -> None:
    """Warn the caller's caller that `old` is now called `new`."""
    warnings.warn(f"{old} is now called {new}; the old name will be removed", DeprecationWarning, stacklevel=3)
