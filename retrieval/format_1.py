"""Folders of format 1, which `EmbeddingCollection` wrote: read as they are, before anything is migrated."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .snapshot import Manifest, check_ids
from .storage import DamagedIndexError, check_kept, check_regular

MANIFEST = "collection.json"

_PCA = "rotation.safetensors"
_NAME = re.compile(r"documents-[0-9]{5,12}\.safetensors")
_MOST_MANIFEST = 1 << 26  # bytes


@dataclass(frozen=True)
class FormatOne:
    """What a folder of format 1 holds. `pieces` are memory-mapped."""

    manifest: Manifest
    pca: bytes | None
    ids: list[str]
    pieces: list[list[Tensor]]
    files: list[Path]


def read_format_1(folder: Path) -> FormatOne:
    """Read a folder of format 1.

    Raises:
        DamagedIndexError: if a file is missing, or is not what was written.
    """
    path = folder / MANIFEST
    check_regular(path)
    try:
        if path.stat().st_size > _MOST_MANIFEST:
            raise ValueError("it is too large")
        given = json.loads(path.read_text(encoding="utf-8"))
        if given["format"] != 1:
            raise ValueError(f"it is of format {given['format']!r}")
        entries = [(entry["name"], entry["documents"]) for entry in given["files"]]
        if any(not isinstance(name, str) or not _NAME.fullmatch(name) for name, _ in entries):
            raise ValueError("it names files that are none of an index")
        if any(type(n) is not int or not 0 < n < 1 << 48 for _, n in entries):
            raise ValueError("it gives numbers of documents that are none")
        kept = check_kept(given["precision"], given["vectors"])
        pca = _read(folder / _PCA)["rotation"] if given["rotation"] else None
        if pca is not None and (pca.dtype != torch.float32 or pca.ndim != 2 or len(pca) != given["input_dim"]):
            raise ValueError("its PCA is of another shape")
        shape = {"vectors": given["vectors"], "dim": given["input_dim"], "kept": kept}
        shape["kept_dim"] = given["input_dim"] if pca is None else pca.shape[1]
        whole = {**shape, "rows": sum(n for _, n in entries), "format": 2}
        manifest = Manifest.read(whole, path)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, DamagedIndexError):
            raise
        raise DamagedIndexError(f"{path} is damaged: it does not describe an index of format 1 ({error})") from error

    pieces, ids = [], []
    for name, documents in entries:
        tensors = _read(folder / name)
        piece = [tensors.get(f"{part.kind}.{part.slab}") for part in manifest.layout.parts]
        for part, tensor in zip(manifest.layout.parts, piece, strict=True):
            if tensor is None or tensor.dtype != part.dtype or tensor.shape != (documents, *part.shape):
                raise DamagedIndexError(f"{folder / name} is damaged: it does not hold {documents} documents")
        pieces.append(piece)
        ids += _ids(tensors["ids"], documents, folder / name) if "ids" in tensors else [None] * documents
    if None in ids:
        if any(i is not None for i in ids):
            raise DamagedIndexError(f"{folder} is damaged: only some of its documents have ids")
        ids = [str(i) for i in range(len(ids))]
    if len(set(ids)) < len(ids):
        raise DamagedIndexError(f"{folder} is damaged: some ids are there twice")
    raw = None if pca is None else pca.contiguous().numpy().tobytes()
    files = [path, *([folder / _PCA] if pca is not None else []), *(folder / name for name, _ in entries)]
    return FormatOne(manifest, raw, ids, pieces, files)


def _read(path: Path) -> dict[str, Tensor]:
    check_regular(path)
    if not path.exists():
        raise DamagedIndexError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except Exception as error:
        raise DamagedIndexError(f"{path} is damaged: {error}") from error


def _ids(stored: Tensor, documents: int, path: Path) -> list[Any]:
    try:
        ids = check_ids(json.loads(bytes(stored.numpy())))
        if len(ids) == documents:
            return ids
    except (TypeError, ValueError):
        pass
    raise DamagedIndexError(f"{path} is damaged: it does not hold {documents} ids")
