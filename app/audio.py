"""Decoding recordings: files by soundfile, else by torchcodec, and other rates by soxr, as transformers does."""

from __future__ import annotations

import bisect
import importlib
import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..configuration_metaembed import check_count
from ..inputs_metaembed import Array

LOUDEST = 10  # of floats: clipping leaves -1..1 by little, and integers taken for floats by far


def decode(source: Any, sampling_rate: int, most_seconds: float, max_seconds: float | None = None) -> Array:
    """Return a recording as samples [N] of `float32`, in -1..1 where it was not clipped.

    Channels are averaged, and another rate is resampled as transformers' `load_audio` does.

    Args:
        source: The bytes of a file, a decoder of torchcodec, or a dict with an "array" (or tensor) [N] or
            [channels, N], of floats in -1..1 or signed integers, and its "sampling_rate".
        sampling_rate: Number of samples in a second that are wanted.
        most_seconds: A longer recording is an error, and no more than this is decoded.
        max_seconds: Keep only so many seconds, from the start. None: all.

    Raises:
        ValueError: If it is no recording, or empty, or too long, or its scale is unclear.
        ImportError: If the library that this recording needs is not installed.

    Example:
        >>> decode({"array": np.zeros(800), "sampling_rate": 8000}, 16000, most_seconds=60).shape
        (1600,)
    """
    if max_seconds is not None and not max_seconds > 0:
        raise ValueError(f"max_seconds must be more than 0, got {max_seconds!r}")
    seconds = min(max_seconds or math.inf, most_seconds + 1)
    if isinstance(source, Mapping):
        samples, rate = from_array(source)
    elif isinstance(source, bytes | bytearray):
        samples, rate = from_file(bytes(source), seconds)
    else:
        samples, rate = from_decoder(source, seconds)
    samples = samples[:, : math.ceil(seconds * rate)]
    if samples.shape[1] > most_seconds * rate:
        raise ValueError(f"it is longer than the {most_seconds} seconds of the policy. To keep its start: max_seconds")
    if not samples.size:
        raise ValueError("it holds no sound")
    if not np.isfinite(samples).all():
        raise ValueError("it holds NaN or infinity")
    return resample(samples.mean(axis=0, dtype=np.float32), rate, sampling_rate)


def check_heard(processor: Any, samples: Array, options: dict[str, Any]) -> None:
    """Raise if the backbone's processor drops the end of a recording: many do so beyond some length, silently.

    Args:
        processor: A `MetaEmbedProcessor`. The longest recording that was taken whole is kept as `processor.heard`.
        samples: The recording [N].
        options: Those of the backbone's processor, with the `sampling_rate`.

    Raises:
        ValueError: If the end makes no difference: says how many seconds do.
    """
    key, rate = repr(options), options["sampling_rate"]
    if len(samples) <= processor.heard.get(key, 0):
        return
    prompt = processor.prompt([{"role": "user", "content": [{"type": "audio"}]}], None, None)
    noise = np.random.default_rng(0).uniform(-1, 1, rate // 10).astype(np.float32)

    def is_dropped(end: int) -> bool:
        """Whether the tenth of a second before `end` makes no difference."""
        variants = samples[:end], np.concatenate([samples[: max(0, end - len(noise))], noise])
        one, other = (processor.backbone_processor(text=[prompt], audio=[each], **options) for each in variants)
        return all(np.array_equal(one[name], other[name]) for name in one)

    if is_dropped(len(samples)):
        seconds = range(1, len(samples) // rate + 1)
        most = bisect.bisect_left(seconds, True, key=lambda second: is_dropped(second * rate))
        raise ValueError(f"it takes {most} seconds of a recording and drops the rest. To cut it: max_seconds={most}")
    processor.heard[key] = len(samples)


def resample(samples: Array, rate: int, wanted: int) -> Array:
    """Return samples [N] of one rate at another."""
    if rate != wanted:
        count = math.ceil(len(samples) * wanted / rate)
        samples = of_extra("soxr").resample(samples, rate, wanted, quality="soxr_hq")
        samples = np.pad(samples, (0, max(0, count - len(samples))))[:count]
    return np.ascontiguousarray(samples)


def from_array(recording: Mapping[str, Any]) -> tuple[Array, int]:
    """Return the samples [channels, N] of a recording in memory, and their rate."""
    if "sampling_rate" not in recording:
        raise ValueError('its "sampling_rate" is missing: {"array": ..., "sampling_rate": ...}')
    rate = check_count("its sampling_rate", recording["sampling_rate"], 10**7)
    array = recording["array"]
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()  # numpy has no bfloat16
    array = np.asarray(array)
    array = array[None] if array.ndim == 1 else array
    if array.ndim != 2 or (array.size and len(array) > array.shape[1]):
        raise ValueError(f"its array must be [samples] or [channels, samples], got shape {array.shape}")
    if array.dtype.kind == "i":
        return array / -float(np.iinfo(array.dtype).min), rate
    if array.dtype.kind != "f":
        raise ValueError(f"its array must hold floats in -1..1 or signed integers, got {array.dtype}")
    if array.size and np.abs(array).max() > LOUDEST:
        found = f"{array.min():g}..{array.max():g}"
        raise ValueError(f"its floats must lie in -1..1, got {found}. Pass integers as integers, or divide them")
    return array, rate


def from_file(content: bytes, seconds: float) -> tuple[Array, int]:
    """Return the first seconds of a file as samples [channels, N], and their rate."""
    soundfile = of_extra("soundfile")
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            count = min(math.ceil(seconds * file.samplerate), file.frames)
            samples, rate = file.read(count, dtype="float32", always_2d=True), file.samplerate
    except soundfile.LibsndfileError as error:
        try:
            decoder = of_extra("torchcodec.decoders").AudioDecoder
        except (ImportError, RuntimeError, OSError) as missing:  # the latter two where FFmpeg is not found
            advice = "For other formats than soundfile's, and the sound of videos, install torchcodec and FFmpeg"
            raise ValueError(f"{error} {advice}") from missing
        return from_decoder(decoder(content), seconds)
    if len(samples) < count:
        raise ValueError(f"it is truncated: it ends after {len(samples)} of its samples")
    return samples.T, rate


def from_decoder(decoder: Any, seconds: float) -> tuple[Array, int]:
    """Return the first seconds of what an `AudioDecoder` of torchcodec decodes, [channels, N], and their rate."""
    heard = decoder.get_samples_played_in_range(0, seconds)
    return heard.data.numpy(), heard.sample_rate


def of_extra(name: str) -> Any:
    """Return a module of the extra `audio`."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"this needs {name}: pip install 'metaembed[audio]' ({error})") from error
