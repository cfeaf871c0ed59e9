"""Where each Meta Token looked: the attention of a backbone over the patches of a picture and the tokens of a text."""

from __future__ import annotations

import copy
import itertools
import math
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..modeling_metaembed import MetaEmbedModel, execution_device

_MOST_BYTES = 4 << 30  # of the attention maps of one input, all layers and heads together
_MARKER = (255, 106, 0)  # the colour of a highlighter at its strongest


class NoAttentionError(ValueError):
    """Says in one sentence why a model, or an input, has no attention to show."""


@dataclass(frozen=True, eq=False)
class Attention:
    """Where the Meta Tokens of one input looked.

    Attributes:
        weights: `[layers, num_meta, L]` float32, the mean over heads, of all tokens of the input: rows sum to one.
        picture: The positions of all tokens of the picture in the input. Empty if it has no picture.
        patches: Those that make the grid, row by row.
        grid: How many rows and columns of patches there are, or `None` if that is not known.
        pieces: The text, piece by piece (most are one token), each with its positions in the input.
        reason: Why there is no grid, if there is a picture and no grid.
    """

    weights: Tensor
    picture: list[int]
    patches: list[int]
    grid: tuple[int, int] | None
    pieces: list[tuple[str, list[int]]]
    reason: str = ""

    def over_picture(self, meta: int, layer: int | None = -1) -> Tensor:
        """Return the attention of Meta Token `meta` to each patch, `[rows, columns]`, as shares of all its attention.

        Args:
            meta: The number of the Meta Token, 0 for the first.
            layer: The number of the layer. None: the mean of all layers.

        Raises:
            NoAttentionError: If there is no picture, or the places of its patches are not known.
        """
        if self.grid is None:
            raise NoAttentionError(self.reason or "this input has no picture.")
        return self._row(meta, layer)[self.patches].view(self.grid)

    def over_text(self, meta: int, layer: int | None = -1) -> list[tuple[str, float]]:
        """Return the pieces of the text, each with its share of the attention of Meta Token `meta`."""
        row = self._row(meta, layer)
        return [(text, row[places].sum().item()) for text, places in self.pieces]

    def share_of_picture(self, meta: int, layer: int | None = -1) -> float:
        """Return how much of its attention Meta Token `meta` gave to the picture, 0 to 1."""
        return self._row(meta, layer)[self.picture].sum().item()

    def _row(self, meta: int, layer: int | None) -> Tensor:
        return self.weights[:, meta].mean(0) if layer is None else self.weights[layer, meta]


class AttentionReader:
    """Reads the attention of a model, which is not changed and may encode in other threads meanwhile.

    Args:
        model: A model of any backbone that can return attentions.

    Example:
        >>> reader = AttentionReader(model)
        >>> reader.read(Image.open("apple.png"), "document").over_picture(meta=0).shape
        torch.Size([14, 14])
    """

    def __init__(self, model: MetaEmbedModel):
        self.model = model
        backbone = getattr(model.backbone, "_orig_mod", model.backbone)  # torch.compile's wrapper cannot be copied
        self._backbone = eager_twin(backbone)

    @torch.no_grad()
    def read(self, item: Any, side: str, num_meta: int | None = None, **kwargs: Any) -> Attention:
        """Return where the Meta Tokens of one input looked.

        Args:
            item: One query or document, as [`MetaEmbedModel.encode_queries`] takes it.
            side: `"query"` or `"document"`.
            num_meta: The first so many Meta Tokens. None: all.
            **kwargs: For the processor, as they were when the input was encoded (`instruction`, `max_pixels`, ...).

        Raises:
            NoAttentionError: If the backbone returns no attention, or it would take too much memory.
        """
        processor, backbone = self.model.processor, self._backbone
        parsed = processor.parse([item])
        num_meta = processor.config.num_tokens(side) if num_meta is None else num_meta
        features = processor.process(parsed, side, num_meta, **kwargs)
        features.pop("num_meta", None)
        input_ids = features["input_ids"]
        _check_memory(backbone, input_ids.shape[1])
        inputs = {
            name: value.to(backbone.dtype) if value.is_floating_point() else value
            for name, value in features.to(execution_device(self.model)).items()
            if isinstance(value, Tensor)
        }
        if self.model._takes_use_cache:
            inputs["use_cache"] = False
        output = backbone(**inputs, output_attentions=True)
        meta, _ = self.model._meta_tokens(input_ids, num_meta)
        weights = _stack_layers(backbone, output, input_ids.shape[1])[:, meta[0].nonzero()[:num_meta, 0].cpu()]
        ids, images = input_ids[0].tolist(), parsed[0].images
        picture = find_patches(self.model, ids)
        if tiles := find_tiles(picture, processor.tokenizer.convert_ids_to_tokens(ids)):
            (patches, grid), reason = tiles, ""
        else:
            size = images[0].size if images and isinstance(images[0], Image.Image) else None
            patches, (grid, reason) = picture, find_grid(len(picture), features, len(images), size)
        texts = [
            part["text"] for message in parsed[0].messages for part in message["content"] if part["type"] == "text"
        ]
        hidden = {*picture, *meta[0].nonzero()[:, 0].tolist()}
        return Attention(weights, picture, patches, grid, _find_text(processor, ids, hidden, texts), reason)


def eager_twin(backbone: Any) -> Any:
    """Return a copy of a backbone that shares its weights, and computes attention so that it can be returned.

    Only the eager attention returns its weights. To switch a model that others use would change what they compute.
    """
    shared = {id(tensor): tensor for tensor in (*backbone.parameters(), *backbone.buffers())}
    twin = copy.deepcopy(backbone, shared)
    try:
        twin.set_attn_implementation("eager")
    except (AttributeError, ValueError) as error:
        raise NoAttentionError(f"{type(backbone).__name__} has no eager attention to look at ({error}).") from error
    return twin.eval()


def find_patches(model: MetaEmbedModel, ids: list[int]) -> list[int]:
    """Return the positions in the ids of an input that stand for the patches of its pictures.

    The backbone's configuration says which token does; where it does not, its processor.
    """
    inner, config = model.processor.backbone_processor, model.backbone.config
    candidates = [getattr(config, name, None) for name in ("image_token_id", "image_token_index")]
    candidates.append(getattr(inner, "image_token_id", None))
    token = next((one for one in candidates if one in ids and one is not None), None)
    return [place for place, id in enumerate(ids) if id == token]


def find_tiles(patches: list[int], tokens: list[str]) -> tuple[list[int], tuple[int, int]] | None:
    """Return the patches of a picture that was cut into tiles, row by row over all of it, and the rows and columns.

    Some processors write the place of a tile before it, as "row_1_col_2", and end with the whole picture in small,
    which is left out here. None: there are no such tiles, or they are not square.

    Args:
        patches: The positions of the patches, in order.
        tokens: All tokens of the input.
    """
    tiles: dict[tuple[int, int], list[int]] = {}
    place = None
    for before, patch in pairwise([-2, *patches]):
        if patch != before + 1:
            label = re.search(r"row_(\d+)_col_(\d+)", tokens[patch - 1])
            place = (int(label[1]), int(label[2])) if label else None
        if place:
            tiles.setdefault(place, []).append(patch)
    rows, columns = (max((place[axis] for place in tiles), default=0) for axis in (0, 1))
    sizes = {len(tile) for tile in tiles.values()}
    side = math.isqrt(max(sizes, default=0))
    if not tiles or len(tiles) != rows * columns or sizes != {side**2}:
        return None
    lines = itertools.product(range(1, rows + 1), range(side), range(1, columns + 1))
    ordered = [tiles[row, column][line * side : (line + 1) * side] for row, line, column in lines]
    return [patch for line in ordered for patch in line], (rows * side, columns * side)


def find_grid(
    count: int, features: Any, images: int, size: tuple[int, int] | None
) -> tuple[tuple[int, int] | None, str]:
    """Return how many rows and columns of patches a picture has, or None and the reason why that is not known.

    What the processor returned tells it: a grid of patches (which the backbone may merge, k x k to a token), or the
    height and width in pixels of what it made of the picture. Only a grid of exactly the patches counts.

    Args:
        count: How many patches there are.
        features: What the processor returned for the input.
        images: How many pictures the input has.
        size: The width and height of the picture, if they are known.
    """
    if images == 0:
        return None, ""
    if images > 1:
        return None, f"this input has {images} pictures: attention is shown for one."
    if count <= 1:
        return (
            None,
            "this backbone does not read the picture as tokens of its input, so attention has no places in it.",
        )
    for name, value in features.items():
        if (
            ("grid" in name or "spatial_shapes" in name)
            and isinstance(value, Tensor)
            and value.shape in ((1, 2), (1, 3))
        ):
            rows, columns = value[0, -2:].tolist()
            merged = math.isqrt(max(1, rows * columns // count))
            if rows % merged == columns % merged == 0 and rows * columns == count * merged**2:
                return (rows // merged, columns // merged), ""
    pixels = features.get("pixel_values")
    shape = tuple(pixels.shape) if isinstance(pixels, Tensor) else ()
    if len(shape) >= 4 and math.prod(shape[:-3]) > 1:
        tiles = math.prod(shape[:-3])
        return (
            None,
            f"this backbone cuts the picture into {tiles} tiles, and its processor does not say where they are.",
        )
    height, width = shape[-2:] if len(shape) >= 4 else (size[1], size[0]) if size else (1, 1)
    rows = round(math.sqrt(count * height / width))
    if rows and count % rows == 0 and abs(math.log(rows * width / (count // rows * height))) < 0.2:
        return (rows, count // rows), ""
    if math.isqrt(count) ** 2 == count and len(shape) < 4:
        return (math.isqrt(count),) * 2, ""
    return None, f"the picture became {count} tokens, and the processor does not say in how many rows."


def highlight(picture: Image.Image, weights: Tensor) -> Image.Image:
    """Return a picture with its patches highlighted, the one with the most attention most.

    Args:
        picture: Any picture.
        weights: `[rows, columns]`, not negative.
    """
    strength = (weights / weights.max().clamp(min=1e-12)).clamp(0, 1).numpy()
    mask = Image.fromarray(np.uint8(strength * 255)).resize(picture.size, Image.Resampling.NEAREST)
    amount = 0.75 * np.asarray(mask, dtype=np.float32)[..., None] / 255  # [height, width, 1]
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    ink = 1 - amount * (1 - np.array(_MARKER, dtype=np.float32) / 255)  # as a marker pen: what is dark stays dark
    return Image.fromarray(np.uint8(pixels * ink))


def _check_memory(backbone: Any, length: int) -> None:
    """Raise if attention maps of an input of `length` tokens would take too much memory."""
    config = backbone.config.get_text_config()
    layers, heads = (getattr(config, name, None) or 1 for name in ("num_hidden_layers", "num_attention_heads"))
    needed = layers * heads * length**2 * backbone.dtype.itemsize
    if needed > _MOST_BYTES:
        raise NoAttentionError(
            f"the attention of {length} tokens takes {needed / 2**30:.1f} GiB, more than {_MOST_BYTES >> 30} GiB: "
            "make the picture smaller or the text shorter."
        )


def _stack_layers(backbone: Any, output: Any, length: int) -> Tensor:
    """Return the attention of every layer that has one, mean over heads: `[layers, L, L]`."""
    layers = [layer for layer in getattr(output, "attentions", None) or () if isinstance(layer, Tensor)]
    whole = [layer[0].float().mean(0).cpu() for layer in layers if layer.shape[-2:] == (length, length)]
    if not whole:
        raise NoAttentionError(f"{type(backbone).__name__} returns no attention between the tokens of its input.")
    return torch.stack(whole)


def _find_text(processor: Any, ids: list[int], hidden: set[int], texts: list[str]) -> list[tuple[str, list[int]]]:
    """Return the user's text by pieces, with positions; all that is no special token if it cannot be told apart."""
    tokenizer = processor.tokenizer
    special = set(tokenizer.all_special_ids)
    places = [place for place in range(len(ids)) if place not in hidden and ids[place] not in special]
    pieces: list[tuple[str, list[int]]] = []
    waiting: list[int] = []
    for place, after in pairwise([*places, None]):
        waiting.append(place)
        text = tokenizer.decode([ids[i] for i in waiting])
        if "�" in text and after == place + 1:  # a part of a letter
            continue
        pieces.append((text, waiting))
        waiting = []
    whole, ends = "", []
    for text, _ in pieces:
        whole += text
        ends.append(len(whole))
    spans = [(start, start + len(text)) for text in map(processor.escape, texts) if (start := whole.find(text)) >= 0]
    if len(spans) < len(texts):
        return pieces
    starts = [0, *ends]
    inside = [any(s < end and start < e for s, e in spans) for start, end in zip(starts, ends, strict=False)]
    return [piece for piece, wanted in zip(pieces, inside, strict=True) if wanted]
