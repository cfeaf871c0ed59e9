"""Fewer dimensions without training: the directions in which embeddings vary most, found in a sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..old_names import warn_renamed
from ..scoring_metaembed import as_stack, check_finite

_ROWS = 1 << 16


@torch.no_grad()
def fit_pca(sample: Any, dim: int) -> Tensor:
    """Find the `dim` orthogonal directions that keep most of the sample's inner products (uncentred PCA).

    Queries and documents are both multiplied by it, so `<q, d>` changes only by the part in the other directions.

    Args:
        sample: Document embeddings `[n, R_c, D]`, a thousand or so; queries may be among them.
        dim: How many dimensions to keep, from 1 to D.

    Returns:
        `[D, dim]` float32, with orthonormal columns, those that keep most first.

    Raises:
        TypeError: if the sample is not of floating point.
        ValueError: if `dim` is not from 1 to D, or the sample is empty or holds NaN or infinity.

    Example:
        >>> fit_pca(torch.tensor([[[3.0, 0.0], [0.0, 1.0]]]), dim=1).abs()
        tensor([[1.],
                [0.]])
    """
    rows = as_stack(sample, "sample").flatten(0, 1)
    if not len(rows):
        raise ValueError("the sample is empty")
    if isinstance(dim, bool) or not isinstance(dim, int) or not 1 <= dim <= rows.shape[1]:
        raise ValueError(f"dim must be a whole number from 1 to {rows.shape[1]}, not {dim!r}")
    check_finite(rows, "sample")
    moments = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
    for part in rows.split(_ROWS):
        moments += (part.float().T @ part.float()).double()
    return torch.linalg.eigh(moments).eigenvectors.flip(1)[:, :dim].float().contiguous()


def fit_rotation(sample: Any, dim: int) -> Tensor:
    """Deprecated name of `fit_pca`."""
    warn_renamed("fit_rotation", "fit_pca")
    return fit_pca(sample, dim)
