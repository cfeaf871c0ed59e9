"""Anything a user may pass as a query or a document, as one plain form: messages of text, image and video parts."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_utils import load_image

ACCEPTED = (
    "a string (text), a PIL image, a pathlib.Path or bytes of an image, a numpy array [height, width(, channels)], "
    'a dict with "text", "image" (one or a list; a path, URL, PIL image, bytes or array each) and/or "video" (a path '
    "or URL, a list of images or an array [frames, height, width, 3]; or a list of these), "
    'or chat messages [{"role": ..., "content": ...}]'
)

# {"role": str, "content": [{"type": "text", "text": str}, {"type": "image", "image": PIL image},
#                           {"type": "video", "video": file name or URL, or frames [T, height, width, 3]}, ...]}
Message = dict[str, Any]


def is_single(inputs: Any) -> bool:
    """Whether `inputs` is one query or document, and not a batch of them.

    Lists and tuples are batches, except chat messages (a list of dicts with a "role"), which are one input.
    """
    if is_conversation(inputs):
        return True
    if isinstance(inputs, np.ndarray):  # [N] of strings or objects and [N, height, width, channels] are batches
        return inputs.dtype.kind not in "UO" and inputs.ndim < 4
    return inputs is None or isinstance(inputs, (str, bytes, dict, Path, Image.Image, torch.Tensor))


def is_conversation(item: Any) -> bool:
    """Whether `item` is a list of chat messages."""
    return isinstance(item, (list, tuple)) and bool(item) and isinstance(item[0], dict) and "role" in item[0]


def count_images(item: Any) -> int:
    """Return how many images `item` holds, without loading any."""
    if is_conversation(item):
        return sum(count_images(message["content"]) for message in item)
    if isinstance(item, (list, tuple)):
        return sum(count_images(part) for part in item)
    if isinstance(item, dict):
        elsewhere = None if item.get("type") == "video" else item.get("url") or item.get("path")
        return len(_as_list(item.get("image", elsewhere)))
    return int(item is not None and not isinstance(item, str))


def has_video(item: Any) -> bool:
    """Whether `item` holds a video, found without loading any."""
    if is_conversation(item):
        return any(has_video(message["content"]) for message in item)
    if isinstance(item, (list, tuple)):
        return any(has_video(part) for part in item)
    return isinstance(item, dict) and (item.get("video") is not None or item.get("type") == "video")


def text_length(item: Any) -> int:
    """Return the number of characters of text in `item`, to sort batches by."""
    if isinstance(item, str):
        return len(item)
    if isinstance(item, dict):
        return text_length(item.get("text", "") or "") + text_length(item.get("content", "") or "")
    if isinstance(item, (list, tuple)):
        return sum(text_length(part) for part in item)
    return 0


def to_messages(item: Any) -> list[Message]:
    """Turn one query or document into chat messages whose content is a list of parts.

    Args:
        item: A string (text), a PIL image, a `pathlib.Path` or `bytes` of an image, an array, a dict with `text`,
            `image` and/or `video` (one or a list of each), or chat messages, whose content may interleave them. Inside
            a dict, an image may also be a path or a URL as a string. In a dict, images come first and the text last.

    Returns:
        Messages with a "role" and a "content": a list of `{"type": "text", "text": str}`,
        `{"type": "image", "image": PIL.Image.Image}`, upright, RGB, and `{"type": "video", "video": ...}`, with a file
        name or URL, or frames [T, height, width, 3] of `uint8`.

    Raises:
        TypeError: If `item` is none of these.
        ValueError: If it holds neither text nor picture, or an image cannot be read.

    Example:
        >>> to_messages({"text": "a red apple"})
        [{'role': 'user', 'content': [{'type': 'text', 'text': 'a red apple'}]}]
    """
    if is_conversation(item):
        messages = [_message(message) for message in item]
    elif isinstance(item, dict):
        messages = [{"role": "user", "content": _dict_parts(item)}]
    elif isinstance(item, str):
        messages = [{"role": "user", "content": [_text(item)]}]
    else:
        messages = [{"role": "user", "content": [_image(item)]}]
    if not any(message["content"] for message in messages):
        raise ValueError(f"the input {item!r} holds neither text nor picture. Expected {ACCEPTED}.")
    return messages


def _message(message: Message) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
        raise TypeError(f'each chat message must be a dict with a "role" and a "content", got {message!r}.')
    content = message["content"]
    parts = []
    for part in content if isinstance(content, (list, tuple)) else [content]:
        if isinstance(part, str):
            parts.append(_text(part))
        elif isinstance(part, dict):
            kind = part.get("type")
            part = {key: value for key, value in part.items() if key != "type"}
            if "url" in part or "path" in part:  # transformers' other names for where an image or a video is
                part["video" if kind == "video" else "image"] = part.pop("url", None) or part.pop("path", None)
            parts += _dict_parts(part)
        else:
            parts.append(_image(part))
    return {"role": message["role"], "content": parts}


def _dict_parts(item: dict[str, Any]) -> list[dict[str, Any]]:
    if unknown := set(item) - {"text", "image", "video"}:
        raise ValueError(
            f'unknown keys {sorted(map(str, unknown))} in {sorted(map(str, item))}. Use "text", "image", "video".'
        )
    parts = [_image(image) for image in _as_list(item.get("image"))]
    videos: Any = item.get("video")
    if not _is_list_of_videos(videos):
        videos = [] if videos is None else [videos]
    parts += [{"type": "video", "video": read_video(video)} for video in videos]
    if item.get("text") is not None:
        parts.append(_text(item["text"]))
    return parts


def _text(text: Any) -> dict[str, Any]:
    if not isinstance(text, str):
        raise TypeError(f"text must be a string, got {text!r} of type {type(text).__name__}.")
    return {"type": "text", "text": text}


def _image(image: Any) -> dict[str, Any]:
    return {"type": "image", "image": read_image(image)}


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return list(value)
    return [] if value is None else [value]


def _is_list_of_videos(videos: Any) -> bool:
    """A list of images is one video: its frames. A list of anything else is a list of videos."""
    if not isinstance(videos, (list, tuple)) or not videos:
        return False
    first = videos[0]
    return isinstance(first, (str, Path, list, tuple)) or getattr(first, "ndim", 0) == 4


def read_video(source: Any) -> str | np.ndarray:
    """Return a video as what transformers' video processors take.

    Args:
        source: A path or URL, which the backbone's video processor will read and sample frames from, as it is set up
            to; or frames, all of which are used: an array or tensor [frames, height, width, 3], or a list of images.

    Returns:
        The path or URL, or the frames [T, height, width, 3] of `uint8`, RGB.

    Raises:
        TypeError: If `source` is of another type.
        ValueError: If there are no frames, they differ in size, or one cannot be read.
    """
    if isinstance(source, (str, Path)):
        return str(source)
    if not isinstance(source, (list, tuple, np.ndarray, torch.Tensor)):
        raise TypeError(f"cannot read a video of type {type(source).__name__}. Expected {ACCEPTED}.")
    frames = [np.asarray(read_image(frame)) for frame in source]
    if len({frame.shape for frame in frames}) != 1:
        raise ValueError(f"the frames of a video must be of one size, got {[frame.shape[:2] for frame in frames]}.")
    return np.stack(frames)


def read_image(source: Any) -> Image.Image:
    """Read an image from wherever it is, as an upright RGB picture.

    The EXIF orientation is applied, transparency is composed on white, 16-bit and float pictures are scaled to 8 bits,
    so that the same picture gives the same pixels in every mode that can hold it.

    Args:
        source: A PIL image, a path, a URL or base64 string, bytes, or an array or tensor
            [height, width(, channels)] of `uint8`, `uint16`, bool, or float in 0..1.

    Returns:
        A PIL image of mode RGB.

    Raises:
        TypeError: If `source` is of another type.
        ValueError: If it cannot be read as an image.
    """
    name = repr(source) if isinstance(source, (str, Path)) else f"of type {type(source).__name__}"
    try:
        if isinstance(source, Image.Image):
            image = source
        elif isinstance(source, (str, Path)):
            image = Image.open(source) if Path(source).is_file() else load_image(str(source))
        elif isinstance(source, (bytes, bytearray)):
            image = Image.open(io.BytesIO(source))
        elif isinstance(source, (np.ndarray, torch.Tensor)):
            image = _from_array(np.asarray(source))
        else:
            raise TypeError(f"cannot encode {source!r} of type {type(source).__name__}. Expected {ACCEPTED}.")
        image.load()  # a truncated file fails here, and not as a half-grey picture later
        return _to_rgb(ImageOps.exif_transpose(image))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"the image {name} cannot be read: {error}") from error


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ValueError(f"an array must be [height, width] or [height, width, 1, 3 or 4], got shape {array.shape}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.dtype == np.bool_:
        array = array * np.uint8(255)
    elif array.dtype == np.uint16:
        array = _to_8_bits(array, 65535)
    elif array.dtype.kind == "f":
        if not np.isfinite(array).all() or array.min(initial=0) < 0 or array.max(initial=0) > 1:
            raise ValueError("a float array must hold values in 0..1")
        array = _to_8_bits(array, 1)
    elif array.dtype != np.uint8:
        raise ValueError(f"an array must be uint8, uint16, bool or float in 0..1, got {array.dtype}")
    return Image.fromarray(array)


def _to_8_bits(array: np.ndarray, white: float) -> np.ndarray:
    return np.rint(array.astype(np.float64) * (255 / white)).astype(np.uint8)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # PIL would clip these to 255 instead of scaling them
        array = np.asarray(image)
        low, high = array.min(), array.max()
        white = 65535 if image.mode.startswith("I") else (1 if high <= 1 else 255)
        if low < 0 or high > white:
            raise ValueError(f"pixels of a mode {image.mode} image must lie in 0..{white}, got {low}..{high}")
        image = Image.fromarray(_to_8_bits(array, white))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def as_batch(inputs: Any) -> list[Any]:
    """Return a batch of inputs as a list.

    Raises:
        TypeError: If `inputs` is not a sequence of inputs.
    """
    if not isinstance(inputs, Iterable):
        raise TypeError(f"cannot encode {inputs!r} of type {type(inputs).__name__}. Expected {ACCEPTED}, or a list.")
    return list(inputs)
