"""Anything a user may pass as a query or a document, as one plain form: messages of text, image and video parts."""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import torch
from PIL import Image, ImageOps

try:
    import httpx
except ImportError:  # later versions of huggingface_hub bring its successor instead
    from huggingface_hub.utils import httpx

TIMEOUT = 60  # seconds that a server of images may stay silent

ACCEPTED = (
    "a string (text), a PIL image, a pathlib.Path, bytes or an open file of an image, an array [height, width(, "
    "channels)], "
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
    if isinstance(inputs, (np.ndarray, torch.Tensor)):  # [N, height, width, channels] and [N] of strings are batches
        return inputs.ndim < 4 and getattr(inputs.dtype, "kind", None) not in ("U", "O")
    single = (str, bytes, bytearray, dict, Path, Image.Image)
    return inputs is None or isinstance(inputs, single) or _is_file(inputs)


def _is_file(value: Any) -> bool:
    return hasattr(value, "read")


def is_conversation(item: Any) -> bool:
    """Whether `item` is a list of chat messages."""
    return isinstance(item, (list, tuple)) and bool(item) and isinstance(item[0], dict) and "role" in item[0]


def count_images(item: Any) -> int:
    """Return how many images `item` holds, without loading any or checking that it is well formed."""
    if isinstance(item, (list, tuple)):
        return sum(count_images(part) for part in item)
    if isinstance(item, dict):
        if "content" in item:
            return count_images(item["content"])
        return int(item["type"] == "image") if "type" in item else len(_as_list(item.get("image")))
    return int(item is not None and not isinstance(item, str))


def has_video(item: Any) -> bool:
    """Whether `item` holds a video, found without loading any or checking that it is well formed."""
    if isinstance(item, (list, tuple)):
        return any(has_video(part) for part in item)
    if isinstance(item, dict):
        if "content" in item:
            return has_video(item["content"])
        return item["type"] == "video" if "type" in item else item.get("video") is not None
    return False


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
        item: A string (text), a PIL image, a `pathlib.Path`, `bytes` or an open file of an image, an array, a dict
            with `text`, `image` and/or `video` (one or a list of each), or chat messages, whose content may interleave
            them: strings, images, such dicts, or parts with a "type" that hold one text, image or video each (also as
            "url" or "path"). Inside a dict, an image may also be a path, URL or base64 as a string. In a dict, images
            come first and the text last.

    Returns:
        Messages with a "role" and a "content": a list of `{"type": "text", "text": str}`,
        `{"type": "image", "image": PIL.Image.Image}`, upright, RGB, and `{"type": "video", "video": ...}`, with a file
        name or URL, or frames [T, height, width, 3] of `uint8`.

    Raises:
        TypeError: If `item` is none of these.
        ValueError: If it holds neither text nor picture, a part does not hold what its type says, a role is no plain
            word, a text is no valid Unicode, or an image cannot be read.

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
        raise ValueError(f"the input {shorten(repr(item))} holds neither text nor picture. Expected {ACCEPTED}.")
    return messages


def _message(message: Message) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
        raise TypeError(
            f'each chat message must be a dict with a "role" and a "content", got {shorten(repr(message))}.'
        )
    if not re.fullmatch(r"[A-Za-z]\w*", message["role"]):  # the chat template would let it become structure
        raise ValueError(f'the role of a chat message must be a word as "user", got {shorten(repr(message["role"]))}.')
    if unknown := {key for key, value in message.items() if value is not None} - {"role", "content"}:
        raise ValueError(
            f'a chat message takes a "role" and a "content", and nothing else: got {_names(unknown)} too.'
        )
    content = message["content"]
    parts = []
    for part in content if isinstance(content, (list, tuple)) else [content]:
        if isinstance(part, str):
            parts.append(_text(part))
        elif not isinstance(part, dict):
            parts.append(_image(part))
        elif "type" in part:
            parts.append(_typed_part(part))
        elif any(value is not None for value in part.values()):
            parts += _dict_parts(part)
        else:
            raise ValueError(f'a part of a chat message is empty: {shorten(repr(part))}. Expected "text" or "image".')
    return {"role": message["role"], "content": parts}


def _typed_part(part: dict[str, Any]) -> dict[str, Any]:
    kind = part["type"]
    if kind not in ("text", "image", "video"):
        raise ValueError(f'the "type" of a part must be "text", "image" or "video", got {shorten(repr(kind))}.')
    keys = {"text"} if kind == "text" else {kind, "url", "path"}  # transformers' names for where an image or video is
    held = {key: value for key, value in part.items() if key != "type" and value is not None}  # tables fill with None
    if len(held) != 1 or not held.keys() <= keys:
        raise ValueError(f'a part of type "{kind}" must hold one of {_names(keys)}, got {_names(held)}.')
    (value,) = held.values()
    if kind == "video":
        return {"type": "video", "video": read_video(value)}
    return _text(value) if kind == "text" else _image(value)


def _names(keys: Iterable[Any]) -> str:
    return shorten(repr(sorted(map(str, keys))))


def _dict_parts(item: dict[str, Any]) -> list[dict[str, Any]]:
    if unknown := set(item) - {"text", "image", "video"}:
        raise ValueError(f'unknown keys {_names(unknown)} in {_names(item)}. Use "text", "image", "video".')
    parts = [_image(image) for image in _as_list(item.get("image"))]
    videos: Any = item.get("video")
    if not _is_list_of_videos(videos):
        videos = [] if videos is None else [videos]
    parts += [{"type": "video", "video": read_video(video)} for video in videos]
    if item.get("text") is not None:
        parts.append(_text(item["text"]))
    return parts


def _text(text: Any) -> dict[str, Any]:
    return {"type": "text", "text": check_text("text", text)}


def check_text(name: str, text: Any) -> str:
    """Return `text` if it is a string of valid Unicode, what a tokenizer can take.

    Args:
        name: What the text is called in the error.
        text: The text to check.

    Raises:
        TypeError: If `text` is no string.
        ValueError: If it holds a lone surrogate, half a character.
    """
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a string, got {shorten(repr(text))} of type {type(text).__name__}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} must be valid Unicode, got {shorten(repr(text))}, whose character {error.start} is half of one "
            f"({text[error.start]!r}). Decode its bytes anew, with errors='replace' if need be."
        ) from error
    return text


def shorten(text: str, length: int = 100) -> str:
    """Return `text` without its middle where it is long, for errors: an image as base64 has a million characters."""
    half = length // 2
    return text if len(text) <= length else f"{text[:half]}...{text[-half:]}"


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
    so that the same picture gives the same pixels in every mode that can hold it. A PIL image of mode "I" or "I;16"
    has 16 bits, and one of mode "F" lies in 0..1 or 0..255. One whose values may as well mean the other is refused:
    "I" up to 255, which `convert("I")` makes of 8 bits, where it does not come from a file of 16 bits; and "F" of
    zeros and ones alone.

    Args:
        source: A PIL image, a path, a URL, data URL or base64 string, bytes, an open file, or an array or tensor
            [height, width(, channels)] of `uint8`, `uint16`, bool, or float in 0..1.

    Returns:
        A PIL image of mode RGB.

    Raises:
        TypeError: If `source` is of another type.
        ValueError: If it cannot be read as an image, has several pages or frames, or the scale of its pixels is
            unclear.
    """
    kinds = (Image.Image, str, Path, bytes, bytearray, np.ndarray, torch.Tensor)
    if not isinstance(source, kinds) and not _is_file(source):
        raise TypeError(f"{_unusable(source)}. Expected {ACCEPTED}.")
    try:
        image = _open(source)
        if 0 in image.size:
            raise ValueError(f"it has no pixels: its (width, height) is {image.size}")
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format not in ("MPO", "PSD"):  # one picture, and what it was made with
            raise ValueError(
                f"it has {frames} pages or frames. Pass the one that is meant, as PIL's image.seek(i) and then "
                "image.copy() give it, or all of them, as a list of images or the frames of a video"
            )
        image.load()  # a truncated file fails here, and not as a half-grey picture later
        return _to_rgb(ImageOps.exif_transpose(image), image.format)
    except Exception as error:  # PIL's decoders raise almost anything
        name = repr(source) if isinstance(source, (str, Path)) else f"of type {type(source).__name__}"
        raise ValueError(
            f"the image {shorten(name)} cannot be read: {shorten(str(error) or repr(error), 300)}"
        ) from error


def _open(source: Any) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        source = (source.double() if source.is_floating_point() else source).numpy()  # numpy has no bfloat16
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, str) and not os.path.isfile(source):
        source = _download(source)
    return Image.open(io.BytesIO(source) if isinstance(source, (bytes, bytearray)) else source)


def _download(source: str) -> bytes:
    """Return the bytes that a URL or a base64 string stands for."""
    scheme = source.partition(":")[0].lower()
    if scheme in ("http", "https"):
        response = httpx.get(source, timeout=TIMEOUT, follow_redirects=True)
        if not response.is_success:
            raise ValueError(f"the server answered {response.status_code} {response.reason_phrase}")
        return response.content
    if scheme == "data":
        with urlopen(source) as data:
            return data.read()
    try:
        return base64.b64decode("".join(source.split()), validate=True)
    except ValueError as error:
        raise ValueError("there is no such file, and it is neither a URL nor base64") from error


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ValueError(f"an array must be [height, width] or [height, width, 1, 3 or 4], got shape {array.shape}")
    if not array.size:
        raise ValueError(f"an array must hold pixels, got shape {array.shape}")
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


def _to_rgb(image: Image.Image, file_format: str | None) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # PIL would clip these to 255 instead of scaling them
        return _grey_to_rgb(np.asarray(image), image.mode, file_format, image.info.get("transparency"))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _grey_to_rgb(array: np.ndarray, mode: str, file_format: str | None, transparent: int | None) -> Image.Image:
    low, high = array.min(), array.max()
    if mode == "F":
        white = 1 if high <= 1 else 255
        known = high > 1 or (array % 1).any()  # zeros and ones may be a mask, or a dark picture of 0..255
    else:
        white = 65535
        # Files of mode "I;16" are of 16 bits, and so are these of mode "I"; what convert("I") made of 8 bits is not.
        known = high > 255 or file_format in ("PNG", "PPM") or (mode != "I" and file_format is not None)
    if not 0 <= low <= high <= white:  # so is none with a NaN
        raise ValueError(f"pixels of a mode {mode} image must lie in 0..{white}, got {low}..{high}")
    if high > 0 and not known:
        raise ValueError(
            f"its mode {mode} and pixels of {low}..{high} leave open what is white. Where 255 is, pass "
            "image.convert('L'); else pass an array of uint16, or of floats in 0..1"
        )
    grey = _to_8_bits(array, white)
    if transparent is not None:
        grey[array == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def as_batch(inputs: Any) -> list[Any]:
    """Return a batch of inputs as a list.

    Raises:
        TypeError: If `inputs` is not a sequence of inputs: no iterable, or one without rows in order.
    """
    if not isinstance(inputs, Iterable):
        raise TypeError(f"{_unusable(inputs)}. Expected {ACCEPTED}, or a list.")
    if isinstance(inputs, (Set, Mapping)) or hasattr(inputs, "columns"):  # a table gives the names of its columns
        raise TypeError(
            f"{_unusable(inputs)} as a batch: it is no sequence of inputs in order. Pass a list, such as one column "
            "of a table, or a dict for each of its rows."
        )
    return list(inputs)


def _unusable(value: Any) -> str:
    return f"cannot encode {shorten(repr(value))} of type {type(value).__name__}"
