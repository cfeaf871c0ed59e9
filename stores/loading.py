"""Loading many documents: what is there already is not encoded or sent again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from ..retrieval.snapshot import check_ids

Batch: TypeAlias = "tuple[Any | Callable[[], Any], Sequence[str], Sequence[Mapping[str, Any] | None] | None]"


class Ledger:
    """The batches that a store has: one empty file for each, in a folder that several machines may share.

    A ledger belongs to one run of one model over one dataset into one store: it knows batches by their ids alone.

    Args:
        folder: Where it is, made if it is missing.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def __contains__(self, ids: object) -> bool:
        return self._file(ids).exists()

    def __len__(self) -> int:
        return sum(1 for _ in self.folder.glob("*.done"))

    def add(self, ids: Sequence[str]) -> None:
        """Note that the store has these documents. Call it when `upsert` has returned."""
        self._file(ids).touch()

    def _file(self, ids: Any) -> Path:
        text = json.dumps(check_ids(ids))
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:40]}.done"


def load(store: Any, batches: Iterable[Batch], ledger: Ledger | None = None) -> int:
    """Load batches into a store, each by one `upsert`, and return how many documents were sent.

    Interrupted and called again with the same batches and ledger, it goes on with the first batch that is missing. A
    batch whose `upsert` was interrupted is sent again, which replaces the same documents: each is there exactly once.
    Stores in a server retry by themselves while it does not answer.

    Args:
        store: A `VectorStore`.
        batches: `(embeddings, ids, metadata)`. Instead of embeddings it may give a function that returns them, which
            is called only if the batch is missing.
        ledger: The batches that the store has; `None` sends all.

    Raises:
        ConnectionError: if the engine does not answer for long.
        ValueError: as `upsert`.
    """
    sent = 0
    for embeddings, ids, metadata in batches:
        if ledger is not None and ids in ledger:
            continue
        store.upsert(embeddings() if callable(embeddings) else embeddings, ids, metadata)
        if ledger is not None:
            ledger.add(ids)
        sent += len(ids)
    if hasattr(store, "optimize"):
        store.optimize()
    return sent
