"""Chat templates, which are code of whoever made the checkpoint."""

from __future__ import annotations

import sys
import time
from types import FrameType
from typing import Any

RENDER_SECONDS = 10.0  # for one chat template on one input


def apply_in_time(apply: Any, form: list[Any]) -> str:
    """Return what a chat template renders, through `apply`. A loop without end is a `ValueError`."""
    end, before = time.monotonic() + RENDER_SECONDS + len(form) / 1000, sys.gettrace()

    def check(frame: FrameType, *_: Any) -> Any:
        if time.monotonic() > end:
            raise ValueError("the chat template takes too long: it may loop without end.")
        return check if frame.f_code.co_filename == "<template>" else None

    sys.settrace(check)  # of this thread alone
    try:
        return apply(form, tokenize=False)
    finally:
        sys.settrace(before)
