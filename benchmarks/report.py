"""docs/performance.md: each benchmark writes its own sections and leaves the others unchanged."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path

import psutil
import torch

REPORT = Path(__file__).parent.parent / "docs/performance.md"
TITLE = """\
# Performance

Commands measured every number here and wrote the page: `make benchmark-index` (search), `make benchmark` (scoring and
smaller documents), `make benchmark-encode` and `make benchmark-training`.
"""


def describe_machine() -> str:
    """Return the processor, the cores, the memory and the versions."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return (
        f"{model}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB; {platform.system()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def describe_load() -> str:
    """Return a sentence about how busy the machine was."""
    return f"The load average was {os.getloadavg()[2]:.1f} at the end; above one, other programs ran at the same time."


def write_report(parts: dict[str, str], path: Path = REPORT) -> None:
    """Replace sections of the report by name, append new ones, and leave the others unchanged."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    sections = dict(re.findall(r"<!-- (\w+) -->\n(.*?)\n<!-- end of \1 -->", old, flags=re.DOTALL))
    sections.update({name: text.strip("\n") for name, text in parts.items()})
    marked = [f"\n<!-- {name} -->\n{text}\n<!-- end of {name} -->\n" for name, text in sections.items()]
    path.parent.mkdir(exist_ok=True)
    path.write_text(TITLE + "".join(marked), encoding="utf-8")
    print(f"wrote {path}", file=sys.stderr)
