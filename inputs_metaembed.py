"""What a user may pass as a query or a document, parsed once into an [`Item`], and what may be read for it."""

from __future__ import annotations

import base64
import io
import os
import re
import reprlib
import struct
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from .configuration_metaembed import of_package

ACCEPTED = (
    "a string (text), a PIL image, a pathlib.Path, bytes or an open file of an image, an array [height, width(, "
    'channels)], a dict with "text", "image", "video" and/or "audio" (one or a list of each; a path or URL, or an '
    "image also as above, a video as a list of images or an array [frames, height, width, 3], a recording as bytes or "
    '{"array": ..., "sampling_rate": ...}), or chat messages [{"role": ..., "content": ...}]'
)
SOURCES = {  # by kind, in the order in which those of a dict come, the text last
    "image": (Image.Image, str, Path, bytes, bytearray, np.ndarray, torch.Tensor),
    "video": (str, Path, list, tuple, np.ndarray, torch.Tensor),
    "audio": (str, Path, bytes, bytearray),
}

Array = np.ndarray[Any, Any]
Part = dict[str, Any]  # {"type": "text", "text": str}, or {"type": "image"}, "video" or "audio": the place of one
Message = dict[str, Any]  # {"role": str, "content": list of parts}


@dataclass(frozen=True)
class InputPolicy:
    """What may be read and fetched for an input. The default suits a person who encodes their own files.

    Data URLs, base64, bytes and open files are always read, within the limits. Proxies are not used.

    Example:
        >>> model.policy = InputPolicy.server()  # no files of this machine, no URLs
    """

    schemes: tuple[str, ...] = ("http", "https")  # of URLs that may be fetched
    hosts: tuple[str, ...] | None = None  # patterns of hosts to fetch from, such as "*.example.com"; None: any
    folders: tuple[str | Path, ...] | None = None  # whose files may be read, links followed; None: any file
    private_addresses: bool = False  # whether hosts may have private, loopback and other addresses that are not public
    max_bytes: int = 2**28  # of a file, and of what a URL serves, after decompression
    max_pixels: int = 89_478_485  # of a picture, checked before decoding; PIL has its own Image.MAX_IMAGE_PIXELS too
    max_seconds: float = 3600  # of a recording, of which no more is decoded
    timeout: float = 60  # seconds that fetching one URL may take in all
    formats: tuple[str, ...] = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "HEIF")  # of pictures

    @classmethod
    def server(cls, **changes: Any) -> InputPolicy:
        """Return a policy for inputs of strangers: no file of this machine and no URL, but for `changes`."""
        return cls(**{"schemes": (), "folders": (), **changes})


@dataclass(frozen=True)
class Item:
    """One query or document, checked in form. Pictures, videos and recordings are as the user passed them."""

    messages: list[Message]  # with a mere place for each picture, video and recording
    media: dict[str, list[Any]]  # of each kind, in order
    text_length: int

    def load(self, policy: InputPolicy, stack: ExitStack, rate: int, seconds: float | None) -> dict[str, list[Any]]:
        """Read what there is of each kind: see [`read_image`], [`read_video`] and [`read_audio`]."""
        images = [read_image(image, policy) for image in self.images]
        videos = [read_video(video, policy, stack) for video in self.videos]
        return {"image": images, "video": videos, "audio": [read_audio(a, policy, rate, seconds) for a in self.audios]}

    images = property(lambda self: self.media["image"])
    videos = property(lambda self: self.media["video"])
    audios = property(lambda self: self.media["audio"])
    num_images = property(lambda self: len(self.images))


def is_single(inputs: Any) -> bool:
    """Whether `inputs` is one query or document. Lists and tuples are batches, except chat messages."""
    if isinstance(inputs, (np.ndarray, torch.Tensor)):  # [N, height, width, channels] and [N] of strings are batches
        return inputs.ndim < 4 and getattr(inputs.dtype, "kind", None) not in ("U", "O")
    single = (str, bytes, bytearray, dict, Path, Image.Image, Item, type(None))
    return isinstance(inputs, single) or hasattr(inputs, "read") or is_conversation(inputs) or _is_recording(inputs)


def is_batch(inputs: Any) -> bool:
    """Whether `inputs` has inputs in order: a table would give the names of its columns."""
    return isinstance(inputs, Iterable) and not isinstance(inputs, (Set, Mapping)) and not hasattr(inputs, "columns")


def is_conversation(value: Any) -> bool:
    """Whether `value` is a list of chat messages."""
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], dict) and "role" in value[0]


def _is_recording(value: Any) -> bool:
    """Whether `value` is a recording in memory as sentence-transformers and datasets have it: a dict, or a decoder."""
    return "array" in value if isinstance(value, dict) else hasattr(value, "get_samples_played_in_range")


def parse_all(inputs: Any) -> list[Item]:
    """Return the [`Item`]s of one input or a batch of them, in order. Errors name an input by its place."""
    if not is_single(inputs) and not is_batch(inputs):
        kind = type(inputs).__name__
        raise TypeError(
            f"cannot encode a {kind}: it is no sequence of inputs in order. Expected a list of {ACCEPTED}."
        )
    items = []
    for index, value in enumerate([inputs] if is_single(inputs) else inputs):
        with naming(index):
            items.append(parse(value))
    return items


@contextmanager
def naming(index: int) -> Iterator[None]:
    """Name the input in errors about it."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise (TypeError if isinstance(error, TypeError) else ValueError)(f"input {index}: {error}") from error


def parse(value: Any) -> Item:
    """Parse one query or document, which is as [`ACCEPTED`] says. Nothing is read, fetched or decoded.

    The content of chat messages may interleave strings, images, dicts, and parts with a "type" that hold one text,
    image, video or recording each (also as "url" or "path").

    Raises:
        TypeError: If `value` is none of these.
        ValueError: If it is empty or malformed, or a text is not valid Unicode.
    """
    if isinstance(value, Item):
        return value
    if is_conversation(value):
        messages = [_parse_message(message) for message in value]
    else:
        messages = [{"role": "user", "content": _parse_parts(value)}]
    parts = [part for message in messages for part in message["content"]]
    if not parts:
        raise ValueError(f"the input {shorten(value)} holds neither text nor picture. Expected {ACCEPTED}.")
    media = {kind: [part.pop(kind) for part in parts if part["type"] == kind] for kind in SOURCES}
    return Item(messages, media, sum(len(part.get("text", "")) for part in parts))


def _parse_message(message: Any) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
        raise TypeError(f'each chat message must be a dict with a "role" and a "content", got {shorten(message)}.')
    role, content = message["role"], message["content"]
    if not re.fullmatch(r"[A-Za-z]\w*", role):  # the chat template would let it become structure
        raise ValueError(f'the role of a chat message must be a word as "user", got {shorten(role)}.')
    if unknown := {key for key, value in message.items() if value is not None} - {"role", "content"}:
        raise ValueError(f'a chat message takes only a "role" and a "content", got {_names(unknown)} too.')
    parts = []
    for piece in content if isinstance(content, (list, tuple)) else [content]:
        if isinstance(piece, dict) and all(value is None for value in piece.values()):
            raise ValueError(f'a part of a chat message is empty: {shorten(piece)}. Expected "text" or "image".')
        parts += _parse_typed(piece) if isinstance(piece, dict) and "type" in piece else _parse_parts(piece)
    return {"role": role, "content": parts}


def _parse_typed(part: dict[str, Any]) -> list[Part]:
    kind = part["type"]
    if kind not in ("text", *SOURCES):
        raise ValueError(f'the "type" of a part must be "text", "image", "video" or "audio", got {shorten(kind)}.')
    keys = {"text"} if kind == "text" else {kind, "url", "path"}  # transformers' names for where an image is
    held = {key: value for key, value in part.items() if key != "type" and value is not None}  # tables fill with None
    if len(held) != 1 or not held.keys() <= keys:
        raise ValueError(f'a part of type "{kind}" must hold one of {_names(keys)}, got {_names(held)}.')
    return [_part(kind, *held.values())]


def _parse_parts(value: Any) -> list[Part]:
    """Return the parts of a text, an image, a recording or a dict of texts, images, videos and recordings."""
    if _is_recording(value) or not isinstance(value, dict):
        return [_part("text" if isinstance(value, str) else "audio" if _is_recording(value) else "image", value)]
    if unknown := set(value) - {"text", *SOURCES}:
        raise ValueError(f'unknown keys {_names(unknown)} in {_names(value)}. Use "text", "image", "video", "audio".')
    parts = []
    for kind in (*SOURCES, "text"):
        held: Any = value.get(kind)
        several = kind != "text" and isinstance(held, (list, tuple))
        if kind == "video" and several:  # or one: a list of images is a video
            first = held[0] if held else None
            several = isinstance(first, (str, Path, list, tuple)) or getattr(first, "ndim", 0) == 4
        parts += [_part(kind, each) for each in (held if several else [held]) if each is not None]
    return parts


def _part(kind: str, value: Any) -> Part:
    is_open = (kind != "video" and hasattr(value, "read")) or (kind == "audio" and _is_recording(value))
    if kind == "text":
        check_text("text", value)
    elif not is_open and not isinstance(value, SOURCES[kind]):
        given = f"{shorten(value)} of type {type(value).__name__}"
        raise TypeError(f"cannot encode {given} as {kind}. Expected {ACCEPTED}.")
    return {"type": kind, kind: value}


def _names(keys: Iterable[Any]) -> str:
    return shorten(sorted(map(str, keys)))


def check_text(name: str, text: Any) -> str:
    """Return `text`, which the error calls `name`, if it is a string of valid Unicode: what a tokenizer can take."""
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a string, got {shorten(text)} of type {type(text).__name__}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"whose character {error.start} is half of one ({text[error.start]!r})"
        raise ValueError(f"{name} must be valid Unicode, got {shorten(text)}, {half}.") from error
    return text


_SHORT = reprlib.Repr()  # ends soon, however deep or large a value is
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 100, 100


def shorten(value: Any, length: int = 100) -> str:
    """Return a representation of `value` that is short enough for an error: base64 has a million characters."""
    text, half = _SHORT.repr(value), length // 2
    return text if len(text) <= length else f"{text[:half]}...{text[-half:]}"


@contextmanager
def _reading(kind: str, source: Any) -> Iterator[None]:
    """Name the source in errors about it. PIL's decoders raise almost anything."""
    try:
        yield
    except Exception as error:
        name = shorten(source) if isinstance(source, (str, Path)) else f"of type {type(source).__name__}"
        raise ValueError(f"the {kind} {name} cannot be read: {str(error)[:300] or repr(error)}") from error


def read_video(source: Any, policy: InputPolicy, stack: ExitStack) -> str | Array:
    """Return a video as what transformers' video processors take: a path, or frames [T, height, width, 3] of `uint8`.

    Frames (an array or tensor, also [T, 3, height, width], or a list of images) are all used; those of a path or URL
    are sampled by the backbone's video processor. `stack` deletes the file that a URL was fetched into.
    """
    if isinstance(source, (str, Path)):
        with _reading("video", source):
            found = find_source(source, policy)
            check_size(os.path.getsize(found) if isinstance(found, str) else len(found), policy)
        if isinstance(found, str):
            return found
        path = Path(stack.enter_context(tempfile.TemporaryDirectory()), "video")
        path.write_bytes(found)
        return str(path)
    if getattr(source, "ndim", 0) == 4 and source.shape[1] == 3 != source.shape[3]:  # what video decoders return
        source = source.swapaxes(1, 2).swapaxes(2, 3)
    frames = [np.asarray(read_image(frame, policy)) for frame in source]
    if len({frame.shape for frame in frames}) != 1:
        raise ValueError(f"the frames of a video must be of one size, got {[frame.shape[:2] for frame in frames]}.")
    return np.stack(frames)


def read_audio(source: Any, policy: InputPolicy, rate: int, seconds: float | None = None) -> Array:
    """Return the first seconds (None: all) of a recording as samples [N]: see `app.audio.decode` of the package."""
    with _reading("audio", source):
        content = source if _is_recording(source) else _read_bytes(source, policy)
        return of_package("app.audio", "decode", needed=True)(content, rate, policy.max_seconds, seconds)


def read_image(source: Any, policy: InputPolicy | None = None) -> Image.Image:
    """Return an image from wherever it is as an upright RGB picture, of the same pixels in every mode.

    The EXIF orientation is applied, transparency is composed on white, and 16 bits (mode "I" or "I;16") and floats
    (0..1 or 0..255) are scaled to 8 bits. Where the values of a PIL image leave the scale open, it is refused.
    `source` may be base64 and a data URL too, and an array of `uint8`, `uint16`, bool, or float in 0..1.

    Raises:
        TypeError: If `source` is of another type.
        ValueError: If it is no image of one page, its scale is unclear, or the policy does not allow it.
    """
    _part("image", source)
    policy = policy or InputPolicy()
    with _reading("image", source):
        image, content = _open(source, policy)
        if 0 in image.size:
            raise ValueError(f"it has no pixels: its (width, height) is {image.size}")
        if image.width * image.height > policy.max_pixels:
            raise ValueError(f"its size {image.size} is more than the {policy.max_pixels} pixels of the policy")
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":  # one picture, and what it was made with
            one = "Pass one, as image.seek(i) and then image.copy() give it, or all, as a list of images or a video"
            raise ValueError(f"it has {frames} pages or frames. {one}")
        inverted = image.mode.startswith("I") and getattr(image, "tag_v2", {}).get(262) == 0  # TIFF's WhiteIsZero
        image.load()  # a truncated file fails here, and not as a half-grey picture later
        if image.format == "PNG" and content:
            _check_png(content, *image.size)
        return _to_rgb(ImageOps.exif_transpose(image), image.format, inverted)


def _open(source: Any, policy: InputPolicy) -> tuple[Image.Image, bytes]:
    """Return the picture, its pixels not decoded yet, and the bytes of its file if there is one."""
    if isinstance(source, Image.Image):
        return source, b""
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        source = (source.double() if source.is_floating_point() else source).numpy()  # numpy has no bfloat16
    if isinstance(source, np.ndarray):
        return _from_array(source), b""
    source = _read_bytes(source, policy)
    if b"%PDF-" in source[:1024]:
        raise ValueError("it is a PDF. Render its pages, with pypdfium2 for instance, and pass them as images")
    Image.init()
    formats = [kind for kind in policy.formats if kind in Image.OPEN]
    try:
        return Image.open(io.BytesIO(source), formats=formats), source
    except UnidentifiedImageError as error:
        raise ValueError(f"it is no file of {', '.join(policy.formats)}, or its start is damaged") from error


def _read_bytes(source: Any, policy: InputPolicy) -> bytes:
    if isinstance(source, (str, Path)):
        source = find_source(source, policy)
    if isinstance(source, str):
        with open(source, "rb") as file:
            source = file.read(policy.max_bytes + 1)
    elif hasattr(source, "read"):
        if getattr(source, "seekable", bool)():
            source.seek(0)
        source = source.read(policy.max_bytes + 1)
    check_size(len(source), policy)
    return source


def check_size(size: int, policy: InputPolicy) -> None:
    """Raise a `ValueError` if so many bytes are more than the policy allows."""
    if size > policy.max_bytes:
        raise ValueError(f"it has more than the {policy.max_bytes} bytes of the policy")


def _check_png(content: bytes, width: int, height: int) -> None:
    """Raise if the compressed pixels end early: PIL leaves the rest black."""
    depth, color, interlaced = content[24], content[25], content[28]
    bits = width * depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]  # of a row
    missing = height * bits // 8 if interlaced else height * (1 + (bits + 7) // 8)  # interlaced have slightly more
    inflate, place = zlib.decompressobj(), 8
    while missing > 0 and place + 8 <= len(content):
        size, kind = struct.unpack_from(">I4s", content, place)
        if kind == b"IDAT":
            missing -= len(inflate.decompress(content[place + 8 : place + 8 + size], missing))
        place += 12 + size
    if missing > 0:
        raise ValueError(f"its pixels end {missing} bytes early")


def find_source(source: str | Path, policy: InputPolicy) -> bytes | str:
    """Return the bytes that a URL or base64 stands for, or the path of the file that a name stands for."""
    name = str(source)
    scheme = name.partition(":")[0].lower() if isinstance(source, str) else ""
    if scheme in ("http", "https"):
        return of_package("app.fetch", "fetch", needed=True)(name, policy)
    if scheme == "data":
        with urlopen(name) as data:
            return data.read()
    path = os.path.realpath(name) if policy.folders else name
    allowed = policy.folders is None or any(Path(path).is_relative_to(os.path.realpath(f)) for f in policy.folders)
    if allowed and os.path.isfile(path):
        return path
    missing = "there is no such file" if allowed else "the policy allows no such file"
    if isinstance(source, Path):
        raise ValueError(missing)
    try:
        return base64.b64decode("".join(name.split()), validate=True)
    except ValueError as error:
        raise ValueError(f"{missing}, and it is neither a URL nor base64") from error


def _from_array(array: Array) -> Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)) or not array.size:
        raise ValueError(f"an array must be [height, width] or [height, width, 1, 3 or 4], got shape {array.shape}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    white = 1 if array.dtype.kind == "f" else {"uint8": 255, "uint16": 65535, "bool": 1}.get(array.dtype.name)
    if white is None:
        raise ValueError(f"an array must be uint8, uint16, bool or float in 0..1, got {array.dtype}")
    if not 0 <= array.min() <= array.max() <= white:  # so is none with a NaN
        raise ValueError("a float array must hold values in 0..1")
    return Image.fromarray(array if white == 255 else _to_8_bits(array, white))


def _to_8_bits(array: Array, white: float) -> Array:
    return np.rint(array.astype(np.float64) * (255 / white)).astype(np.uint8)


def _to_rgb(image: Image.Image, file_format: str | None, inverted: bool) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # PIL would clip these to 255 instead of scaling them
        return _grey_to_rgb(image, file_format, inverted)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _grey_to_rgb(image: Image.Image, file_format: str | None, inverted: bool) -> Image.Image:
    array, mode, white = np.asarray(image), image.mode, 65535
    low, high = array.min(), array.max()
    # Files of mode "I;16" are of 16 bits, and so are these of mode "I"; what convert("I") made of 8 bits is not.
    known = high > 255 or file_format in ("PNG", "PPM") or (mode != "I" and file_format is not None)
    if mode == "F":
        white = 1 if high <= 1 else 255
        known = high > 1 or (array % 1).any()  # zeros and ones may be a mask, or a dark picture of 0..255
    if not 0 <= low <= high <= white:  # so is none with a NaN
        raise ValueError(f"pixels of a mode {mode} image must lie in 0..{white}, got {low}..{high}")
    if high > 0 and not known:
        advice = "Where 255 is, pass image.convert('L'); else an array of uint16, or floats in 0..1"
        raise ValueError(f"its mode {mode} and pixels of {low}..{high} leave open what is white. {advice}")
    grey = _to_8_bits(white - array if inverted else array, white)
    if (transparent := image.info.get("transparency")) is not None:
        grey[array == transparent] = 255
    return Image.fromarray(grey).convert("RGB")
