"""How long inputs will be as model inputs, estimated before any is read, so that batches pad little."""

from __future__ import annotations

import importlib
import io
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from ..inputs_metaembed import InputPolicy, Item, find_source

_CHARACTERS = 4  # of a token
_PIXELS = 28**2  # of a token, where a processor does not say
_HEARD = 25  # tokens of a second of a recording: most processors make 12 or 25


def estimate_tokens(processor: Any, items: Sequence[Item], policy: InputPolicy) -> list[float]:
    """Return the number of tokens that each input will have, roughly.

    Args:
        processor: A `MetaEmbedProcessor`, whose backbone's processor says what a picture costs if it can.
        items: Parsed inputs.
        policy: What may be read for them: the headers of pictures' and recordings' files are.
    """
    sizes = [image_size(image, policy) for item in items for image in item.images]
    try:  # inference engines ask this of transformers' processors
        counts = iter(processor.backbone_processor._get_num_multimodal_tokens(sizes).num_image_tokens)
    except Exception:  # not all of them answer
        counts = (height * width / _PIXELS for height, width in sizes)
    return [
        item.text_length / _CHARACTERS
        + sum(next(counts) for _ in item.images)
        + _HEARD * sum(seconds(audio, policy) for audio in item.audios)
        for item in items
    ]


def image_size(source: Any, policy: InputPolicy) -> tuple[int, int]:
    """Return (height, width) of a picture in memory or in a file, whose header is read; of others (1, 1)."""
    with suppress(Exception):  # reading the picture will say what is wrong
        if isinstance(source, str | Path) and not str(source).lower().startswith("http"):
            source = find_source(source, policy)
        if isinstance(source, bytes | bytearray):
            source = io.BytesIO(source)
        if isinstance(source, str | Path | io.BytesIO):
            Image.init()
            with Image.open(source, formats=[kind for kind in policy.formats if kind in Image.OPEN]) as image:
                return image.height, image.width
        return tuple(source.shape[:2]) if hasattr(source, "shape") else (source.height, source.width)
    return 1, 1


def seconds(source: Any, policy: InputPolicy) -> float:
    """Return how long a recording in memory or in a file is, whose header is read; of others 1."""
    with suppress(Exception):  # reading the recording will say what is wrong
        if isinstance(source, dict):
            return max(source["array"].shape) / source["sampling_rate"]
        if isinstance(source, str | Path) and not str(source).lower().startswith("http"):
            source = find_source(source, policy)
        file = io.BytesIO(source) if isinstance(source, bytes | bytearray) else source
        if isinstance(file, str | Path | io.BytesIO):
            return importlib.import_module("soundfile").info(file).duration
    return 1
