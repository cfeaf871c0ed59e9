"""Other implementations of MaxSim, called as their users do: queries [Q, r_q, D] and documents [N, r_c, D]."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from sentence_transformers.util import maxsim as sentence_transformers_maxsim
from torch import Tensor

Scorer = Callable[[Tensor, Tensor], Tensor]

APART = Path(__file__).parent.parent / ".venv-peers"  # for packages that pin other versions of our dependencies
PINS = ["fast-maxsim==0.2.0", "colpali-engine==0.3.18"]


def install_peers() -> None:
    """Install the peers that pin other versions of our dependencies into a folder outside the environment."""
    if not APART.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(APART), *PINS]
        subprocess.run(command, check=True)
    sys.path.append(str(APART))


def find_peers() -> dict[str, Scorer]:
    """Return the peers that can be imported, by name."""
    peers: dict[str, Scorer] = {
        "sentence-transformers": sentence_transformers,
        "pylate's formula (einsum, in chunks)": einsum,
    }
    try:
        colpali = importlib.import_module("colpali_engine.utils.processing_utils").BaseVisualRetrieverProcessor
        peers["colpali-engine"] = lambda q, d: colpali.score_multi_vector(q, d, device="cpu")
    except ImportError as error:
        print(f"colpali-engine is left out: {error}", file=sys.stderr)
    try:
        fast = importlib.import_module("fast_maxsim")
        peers["fast-maxsim"] = lambda q, d: fast_maxsim(fast, q, d)
    except ImportError as error:
        print(f"fast-maxsim is left out: {error}", file=sys.stderr)
    return peers


def sentence_transformers(queries: Tensor, documents: Tensor) -> Tensor:
    """Score with masks; without them it looks for all-zero vectors itself."""
    masks = (torch.ones(x.shape[:2], dtype=torch.bool) for x in (queries, documents))
    return sentence_transformers_maxsim(queries, documents, *masks)


def einsum(queries: Tensor, documents: Tensor, chunk: int = 500) -> Tensor:
    """Score like pylate, a chunk of documents at a time so that the products fit in memory."""
    parts = [torch.einsum("ash,bth->abst", queries, part).amax(dim=-1).sum(dim=-1) for part in documents.split(chunk)]
    return torch.cat(parts, dim=1)


def fast_maxsim(module: object, queries: Tensor, documents: Tensor) -> Tensor:
    """Score one query after the other: the only way it has for documents of equal length."""
    arrays = documents.numpy()
    return torch.stack([torch.as_tensor(module.maxsim_scores(query.numpy(), arrays)) for query in queries])
