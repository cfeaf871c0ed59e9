"""Other engines, measured beside the index: each in an environment of its own, on the same embeddings, on one core.

A module beside this one for each, with a class `Engine` that `runner.py` calls. They import nothing of metaembed,
except `faiss_rescored`, which rescores with it.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


@dataclass(frozen=True)
class Peer:
    """An engine: its name in tables, its module here, its package, its environment, and what is installed there."""

    title: str
    module: str
    package: str
    environment: str
    pins: tuple[str, ...]
    ours: bool = False  # run by our interpreter, with the environment's packages behind ours


PEERS = {
    peer.module: peer
    for peer in (
        Peer(
            "faiss, then our rescoring",
            "faiss_rescored",
            "faiss-cpu",
            "faiss",
            ("faiss-cpu==1.15.1", "numpy"),
            ours=True,
        ),
        Peer("Qdrant Edge", "qdrant", "qdrant-edge-py", "qdrant-edge", ("qdrant-edge-py==0.9.0", "numpy")),
        Peer("LanceDB", "lance_db", "lancedb", "lancedb", ("lancedb==0.40.0", "numpy")),
        Peer(
            "fast-plaid",
            "plaid",
            "fast-plaid",
            "plaid",
            ("fast-plaid==1.7.0.2110", "xtr-warp-rs==2.1.0.2110", "numpy"),
        ),
        Peer(
            "XTR-WARP", "warp", "xtr-warp-rs", "plaid", ("fast-plaid==1.7.0.2110", "xtr-warp-rs==2.1.0.2110", "numpy")
        ),
    )
}


def install(peer: Peer) -> Path:
    """Create the environment of an engine, unless it is there, and return its interpreter."""
    folder = ROOT / f".venv-{peer.environment}"
    python, ready = folder / "bin/python", folder / ".ready"
    if not ready.exists() or ready.read_text() != " ".join(peer.pins):
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *peer.pins], check=True)
        ready.write_text(" ".join(peer.pins))
    return python


def run(peer: Peer, action: str, arguments: list[str | Path], minutes: float) -> dict:
    """Run `runner.py` for at most so many minutes: what it prints, or `{"failed": why}`."""
    python, environment = install(peer), {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    for threads in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LANCE_CPU_THREADS"):
        environment[threads] = "1"
    if peer.ours:
        (packages,) = python.parent.parent.glob("lib/*/site-packages")
        python, environment["PYTHONPATH"] = Path(sys.executable), str(packages)
    command = [python, HERE / "runner.py", action, peer.module, *arguments]
    # A limit of processor time makes the clock of processor time coarse, so searches are limited by the other clock.
    limit = partial(resource.setrlimit, resource.RLIMIT_CPU, (int(minutes * 60), int(minutes * 60) + 10))
    options = {"preexec_fn": limit} if action == "build" else {"timeout": 60 * minutes}
    failed = {"failed": f"not {'built' if action == 'build' else 'searched'} within {minutes:g} minutes"}
    try:
        done = subprocess.run(list(map(str, command)), env=environment, stdout=subprocess.PIPE, text=True, **options)
    except subprocess.TimeoutExpired:
        return failed
    if -done.returncode in (signal.SIGXCPU, signal.SIGKILL):
        return failed
    if done.returncode:
        return {"failed": f"{action} ended with {done.returncode}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def build(peer: Peer, folder: Path, parts: list[Path], count: int, minutes: float) -> dict:
    """Build the index of an engine: seconds and bytes, or why not."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    built = run(peer, "build", [folder, *parts, str(count)], minutes)
    if "failed" in built:
        shutil.rmtree(folder, ignore_errors=True)
    return built
