"""What a user may pass as a query or a document, parsed once into an [`Item`], and what may be read for it."""

from __future__ import annotations

import base64
import functools
import http.client
import io
import ipaddress
import os
import re
import reprlib
import socket
import struct
import tempfile
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

try:
    import httpx
except ImportError:  # later versions of huggingface_hub bring its successor instead
    from huggingface_hub.utils import httpx

ACCEPTED = (
    "a string (text), a PIL image, a pathlib.Path, bytes or an open file of an image, an array [height, width(, "
    "channels)], "
    'a dict with "text", "image" (one or a list; a path, URL, PIL image, bytes or array each) and/or "video" (a path '
    "or URL, a list of images or an array [frames, height, width, 3]; or a list of these), "
    'or chat messages [{"role": ..., "content": ...}]'
)

# {"role": str, "content": [{"type": "text", "text": str}, {"type": "image", "image": PIL image},
#                           {"type": "video", "video": file name, or frames [T, height, width, 3]}, ...]}
Message = dict[str, Any]


@dataclass(frozen=True)
class InputPolicy:
    """What may be read and fetched for an input. The default suits a person who encodes their own files.

    Data URLs, base64, bytes and open files are always read, within the limits. Proxies are not used.

    Args:
        schemes: Schemes of URLs that may be fetched: "http", "https".
        hosts: Patterns of hosts that may be fetched from, such as "*.example.com". None: any.
        folders: Folders whose files may be read, links followed. None: any file; (): none.
        private_addresses: Whether hosts may resolve to private, loopback and other addresses that are not public.
        max_bytes: Size of a picture's file, and of what a URL serves, after decompression.
        max_pixels: Pixels of a picture, checked before it is decoded. Above PIL's own limit, raise
            `PIL.Image.MAX_IMAGE_PIXELS` too.
        timeout: Seconds that fetching one URL may take in all.
        formats: Formats of pictures, as PIL names them.

    Example:
        >>> model.policy = InputPolicy.server()  # no files of this machine, no URLs
    """

    schemes: tuple[str, ...] = ("http", "https")
    hosts: tuple[str, ...] | None = None
    folders: tuple[str | Path, ...] | None = None
    private_addresses: bool = False
    max_bytes: int = 2**28
    max_pixels: int = 89_478_485  # where PIL warns
    timeout: float = 60
    formats: tuple[str, ...] = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "HEIF")

    @classmethod
    def server(cls, **changes: Any) -> InputPolicy:
        """Return a policy for inputs of strangers: no file of this machine and no URL, but for `changes`."""
        return cls(**{"schemes": (), "folders": (), **changes})


DEFAULT_POLICY = InputPolicy()


@dataclass(frozen=True)
class Item:
    """One query or document, checked in form. The images and videos in its messages are as the user passed them."""

    messages: list[Message]
    num_images: int
    has_video: bool
    text_length: int

    def load(self, policy: InputPolicy, stack: ExitStack) -> list[Message]:
        """Return the messages with images as RGB pictures, and videos as file names or frames."""
        return [
            {**message, "content": [_load(part, policy, stack) for part in message["content"]]}
            for message in self.messages
        ]


def _load(part: dict[str, Any], policy: InputPolicy, stack: ExitStack) -> dict[str, Any]:
    if part["type"] == "image":
        return {"type": "image", "image": read_image(part["image"], policy)}
    return {"type": "video", "video": read_video(part["video"], policy, stack)} if part["type"] == "video" else part


def is_single(inputs: Any) -> bool:
    """Whether `inputs` is one query or document. Lists and tuples are batches, except chat messages."""
    if is_conversation(inputs):
        return True
    if isinstance(inputs, (np.ndarray, torch.Tensor)):  # [N, height, width, channels] and [N] of strings are batches
        return inputs.ndim < 4 and getattr(inputs.dtype, "kind", None) not in ("U", "O")
    single = (str, bytes, bytearray, dict, Path, Image.Image, Item)
    return inputs is None or isinstance(inputs, single) or _is_file(inputs)


def is_batch(inputs: Any) -> bool:
    """Whether `inputs` has inputs in order: a table would give the names of its columns."""
    return isinstance(inputs, Iterable) and not isinstance(inputs, (Set, Mapping)) and not hasattr(inputs, "columns")


def is_conversation(value: Any) -> bool:
    """Whether `value` is a list of chat messages."""
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], dict) and "role" in value[0]


def _is_file(value: Any) -> bool:
    return hasattr(value, "read")


def parse_all(inputs: Any) -> list[Item]:
    """Return the [`Item`]s of one input or a batch of them, in order. Errors name an input by its place."""
    if not is_single(inputs) and not is_batch(inputs):
        raise TypeError(
            f"{_unusable(inputs)}: it is no sequence of inputs in order. Expected {ACCEPTED}, or a list of these, "
            "such as one column of a table."
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
        error_type = TypeError if isinstance(error, TypeError) else ValueError
        raise error_type(f"input {index}: {error}") from error


def parse(value: Any) -> Item:
    """Parse one query or document. Nothing is read, fetched or decoded.

    Args:
        value: A string (text), a PIL image, a `pathlib.Path`, `bytes` or an open file of an image, an array, a dict
            with `text`, `image` and/or `video` (one or a list of each; images come first and the text last), or chat
            messages, whose content may interleave strings, images, such dicts, and parts with a "type" that hold one
            text, image or video each (also as "url" or "path"). In a dict, a string may be a path, URL or base64.

    Raises:
        TypeError: If `value` is none of these.
        ValueError: If it is empty or malformed, or a text is not valid Unicode.
    """
    if isinstance(value, Item):
        return value
    if is_conversation(value):
        messages = [_message(message) for message in value]
    elif isinstance(value, dict):
        messages = [{"role": "user", "content": _dict_parts(value)}]
    else:
        messages = [{"role": "user", "content": [_text(value) if isinstance(value, str) else _image(value)]}]
    parts = [part for message in messages for part in message["content"]]
    if not parts:
        raise ValueError(f"the input {shorten(value)} holds neither text nor picture. Expected {ACCEPTED}.")
    kinds = [part["type"] for part in parts]
    length = sum(len(part["text"]) for part in parts if part["type"] == "text")
    return Item(messages, kinds.count("image"), "video" in kinds, length)


def _message(message: Any) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
        raise TypeError(f'each chat message must be a dict with a "role" and a "content", got {shorten(message)}.')
    if not re.fullmatch(r"[A-Za-z]\w*", message["role"]):  # the chat template would let it become structure
        raise ValueError(f'the role of a chat message must be a word as "user", got {shorten(message["role"])}.')
    if unknown := {key for key, value in message.items() if value is not None} - {"role", "content"}:
        raise ValueError(f'a chat message takes only a "role" and a "content", got {_names(unknown)} too.')
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
            raise ValueError(f'a part of a chat message is empty: {shorten(part)}. Expected "text" or "image".')
    return {"role": message["role"], "content": parts}


def _typed_part(part: dict[str, Any]) -> dict[str, Any]:
    kind = part["type"]
    if kind not in ("text", "image", "video"):
        raise ValueError(f'the "type" of a part must be "text", "image" or "video", got {shorten(kind)}.')
    keys = {"text"} if kind == "text" else {kind, "url", "path"}  # transformers' names for where an image or video is
    held = {key: value for key, value in part.items() if key != "type" and value is not None}  # tables fill with None
    if len(held) != 1 or not held.keys() <= keys:
        raise ValueError(f'a part of type "{kind}" must hold one of {_names(keys)}, got {_names(held)}.')
    return {"text": _text, "image": _image, "video": _video}[kind](*held.values())


def _names(keys: Iterable[Any]) -> str:
    return shorten(sorted(map(str, keys)))


def _dict_parts(item: dict[str, Any]) -> list[dict[str, Any]]:
    if unknown := set(item) - {"text", "image", "video"}:
        raise ValueError(f'unknown keys {_names(unknown)} in {_names(item)}. Use "text", "image", "video".')
    images, videos, text = (item.get(kind) for kind in ("image", "video", "text"))
    several = isinstance(videos, (list, tuple)) and videos and _is_video(videos[0])  # a list of images is one video
    parts = [
        _image(image) for image in (images if isinstance(images, (list, tuple)) else [images]) if images is not None
    ]
    parts += [_video(video) for video in (videos if several else [videos]) if videos is not None]
    return parts if text is None else [*parts, _text(text)]


def _is_video(value: Any) -> bool:
    return isinstance(value, (str, Path, list, tuple)) or getattr(value, "ndim", 0) == 4


def _text(text: Any) -> dict[str, Any]:
    return {"type": "text", "text": check_text("text", text)}


def _image(source: Any) -> dict[str, Any]:
    kinds = (Image.Image, str, Path, bytes, bytearray, np.ndarray, torch.Tensor)
    if not isinstance(source, kinds) and not _is_file(source):
        raise TypeError(f"{_unusable(source)}. Expected {ACCEPTED}.")
    return {"type": "image", "image": source}


def _video(source: Any) -> dict[str, Any]:
    if not isinstance(source, (str, Path, list, tuple, np.ndarray, torch.Tensor)):
        raise TypeError(f"cannot read a video of type {type(source).__name__}. Expected {ACCEPTED}.")
    return {"type": "video", "video": source}


def check_text(name: str, text: Any) -> str:
    """Return `text`, which the error calls `name`, if it is a string of valid Unicode: what a tokenizer can take."""
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a string, got {shorten(text)} of type {type(text).__name__}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} must be valid Unicode, got {shorten(text)}, whose character {error.start} is half of one "
            f"({text[error.start]!r}). Decode its bytes anew, with errors='replace' if need be."
        ) from error
    return text


_SHORT = reprlib.Repr()  # ends soon, however deep or large a value is
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 100, 100


def shorten(value: Any, length: int = 100) -> str:
    """Return a representation of `value` (a text without quotes as [`cut`]) that is short enough for an error."""
    return cut(_SHORT.repr(value), length)


def cut(text: str, length: int = 100) -> str:
    """Return `text` without its middle where it is long: an image as base64 has a million characters."""
    half = length // 2
    return text if len(text) <= length else f"{text[:half]}...{text[-half:]}"


def _unusable(value: Any) -> str:
    return f"cannot encode {shorten(value)} of type {type(value).__name__}"


# -- Pictures and videos -----------------------------------------------------------------------------------------


def read_video(source: Any, policy: InputPolicy, stack: ExitStack) -> str | np.ndarray:
    """Return a video as what transformers' video processors take: a path, or frames [T, height, width, 3] of `uint8`.

    Args:
        source: A path or URL, whose frames the backbone's video processor samples; or frames, all of which are used:
            an array or tensor [frames, height, width, 3] or [frames, 3, height, width], or a list of images.
        policy: What may be read and fetched.
        stack: Deletes the file that a URL was fetched into.
    """
    if isinstance(source, (str, Path)):
        try:
            found = _find(source, policy)
        except Exception as error:
            raise ValueError(f"the video {shorten(source)} cannot be read: {error}") from error
        if isinstance(found, bytes):
            path = Path(stack.enter_context(tempfile.TemporaryDirectory()), "video")
            path.write_bytes(found)
            return str(path)
        return found
    if getattr(source, "ndim", 0) == 4 and source.shape[1] == 3 != source.shape[3]:  # what video decoders return
        source = source.swapaxes(1, 2).swapaxes(2, 3)
    frames = [np.asarray(read_image(frame, policy)) for frame in source]
    if len({frame.shape for frame in frames}) != 1:
        raise ValueError(f"the frames of a video must be of one size, got {[frame.shape[:2] for frame in frames]}.")
    return np.stack(frames)


def read_image(source: Any, policy: InputPolicy = DEFAULT_POLICY) -> Image.Image:
    """Read an image from wherever it is, as an upright RGB picture.

    The EXIF orientation is applied, transparency is composed on white, 16-bit and float pictures are scaled to 8 bits,
    so that the same picture gives the same pixels in every mode that can hold it. A PIL image of mode "I" or "I;16"
    has 16 bits, and one of mode "F" lies in 0..1 or 0..255. One whose values may as well mean the other is refused:
    "I" up to 255, which `convert("I")` makes of 8 bits, where it does not come from a file of 16 bits; and "F" of
    zeros and ones alone.

    Args:
        source: A PIL image, a path, a URL, data URL or base64 string, bytes, an open file, or an array or tensor
            [height, width(, channels)] of `uint8`, `uint16`, bool, or float in 0..1.
        policy: What may be read and fetched.

    Raises:
        TypeError: If `source` is of another type.
        ValueError: If it cannot be read as an image, the policy does not allow it, it has several pages or frames, or
            the scale of its pixels is unclear.
    """
    _image(source)
    try:
        image, content = _open(source, policy)
        if 0 in image.size:
            raise ValueError(f"it has no pixels: its (width, height) is {image.size}")
        if image.width * image.height > policy.max_pixels:
            raise ValueError(
                f"it has {image.width} x {image.height} pixels, more than the {policy.max_pixels} of the policy"
            )
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":  # one picture, and what it was made with
            raise ValueError(
                f"it has {frames} pages or frames. Pass the one that is meant, as PIL's image.seek(i) and then "
                "image.copy() give it, or all of them, as a list of images or the frames of a video"
            )
        inverted = image.mode.startswith("I") and getattr(image, "tag_v2", {}).get(262) == 0  # TIFF's WhiteIsZero
        image.load()  # a truncated file fails here, and not as a half-grey picture later
        if image.format == "PNG" and content:
            _check_png(image, content)
        return _to_rgb(ImageOps.exif_transpose(image), image.format, inverted)
    except Exception as error:  # PIL's decoders raise almost anything
        name = shorten(source) if isinstance(source, (str, Path)) else f"of type {type(source).__name__}"
        raise ValueError(f"the image {name} cannot be read: {cut(str(error) or repr(error), 300)}") from error


def _open(source: Any, policy: InputPolicy) -> tuple[Image.Image, bytes]:
    """Return the picture, its pixels not decoded yet, and the bytes of its file if there is one."""
    if isinstance(source, Image.Image):
        return source, b""
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        source = (source.double() if source.is_floating_point() else source).numpy()  # numpy has no bfloat16
    if isinstance(source, np.ndarray):
        return _from_array(source), b""
    content = _find(source, policy) if isinstance(source, (str, Path)) else source
    if isinstance(content, str):
        with open(content, "rb") as file:
            content = file.read(policy.max_bytes + 1)
    elif not isinstance(content, (bytes, bytearray)):
        if getattr(content, "seekable", bool)():
            content.seek(0)
        content = content.read(policy.max_bytes + 1)
    if len(content) > policy.max_bytes:
        raise ValueError(f"it has more than the {policy.max_bytes} bytes of the policy")
    if b"%PDF-" in content[:1024]:
        raise ValueError("it is a PDF. Render its pages, with pypdfium2 for instance, and pass them as images")
    Image.init()
    try:
        return Image.open(
            io.BytesIO(content), formats=[kind for kind in policy.formats if kind in Image.OPEN]
        ), content
    except UnidentifiedImageError as error:
        raise ValueError(f"it is no file of {', '.join(policy.formats)}, or its start is damaged") from error


def _check_png(image: Image.Image, content: bytes) -> None:
    """Raise if the compressed pixels end early: PIL leaves the rest black."""
    width, height, depth, color, _, _, interlaced = struct.unpack(">IIBBBBB", content[16:29])
    if not interlaced and np.asarray(image.crop((0, height - 1, width, height))).any():
        return  # the last row is there
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
    adam7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    missing, place, inflate = 0, 8, zlib.decompressobj()
    for x, y, dx, dy in adam7 if interlaced else [(0, 0, 1, 1)]:
        columns, rows = -(-(width - x) // dx), -(-(height - y) // dy)
        missing += rows * (1 + (columns * bits + 7) // 8) if columns > 0 and rows > 0 else 0
    while place + 8 <= len(content):
        size, kind = struct.unpack(">I4s", content[place : place + 8])
        data = content[place + 8 : place + 8 + size] if kind == b"IDAT" else b""
        while data:
            missing -= len(inflate.decompress(data, 2**20))
            data = inflate.unconsumed_tail
        place += 12 + size
    if missing > 0:
        raise ValueError(f"its pixels end {missing} bytes early")


def _find(source: str | Path, policy: InputPolicy) -> bytes | str:
    """Return the bytes that a URL or base64 stands for, or the path of the file that a name stands for."""
    name = str(source)
    scheme = name.partition(":")[0].lower() if isinstance(source, str) else ""
    if scheme in ("http", "https"):
        return _fetch(name, policy)
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


# -- Fetching ----------------------------------------------------------------------------------------------------

_tls = functools.cache(httpx.create_ssl_context)  # slow to make


def _fetch(source: str, policy: InputPolicy) -> bytes:
    """Return what a URL serves. The policy holds for it and for every redirect."""
    end = time.monotonic() + policy.timeout
    url = httpx.URL(source)
    for _ in range(10):
        try:
            with _connect(url, policy, end) as connection:
                connection.request("GET", url.raw_path.decode("ascii"), headers={"User-Agent": "metaembed"})
                response = connection.getresponse()
                location = response.headers.get("Location")
                if not (300 <= response.status < 400 and location):
                    return _body(response, policy, end)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if time.monotonic() >= end:
                raise ValueError(f"timed out after {policy.timeout} s") from error
            raise
        url = url.join(location)
    raise ValueError("the server redirects without end")


@contextmanager
def _connect(url: Any, policy: InputPolicy, end: float) -> Iterator[http.client.HTTPConnection]:
    """Connect to the very address that was checked: a second look-up could give another one."""
    host, secure = url.raw_host.decode("ascii").lower(), url.scheme == "https"
    port = url.port or (443 if secure else 80)
    if url.scheme not in policy.schemes or url.scheme not in ("http", "https"):
        raise ValueError(f"the policy allows no URLs of {url.scheme}, only of {list(policy.schemes)}")
    if policy.hosts is not None and not any(fnmatch(host, pattern.lower()) for pattern in policy.hosts):
        raise ValueError(f"the policy does not allow the host {host}")
    addresses = [entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not policy.private_addresses and not all(map(is_public, addresses)):
        raise ValueError(f"the address of {host} is not public, and InputPolicy(private_addresses=True) is not set")
    with ExitStack() as stack:
        for address in addresses:
            with suppress(OSError if address != addresses[-1] else ()):
                opened = socket.create_connection((address, port), timeout=max(end - time.monotonic(), 1e-3))
                break
        opened = stack.enter_context(opened)
        guard = stack.enter_context(opened.dup())
        timer = threading.Timer(max(end - time.monotonic(), 0), _hang_up, (guard,))  # a drip resets other limits
        timer.daemon = True
        timer.start()
        stack.callback(timer.cancel)
        if secure:
            connection = http.client.HTTPSConnection(host, port, context=_tls())
            connection.sock = stack.enter_context(_tls().wrap_socket(opened, server_hostname=host))
        else:
            connection = http.client.HTTPConnection(host, port)
            connection.sock = opened
        yield connection


def _hang_up(connected: socket.socket) -> None:
    with suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)


def _body(response: http.client.HTTPResponse, policy: InputPolicy, end: float) -> bytes:
    if not 200 <= response.status < 300:
        raise ValueError(f"the server answered {response.status} {response.reason}")
    body = bytearray()
    while len(body) <= policy.max_bytes and (chunk := response.read(2**16)):
        body += chunk
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":  # asked for is "identity"
        body = bytearray(zlib.decompressobj(47).decompress(body, policy.max_bytes + 1))  # gzip or deflate
    if len(body) > policy.max_bytes:
        raise ValueError(f"it has more than the {policy.max_bytes} bytes of the policy")
    if response.length or time.monotonic() >= end:
        raise ValueError("the connection ended early")
    return bytes(body)


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet, also where IPv6 wraps one of IPv4."""
    ip: Any = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        nat64 = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in ipaddress.ip_network("64:ff9b::/96") else None
        ip = ip.ipv4_mapped or ip.sixtofour or nat64 or ip
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or getattr(ip, "is_site_local", False))


# -- Pixels ------------------------------------------------------------------------------------------------------


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


def _to_rgb(image: Image.Image, file_format: str | None, inverted: bool) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # PIL would clip these to 255 instead of scaling them
        array = 65535 - np.asarray(image) if inverted else np.asarray(image)
        return _grey_to_rgb(array, image.mode, file_format, image.info.get("transparency"))
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
