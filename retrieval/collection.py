"""The collection of version 0.1: quantized document embeddings, searched at any budget and written durably.

The first vector of every document is stored apart from the next three, these apart from the next four, and so on at
the edges of the default budgets, so that a budget reads only the vectors it uses. On disk, every `append` writes one
safetensors file, memory-mapped when read, and then replaces the manifest in one step.
"""

from __future__ import annotations

import itertools
import json
import os
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..configuration_metaembed import DEFAULT_BUDGETS
from ..old_names import warn_renamed
from ..scoring_metaembed import as_stack, check_finite
from .quantization import bytes_per_vector, check_quantization, decode, encode
from .search import Slab, Store

_EDGES = tuple(r_c for _, r_c in DEFAULT_BUDGETS)
_MANIFEST = "collection.json"
_PCA = "rotation.safetensors"
_UNFINISHED = ".unfinished"
_ENCODED_AT_ONCE = 1 << 24  # numbers


class EmbeddingCollection:
    """Embeddings of documents, `[N, vectors, dim]`, with ids. `maxsim`, `search` and `cascade` take it as documents.

    Args:
        vectors: How many vectors of a document are kept, from the first.
        input_dim: Dimensions of appended documents, and of queries.
        quantization: `"float32"`, `"bfloat16"`, `"int8"`, `"int4"` or `"binary"`.
        pca: `[input_dim, dim]`, as `fit_pca` returns it, applied to documents and queries.
        folder: A new or empty folder to write to. `None` keeps the collection in memory.
        precision: Deprecated name of `quantization`.
        rotation: Deprecated name of `pca`.

    Attributes:
        dim: Dimensions kept.
        stores: The documents, one `Store` for every `append`.
        uncommitted: Names of files in the folder that an interrupted `append` left.

    Raises:
        ValueError: if a number, the quantization or the PCA does not fit, or the folder is not empty.

    Example:
        >>> collection = EmbeddingCollection(vectors=2, input_dim=4, quantization="int8")
        >>> collection.append(torch.eye(4).view(2, 2, 4), ids=["first", "second"])
        >>> collection
        EmbeddingCollection(2 documents, 2 vectors of 4 dimensions, int8, 16 bytes a document)
    """

    def __init__(
        self,
        vectors: int,
        input_dim: int,
        quantization: str = "float32",
        *,
        pca: Tensor | None = None,
        folder: str | os.PathLike[str] | None = None,
        precision: str | None = None,
        rotation: Tensor | None = None,
    ):
        if precision is not None:
            warn_renamed("precision", "quantization")
            quantization = precision
        if rotation is not None:
            warn_renamed("rotation", "pca")
            pca = rotation
        if min(vectors, input_dim) < 1:
            raise ValueError(f"vectors and input_dim must be at least 1, not {vectors} and {input_dim}")
        if pca is not None:
            if pca.ndim != 2 or pca.shape[0] != input_dim or not 1 <= pca.shape[1] <= input_dim:
                raise ValueError(f"pca must be [{input_dim}, dim], not {list(pca.shape)}")
            check_finite(pca, "pca")
        self.vectors, self.input_dim, self.quantization = vectors, input_dim, check_quantization(quantization)
        self.pca = None if pca is None else pca.detach().float().contiguous()
        self.dim = input_dim if pca is None else pca.shape[1]
        self.stores: list[Store] = []
        self.folder: Path | None = None
        self.uncommitted: tuple[str, ...] = ()
        self._files: list[str] = []
        self._ids: list[list[str] | Path | None] = []  # of every store: there, in that file, or none given
        if folder is not None:
            self._begin(Path(folder))

    @classmethod
    def from_embeddings(
        cls, embeddings: Any, ids: Sequence[str] | None = None, *, vectors: int | None = None, **options: Any
    ) -> EmbeddingCollection:
        """Create a collection from embeddings: a tensor or array `[N, R_c, D]`, or a list of `[R_c, D]`.

        Args:
            embeddings: The documents.
            ids: One for every document; their positions, as text, by default.
            vectors: Keep only so many vectors of a document; all of them by default.
            **options: `quantization`, `pca` and `folder`, as for the class.
        """
        stack = as_stack(embeddings, "embeddings")
        self = cls(stack.shape[1] if vectors is None else vectors, stack.shape[2], **options)
        self.append(stack, ids)
        return self

    @torch.no_grad()
    def append(self, embeddings: Any, ids: Sequence[str] | None = None) -> None:
        """Add documents. When this returns, they are on disk, if the collection has a folder.

        Every call creates a store and a file: append thousands of documents at a time.

        Args:
            embeddings: `[n, R_c, D]` with `R_c >= vectors`, or a list of `[R_c, D]`; the first `vectors` are kept.
            ids: One for every document, all different; either every document of a collection is given one or none is.

        Raises:
            TypeError: if embeddings are not of floating point, or an id is not text.
            ValueError: if shapes do not fit, a value is NaN or infinite, or an id is there already.
        """
        stack = as_stack(embeddings, "embeddings")
        if stack.shape[1] < self.vectors or stack.shape[2] != self.input_dim:
            raise ValueError(
                f"embeddings must be [n, {self.vectors} or more, {self.input_dim}] for this collection, "
                f"not {list(stack.shape)}"
            )
        self._check_ids(ids, len(stack))
        if not len(stack):
            return
        store = self._encode(stack[:, : self.vectors])
        new_ids = None if ids is None else list(ids)
        if self.folder is None:
            self.stores.append(store)
            self._ids.append(new_ids)
        else:
            self._write(self.folder, store, new_ids)
        self.__dict__.pop("_position_of", None)

    def project(self, embeddings: Tensor) -> Tensor:
        """Apply the PCA of the documents to queries `[..., input_dim]`: `[..., dim]`."""
        return embeddings if self.pca is None else embeddings @ self.pca.to(embeddings)

    def rotate(self, embeddings: Tensor) -> Tensor:
        """Deprecated name of `project`."""
        warn_renamed("rotate", "project")
        return self.project(embeddings)

    @property
    def precision(self) -> str:
        """Deprecated name of `quantization`."""
        warn_renamed("precision", "quantization")
        return self.quantization

    @property
    def rotation(self) -> Tensor | None:
        """Deprecated name of `pca`."""
        warn_renamed("rotation", "pca")
        return self.pca

    def __len__(self) -> int:
        return sum(map(len, self.stores))

    def __repr__(self) -> str:
        shape = f"{len(self)} documents, {self.vectors} vectors of {self.dim} dimensions"
        where = "" if self.folder is None else f", in {self.folder}"
        return f"EmbeddingCollection({shape}, {self.quantization}, {self.bytes_per_document} bytes a document{where})"

    @property
    def bytes_per_document(self) -> int:
        """Bytes of the vectors of a document, in memory and on disk."""
        return self.vectors * bytes_per_vector(self.quantization, self.dim)

    @property
    def device(self) -> torch.device:
        """Device of the documents."""
        return self.stores[0].slabs[0].stored.device if self.stores else torch.device("cpu")

    @property
    def ids(self) -> list[str]:
        """The id of every document, in order."""
        if not any(ids is not None for ids in self._ids):
            return [str(i) for i in range(len(self))]
        return list(itertools.chain.from_iterable(_read_ids(ids) for ids in self._ids))

    def positions(self, ids: Sequence[str]) -> Tensor:
        """The positions `[n]` int64 of documents with these ids, for `search(..., include=...)` and the like.

        Raises:
            ValueError: if an id is not in the collection.
        """
        missing = [i for i in ids if i not in self._position_of]
        if missing:
            raise ValueError(f"{len(missing)} ids are not in the collection, such as {missing[:3]}")
        return torch.tensor([self._position_of[i] for i in ids], dtype=torch.int64)

    def to_tensor(self, vectors: int | None = None) -> Tensor:
        """Return the documents as kept (rounded, and projected by PCA): `[N, vectors, dim]` float32."""
        if vectors is not None and not 1 <= vectors <= self.vectors:
            raise ValueError(f"vectors must be from 1 to {self.vectors}, not {vectors}")
        stores = [store.prefix(vectors or self.vectors) for store in self.stores]
        parts = [[decode(s.stored, s.scales, self.quantization, self.dim) for s in store.slabs] for store in stores]
        empty = torch.empty(0, vectors or self.vectors, self.dim)
        return torch.cat([torch.cat(slabs, dim=1) for slabs in parts]) if parts else empty

    def to(self, device: torch.device | str) -> EmbeddingCollection:
        """A copy of the collection in the memory of a device."""
        moved = EmbeddingCollection(self.vectors, self.input_dim, self.quantization, pca=self.pca)
        for store in self.stores:
            slabs = [Slab(s.stored.to(device), None if s.scales is None else s.scales.to(device)) for s in store.slabs]
            moved.stores.append(Store(slabs, self.quantization, self.dim, checked=True))
        moved._ids = list(self._ids)
        return moved

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the collection to a folder, new or empty, from which `load` reads it."""
        copy = EmbeddingCollection(self.vectors, self.input_dim, self.quantization, pca=self.pca, folder=folder)
        for store, ids in zip(self.stores, self._ids, strict=True):
            copy._write(Path(folder), store, None if ids is None else _read_ids(ids))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> EmbeddingCollection:
        """Open a folder. Documents are memory-mapped: read from disk when they are scored, and only so far.

        Files of an interrupted `append` are named in a warning and in `uncommitted`, and left alone.

        Raises:
            FileNotFoundError: if the folder holds no collection.
            ValueError: if a file that the manifest names is missing, or is not what was written.
        """
        folder = Path(folder)
        if not (folder / _MANIFEST).exists():
            raise FileNotFoundError(f"{folder} holds no collection: there is no {_MANIFEST}")
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != 1:
            raise ValueError(f"{folder} is of format {manifest['format']}; this version reads format 1")
        pca = None
        if manifest["rotation"]:
            with safe_open(folder / _PCA, framework="pt") as file:
                pca = file.get_tensor("rotation")
        self = cls(manifest["vectors"], manifest["input_dim"], manifest["precision"], pca=pca)
        self.folder = folder
        for entry in manifest["files"]:
            self._read(entry)
        known = {_MANIFEST, _PCA, *self._files}
        self.uncommitted = tuple(sorted(path.name for path in folder.iterdir() if path.name not in known))
        if self.uncommitted:
            warnings.warn(
                f"{folder} contains files from an interrupted append: {', '.join(self.uncommitted)}. Their documents "
                "are not in the collection: append them again, then delete the files.",
                stacklevel=2,
            )
        return self

    @cached_property
    def _position_of(self) -> dict[str, int]:
        return {document: at for at, document in enumerate(self.ids)}

    @property
    def _slabs(self) -> list[int]:
        """How many vectors each slab holds."""
        edges = [0, *(edge for edge in _EDGES if edge < self.vectors), self.vectors]
        return [stop - start for start, stop in itertools.pairwise(edges)]

    def _check_ids(self, ids: Sequence[str] | None, n: int) -> None:
        if len(self) and n and (ids is None) != (self._ids[0] is None):
            raise ValueError("give an id to every document of a collection or to none")
        if ids is None:
            return
        if isinstance(ids, str) or not all(isinstance(i, str) for i in ids):
            raise TypeError("ids must be a list of str")
        if len(ids) != n:
            raise ValueError(f"{len(ids)} ids for {n} documents")
        if len(set(ids)) < n:
            raise ValueError("ids must all be different")
        there = [i for i in ids if i in self._position_of] if self._ids else []
        if there:
            raise ValueError(f"{len(there)} ids are in the collection already, such as {there[:3]}")

    def _encode(self, stack: Tensor) -> Store:
        """Return documents `[n, vectors, input_dim]` as they are stored."""
        slabs: list[list[tuple[Tensor, Tensor | None]]] = [[] for _ in self._slabs]
        for part in stack.split(max(1, _ENCODED_AT_ONCE // (self.vectors * self.input_dim))):
            check_finite(part, "embeddings")
            for parts, vectors in zip(slabs, self.project(part.float()).split(self._slabs, dim=1), strict=True):
                parts.append(encode(vectors, self.quantization))
        return Store([_join(parts) for parts in slabs], self.quantization, self.dim, checked=True)

    def _begin(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        there = sorted(path.name for path in folder.iterdir())
        if there:
            raise ValueError(
                f"{folder} is not empty (it holds {there[0]}); open a collection with EmbeddingCollection.load"
            )
        if self.pca is not None:
            tensors = {"rotation": self.pca.cpu()}
            _replace(folder / _PCA, lambda path: save_file(tensors, path))
        self.folder = folder
        self._commit()

    def _commit(self) -> None:
        assert self.folder is not None
        manifest = {
            "format": 1,
            "vectors": self.vectors,
            "input_dim": self.input_dim,
            "precision": self.quantization,  # the names of format 1
            "rotation": self.pca is not None,
            "files": [{"name": n, "documents": len(s)} for n, s in zip(self._files, self.stores, strict=True)],
        }
        _replace(self.folder / _MANIFEST, lambda path: path.write_text(json.dumps(manifest, indent=1), "utf-8"))

    def _write(self, folder: Path, store: Store, ids: list[str] | None) -> None:
        """Write a file, then the manifest that names it; a file without a manifest is from an interrupted append."""
        there = {path.name.removesuffix(_UNFINISHED) for path in folder.iterdir()}
        names = (f"documents-{i:05d}.safetensors" for i in itertools.count(len(self._files)))
        name = next(name for name in names if name not in there)
        tensors = {}
        for i, slab in enumerate(store.slabs):
            tensors[f"vectors.{i}"] = slab.stored.cpu()
            if slab.scales is not None:
                tensors[f"scales.{i}"] = slab.scales.cpu()
        if ids is not None:
            tensors["ids"] = torch.frombuffer(bytearray(json.dumps(ids).encode()), dtype=torch.uint8)
        _replace(folder / name, lambda path: save_file(tensors, path))
        self._read({"name": name, "documents": len(store)})
        self._commit()

    def _read(self, entry: dict[str, Any]) -> None:
        """Check that a file has the expected tensors, and map it into memory."""
        assert self.folder is not None
        path, width = self.folder / entry["name"], bytes_per_vector(self.quantization, self.dim)
        if not path.exists():
            raise ValueError(f"{path} is missing, which holds {entry['documents']} documents of the collection")
        try:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
                slabs = []
                for i in range(len(self._slabs)):
                    scales = file.get_tensor(f"scales.{i}") if f"scales.{i}" in names else None
                    slabs.append(Slab(file.get_tensor(f"vectors.{i}"), scales))
        except Exception as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        for slab, vectors in zip(slabs, self._slabs, strict=True):
            size = slab.stored.nbytes + (0 if slab.scales is None else slab.scales.nbytes)
            if slab.stored.shape[:2] != (entry["documents"], vectors) or size != entry["documents"] * vectors * width:
                raise ValueError(f"{path} does not hold {entry['documents']} documents of this collection")
        self.stores.append(Store(slabs, self.quantization, self.dim, checked=True))
        self._files.append(entry["name"])
        self._ids.append(path if "ids" in names else None)


def _join(parts: Sequence[tuple[Tensor, Tensor | None]]) -> Slab:
    scales = [scale for _, scale in parts if scale is not None]
    return Slab(torch.cat([stored for stored, _ in parts]), torch.cat(scales) if scales else None)


def _read_ids(ids: list[str] | Path | None) -> list[str]:
    if isinstance(ids, Path):
        with safe_open(ids, framework="pt") as file:
            return json.loads(bytes(file.get_tensor("ids").numpy()))
    assert ids is not None
    return ids


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file completely or not at all, even if the power fails."""
    unfinished = path.with_name(path.name + _UNFINISHED)
    write(unfinished)
    _flush(unfinished)
    os.replace(unfinished, path)
    if os.name == "posix":
        _flush(path.parent)


def _flush(path: Path) -> None:
    """Flush a file or a directory to disk."""
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
