"""Quantization: document vectors in few bytes, and the rounding of the queries that are scored with them.

    float32    4 bytes a dimension; queries as they are
    bfloat16   2 bytes; queries rounded to bfloat16
    int8       1 byte (the value + 128) and a float32 scale a vector; queries rounded to int8, with a scale each
    int4       4 bits (the value + 8, even dimensions in the low half) and a scale; queries as for int8
    binary     1 bit (the sign, lowest bit first) and a scale; queries as for int8

Products are always summed in float32 or exactly. A vector of zeros has the scale 0, and so the score 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUANTIZATIONS = ("float32", "bfloat16", "int8", "int4", "binary")
_STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_PARTS = (1.0, 0.9, 0.8, 0.7, 0.6)  # of the largest value, that int4 tries as the largest it can express


def check_quantization(quantization: str) -> str:
    """Return `quantization`, or raise if it does not exist."""
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, not {quantization!r}")
    return quantization


def bytes_per_vector(quantization: str, dim: int) -> int:
    """Return the bytes of a vector, with its scale."""
    return {"float32": 4 * dim, "bfloat16": 2 * dim, "int8": dim + 4, "int4": (dim + 1) // 2 + 4}.get(
        quantization, (dim + 7) // 8 + 4
    )


def encode(vectors: Tensor, quantization: str) -> tuple[Tensor, Tensor | None]:
    """Quantize float vectors `[..., D]`: the stored values, and their scales `[...]` float32, if any."""
    if quantization in _STORED:
        return vectors.to(_STORED[quantization]), None
    x = vectors.float()
    if quantization == "int8":
        levels, scales = query_levels(x)
        return (levels + 128).to(torch.uint8), scales
    if quantization == "int4":
        return _encode_int4(x)
    # This scale makes the product of the sign with the vector itself exact: <x, scale * sign(x)> = <x, x>.
    total = x.abs().sum(dim=-1)
    scales = x.square().sum(dim=-1) / total.clamp_min(torch.finfo(torch.float32).tiny)
    weights = 2 ** torch.arange(8, device=x.device)
    return (_pad(x >= 0, 8).unflatten(-1, (-1, 8)) * weights).sum(dim=-1).to(torch.uint8), scales


def decode(stored: Tensor, scales: Tensor | None, quantization: str, dim: int) -> Tensor:
    """Return the values that `encode` stored as float32 vectors `[..., dim]`."""
    if scales is None:
        return stored.float()
    if quantization == "int8":
        levels = stored.float() - 128
    elif quantization == "int4":
        levels = torch.stack([stored & 15, stored >> 4], dim=-1).flatten(-2)[..., :dim].float() - 8
    else:
        bits = (stored[..., None] >> torch.arange(8, device=stored.device)) & 1
        levels = bits.flatten(-2)[..., :dim].float() * 2 - 1
    return levels * scales[..., None]


def query_levels(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Round vectors `[..., D]` to whole numbers from -127 to 127 and the scales `[...]` that undo it, all float32."""
    scales = vectors.abs().amax(dim=-1) / 127
    return (vectors / _nonzero(scales)[..., None]).round().clamp(-127, 127), scales


def round_queries(queries: Tensor, quantization: str) -> Tensor:
    """Return queries `[Q, r_q, D]`, rounded as for documents of this quantization, float32."""
    if quantization == "float32":
        return queries
    if quantization == "bfloat16":
        return queries.bfloat16().float()
    levels, scales = query_levels(queries)
    return levels * scales[..., None]


def _encode_int4(x: Tensor) -> tuple[Tensor, Tensor]:
    """Try a few scales and keep the best: with 15 levels, clipping a rare large value reduces the total error."""
    most = x.abs().amax(dim=-1) / 7
    best = torch.full_like(most, torch.inf)
    scales, levels = most, torch.zeros_like(x)
    for part in _PARTS:
        tried = most * part
        rounded = (x / _nonzero(tried)[..., None]).round().clamp(-7, 7)
        loss = (rounded * tried[..., None] - x).square().sum(dim=-1)
        better = loss < best
        best, scales = torch.where(better, loss, best), torch.where(better, tried, scales)
        levels = torch.where(better[..., None], rounded, levels)
    pairs = _pad((levels + 8).to(torch.uint8), 2).unflatten(-1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4, scales


def _nonzero(scales: Tensor) -> Tensor:
    return torch.where(scales > 0, scales, 1)


def _pad(x: Tensor, multiple: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % multiple))
