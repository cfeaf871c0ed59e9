"""A warning for who passes the name of a file where sentence-transformers' own models would read it."""

from __future__ import annotations

import re
import warnings
from typing import Any

ENDING = "png|jpe?g|gif|webp|bmp|tiff?|avif|mp4|mov|mkv|avi|webm|wav|mp3|flac|ogg|m4a|aac"
FILE_NAME = re.compile(rf"\S+\.({ENDING})", re.IGNORECASE)


def warn_of_file_names(inputs: Any) -> None:
    """Warn, once in a process, if an input is a string that looks like the name of a picture's or another file."""
    if any(isinstance(value, str) and FILE_NAME.fullmatch(value) for value in inputs):
        warnings.warn(
            "a string that looks like the name of a file is taken as text, as every string is. To encode the file, "
            'pass a dict such as {"image": name}, {"video": name} or {"audio": name}.',
            UserWarning,
            stacklevel=2,
        )
