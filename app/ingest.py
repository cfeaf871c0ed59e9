"""From sources to an index: what is new is read ahead of the model, encoded and stored, exactly once."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from ..encoding.ahead import in_order
from ..inputs_metaembed import InputPolicy
from .encoder import Encoder
from .journal import JOURNAL, Journal
from .pdf import PdfReader
from .settings import (
    REPORT,
    SETTINGS,
    Settings,
    folder_of,
    is_address,
    open_index,
    read_settings,
    write_settings,
)
from .sources import DATASETS, Columns, Document, File, Problem, Reading, count_rows, documents_of, inspect, rows, walk

__all__ = ["JOURNAL", "REPORT", "Summary", "begin", "ingest"]

LOCK = "indexing.lock"
_FILES_AHEAD = 1000  # files that are hashed before their turn, for the number of documents to come


@dataclass
class Summary:
    """What a run did.

    Attributes:
        encoded: Documents that were encoded and stored.
        kept: Documents that were stored already, of the same content.
        deleted: Documents that were deleted, with `sync`.
        seconds: How long it took.
        problems: What could not be read or was left out, and why.
    """

    encoded: int = 0
    kept: int = 0
    deleted: int = 0
    seconds: float = 0.0
    problems: list[Problem] = field(default_factory=list)

    def of(self, *statuses: str) -> list[Problem]:
        """Return the problems of some statuses."""
        return [problem for problem in self.problems if problem.status in statuses]


@dataclass
class _Batch:
    """Documents, read and processed: `prepared` is what the encoder takes, part by part."""

    documents: list[Document] = field(default_factory=list)
    extras: list[dict[str, Any]] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)
    prepared: list[Any] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def begin(index: str | os.PathLike[str], encoder: Encoder, settings: Settings, **options: Any) -> Settings:
    """Create an index with its settings, or return the settings of the one that is there.

    Args:
        index: A folder, or the address of a store, whose settings then lie in a folder beside.
        encoder: The model.
        settings: Of a new index. One that is there must be of the same model.
        **options: Of `create_store`, for a new index.

    Raises:
        ValueError: if there is an index that was made of another model, or in another way.
    """
    from ..stores import create_store, open_store

    folder = folder_of(index)
    if (folder / SETTINGS).exists():
        return read_settings(index)
    address: Any = str(index) if is_address(index) else folder
    try:
        store = open_store(address)
        if len(store):
            raise ValueError(f"{index} holds documents that `metaembed index` did not put there; name another place")
        if (store.vectors, store.dim) != (settings.vectors, encoder.dim):
            raise ValueError(f"{index} is an index for documents of [{store.vectors}, {store.dim}]")
    except FileNotFoundError:
        store = create_store(address, settings.vectors, encoder.dim, **options)
    store.close()
    settings = replace(
        settings,
        address=str(index) if is_address(index) else None,
        dim=encoder.dim,
        budgets=[[r_q, min(r_c, settings.vectors)] for r_q, r_c in encoder.budgets],
        ordered=encoder.ordered,
    )
    unique = list(dict.fromkeys(map(tuple, settings.budgets)))
    settings = replace(settings, budgets=[list(budget) for budget in unique])
    write_settings(index, settings)
    return settings


def ingest(
    index: str | os.PathLike[str],
    sources: Sequence[str],
    encoder: Encoder,
    *,
    sync: bool = False,
    batch_size: int = 8,
    workers: int | None = None,
    progress: bool = False,
    columns: Columns | None = None,
) -> Summary:
    """Encode what is new in the sources, and store it. Killed and called again, it goes on where it was.

    Args:
        index: A folder or an address, where `begin` was called.
        sources: Folders, files, and datasets: parquet or jsonl files, or Hub ids.
        encoder: The model that the index was made with.
        sync: Whether documents whose content changed are encoded anew, and those that are gone are deleted.
        batch_size: Documents in a forward pass.
        workers: Threads that read and process ahead of the model, each with a process for PDFs; by default half of
            the processors, from 1 to 8. So many batches, and one, are in memory.
        progress: Whether to show a progress bar.
        columns: Of datasets.

    Raises:
        FileNotFoundError: if a source is not there; nothing is changed.
        TimeoutError: if another process writes to this index.
        ValueError: if the settings do not fit.
    """
    started, folder = time.monotonic(), folder_of(index)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise TimeoutError(f"another process is indexing into {index}") from None
    with ExitStack() as stack:
        stack.callback(lock.release)
        settings, places = _with_roots(index, read_settings(index), sources)
        store = stack.enter_context(closing(open_index(index)))
        journal = stack.enter_context(closing(Journal(folder / JOURNAL)))
        _reconcile(store, journal)
        workers = workers or max(1, min(8, (os.cpu_count() or 2) // 2))
        readers = stack.enter_context(_Readers(Reading(**settings.options), encoder, settings.vectors))
        pools = [ThreadPoolExecutor(max(1, workers // 2), "look"), ThreadPoolExecutor(workers, "read")]
        for pool in pools:  # once `stop` has freed their threads
            stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        stack.callback(readers.stop)
        run = _Run(journal, store, encoder, settings, readers, sync, columns or Columns(), Summary())
        with tqdm(unit="doc", unit_scale=False, disable=not progress, smoothing=0.05, dynamic_ncols=True) as run.bar:
            found = run.found(places, pools[0], leave_out=[folder])
            chunks = _chunks(run.wanted(found), batch_size)
            for batch in in_order(readers.read, run.missing(chunks), pools[1], workers):
                run.store_batch(batch)
            run.finish()
        run.summary.seconds = time.monotonic() - started
        _write_report(folder / REPORT, run.summary.problems)
    return run.summary


def _with_roots(
    index: str | os.PathLike[str], settings: Settings, sources: Sequence[str]
) -> tuple[Settings, list[tuple[int, str]]]:
    """Return the settings with all sources in them, and for each source its number and place."""
    roots, places = list(settings.roots), []
    for source in sources or roots:
        path = Path(source)
        if path.exists():
            source = os.path.realpath(path)
        elif path.is_absolute() or source.count("/") != 1 or source.startswith("."):
            raise FileNotFoundError(f"the source {source} is not there")
        if source not in roots:
            roots.append(source)
        places.append((roots.index(source), source))
    if roots != settings.roots:
        settings = replace(settings, roots=roots)
        write_settings(index, settings)
    return settings, list(dict.fromkeys(places))


def _reconcile(store: Any, journal: Journal) -> None:
    """Ask the store which documents it has of those that were on the way when a run ended."""
    doubt = journal.in_doubt()
    here = [i for i in doubt if i in store]
    journal.commit([doc.id for doc in store.get(here) if doc.metadata.get("sha256") == doubt[doc.id]] if here else [])
    if hasattr(store, "ids"):
        there = set(store.ids)
        journal.doubt([i for i in journal.ids() if i not in there])


class _Readers:
    """What the threads do that run ahead of the model. Each has a process for PDFs of its own."""

    def __init__(self, reading: Reading, encoder: Encoder, vectors: int):
        self.reading, self.encoder, self.vectors = reading, encoder, vectors
        self.policy = InputPolicy(schemes=("http", "https") if reading.allow_urls else (), folders=())
        self._own, self._all, self._stopped = threading.local(), list[PdfReader](), False
        self._mutex = threading.Lock()

    def __enter__(self) -> _Readers:
        return self

    def __exit__(self, *args: object) -> None:
        for reader in self._all:
            reader.close()

    def stop(self) -> None:
        """Kill the processes, so that no thread waits for one."""
        with self._mutex:
            self._stopped = True
            for reader in self._all:
                reader.kill()

    @property
    def pdf(self) -> PdfReader:
        """The reader of this thread."""
        if not hasattr(self._own, "pdf"):
            self._own.pdf = PdfReader(self.reading.dpi)
            with self._mutex:
                self._all.append(self._own.pdf)
        if self._stopped:
            raise InterruptedError("the run was stopped")
        return self._own.pdf

    def read(self, documents: list[Document]) -> _Batch:
        """Read and process documents. What fails is a problem of its own, and the others go on."""
        batch = _Batch()
        for document in documents:
            try:
                value, extra = document.load(self.pdf)
            except InterruptedError:
                raise
            except (OSError, ValueError) as error:
                batch.problems.append(document.problem(_brief(error)))
                continue
            batch.documents.append(document)
            batch.extras.append(extra)
            batch.inputs.append(value)
        return self.prepare(batch)

    def prepare(self, batch: _Batch) -> _Batch:
        """Process a batch; if that fails, one by one, and leave out the documents by which it does."""
        if not batch.documents:
            return batch
        try:
            batch.prepared = [self.encoder.prepare("document", batch.inputs, self.vectors)]
            return batch
        except (TypeError, ValueError, RuntimeError) as error:
            if len(batch.documents) == 1:
                return _Batch(problems=[*batch.problems, batch.documents[0].problem(_brief(error))])
        found = _Batch(problems=batch.problems)
        for one in map(self.prepare, _singles(batch)):
            for name in ("documents", "extras", "inputs", "prepared", "problems"):
                getattr(found, name).extend(getattr(one, name))
        return found


def _singles(batch: _Batch) -> Iterator[_Batch]:
    for parts in zip(batch.documents, batch.extras, batch.inputs, strict=True):
        yield _Batch(*([part] for part in parts))


@dataclass
class _Progress:
    """How far a file is."""

    file: File
    to_come: int  # documents
    whole: bool  # so far, all are stored
    noted: bool  # the journal knows that all are


@dataclass
class _Run:
    """The steps of one run, in the thread of the model; the journal is only used there."""

    journal: Journal
    store: Any
    encoder: Encoder
    settings: Settings
    readers: _Readers
    sync: bool
    columns: Columns
    summary: Summary
    bar: Any = None
    planned: int = 0  # documents to encode in this run, as far as they are known
    _mutex: threading.Lock = field(default_factory=threading.Lock)
    _files: dict[tuple[int, str], _Progress] = field(default_factory=dict)
    _seen: dict[int, set[str]] = field(default_factory=dict)  # files of each source that is a folder
    _seen_rows: dict[tuple[int, str], set[str]] = field(default_factory=dict)  # ids of each dataset
    _hidden: list[tuple[int, str]] = field(default_factory=list)  # folders that could not be listed

    def found(
        self, places: list[tuple[int, str]], pool: ThreadPoolExecutor, leave_out: list[Path]
    ) -> Iterator[File | Document]:
        """Yield the files of all sources, looked at ahead of time, and the rows of datasets."""
        reading, policy = self.readers.reading, self.readers.policy
        for source, place in places:
            path = Path(place)
            if not path.is_dir() and (path.suffix.lower() in DATASETS or not path.exists()):
                self._plan(count_rows(place) or 0)
                file = path.name if path.is_file() else place
                seen = self._seen_rows.setdefault((source, file), set())
                for row in rows(place, source, self.columns, reading, policy):
                    if isinstance(row, Problem):
                        self._problem(row)
                        self._plan(-1)
                    else:
                        seen.add(row.id)
                        yield row
                continue
            seen = self._seen.setdefault(source, set())
            names: Iterable[Any] = [(path.name, path)]
            if path.is_dir():
                names = walk(path, source, reading.follow_links, leave_out)

            def look(one: Any, source: int = source) -> File | Problem:
                if isinstance(one, Problem):
                    return one
                file = inspect(*one, source, reading, policy, self.readers.pdf)
                if isinstance(file, File):
                    self._plan(file.count)
                return file

            for file in in_order(look, names, pool, _FILES_AHEAD):
                if isinstance(file, Problem):
                    self._problem(file)
                    if file.status != "skipped":
                        seen.add(file.file)
                        if file.file == "." or file.file.endswith("/"):
                            self._hidden.append((source, file.file.removeprefix(".")))
                else:
                    seen.add(file.file)
                    yield file

    def wanted(self, found: Iterable[File | Document]) -> Iterator[Document]:
        """Yield the documents that belong into the index, stored already or not: so batches are the same each time."""
        for one in found:
            if isinstance(one, Document):
                yield one
                continue
            before = self.journal.finished(one.source, one.file)
            if before not in (None, one.sha256) and not self.sync:
                self._problem(Problem(one.source, one.file, "changed", "it changed since: --sync encodes it anew"))
                self._plan(-one.count)
                continue
            self._files[one.source, one.file] = _Progress(one, one.count, True, before == one.sha256)
            yield from documents_of(one, self.readers.reading)

    def missing(self, chunks: Iterable[list[Document]]) -> Iterator[list[Document]]:
        """Yield of each chunk what is not stored."""
        for chunk in chunks:
            stored = self.journal.stored([document.id for document in chunk])
            missing = []
            for document in chunk:
                sha256 = stored.get(document.id)
                row = (document.source, document.file) in self._seen_rows
                if sha256 not in (None, document.sha256) and row and not self.sync:
                    self._problem(document.problem("it changed since: --sync encodes it anew", "changed"))
                elif sha256 != document.sha256:
                    missing.append(document)
                    continue
                else:
                    self.summary.kept += 1
                self._plan(-1)
                self._settle([document], True)
            if missing:
                yield missing

    def store_batch(self, batch: _Batch) -> None:
        """Encode a batch and store it; if that fails, find out by which documents, and leave them out."""
        for problem in batch.problems:
            self._problem(problem)
            self._plan(-1)
            self._settle([problem], False)
        if not batch.documents:
            return
        try:
            embeddings = torch.cat([self.encoder.encode_prepared(part) for part in batch.prepared])
        except (ValueError, torch.OutOfMemoryError) as error:
            if len(batch.documents) == 1:
                self.store_batch(_Batch(problems=[batch.documents[0].problem(_brief(error))]))
                return
            batch.prepared = []
            for one in _singles(batch):
                self.store_batch(self.readers.prepare(one))
            return
        self._store(batch.documents, batch.extras, embeddings)
        self._settle(batch.documents, True)
        self.summary.encoded += len(batch.documents)
        self.bar.update(len(batch.documents))

    def _store(self, documents: list[Document], extras: list[dict[str, Any]], embeddings: Tensor) -> None:
        ids = [one.id for one in documents]
        metadata = [
            {**one.metadata, **extra, **{name: getattr(one, name) for name in ("file", "source", "kind", "sha256")}}
            for one, extra in zip(documents, extras, strict=True)
        ]
        self.journal.begin((one.id, one.source, one.file, one.kind, one.sha256) for one in documents)
        self.store.upsert(embeddings, ids=ids, metadata=metadata)
        self.journal.commit(ids)

    def _settle(self, documents: Sequence[Document | Problem], stored: bool) -> None:
        """Count down the documents of files; of a file that is through, delete what is of its earlier content."""
        for one in documents:
            state = self._files.get((one.source, one.file))
            if state is None:
                continue
            state.to_come -= 1
            state.whole &= stored
            if state.to_come == 0:
                file = self._files.pop((one.source, one.file)).file
                self._delete(self.journal.stale(file.source, file.file, file.sha256))
                if state.whole and not state.noted:
                    self.journal.finish(file.source, file.file, file.sha256)

    def finish(self) -> None:
        """Delete what is gone from the sources, with `sync`."""
        if not self.sync:
            return
        for source, seen in self._seen.items():
            files = self.journal.files(source)
            gone = [file for file in files if file not in seen and not self._unlisted(source, file)]
            if files and len(gone) == len(files):
                reason = "none of its files are there: nothing is deleted, in case it is not mounted"
                self._problem(Problem(source, self.settings.roots[source], "unreadable", reason))
                continue
            for file in gone:
                self._delete(self.journal.ids_of(source, file))
                self.journal.forget_file(source, file)
                self._problem(Problem(source, file, "gone", "it is gone, and was deleted from the index"))
        for (source, file), ids in self._seen_rows.items():
            self._delete([i for i in self.journal.ids_of(source, file) if i not in ids])

    def _unlisted(self, source: int, file: str) -> bool:
        """Whether a file lies in a folder that could not be listed."""
        return any(source == where and file.startswith(folder) for where, folder in self._hidden)

    def _delete(self, ids: list[str]) -> None:
        for some in _chunks(ids, 1000):
            self.summary.deleted += self.store.delete(ids=some)
            self.journal.forget(some)

    def _problem(self, problem: Problem) -> None:
        self.summary.problems.append(problem)

    def _plan(self, count: int) -> None:
        with self._mutex:
            self.planned += count
            self.bar.total = self.planned


def _brief(error: BaseException) -> str:
    """Why a document cannot be read or encoded, without the place in a batch that it had."""
    if isinstance(error, torch.OutOfMemoryError):
        return "the model ran out of memory"
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return re.sub(r"^(input \d+: )?(the image of type \w+ cannot be read: )?", "", text)


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    items = iter(items)
    while chunk := list(islice(items, size)):
        yield chunk


def _write_report(path: Path, problems: list[Problem]) -> None:
    """Write the problems of a run as JSON lines, whole or not at all."""
    new = path.with_name(f"{path.name}.new")
    with open(new, "w", encoding="utf-8") as file:
        for problem in problems:
            content = {name: value for name, value in asdict(problem).items() if value is not None}
            file.write(json.dumps(content, ensure_ascii=False) + "\n")
    os.replace(new, path)
