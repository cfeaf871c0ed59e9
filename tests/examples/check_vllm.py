"""Checks that vLLM gives the embeddings of transformers: `make test-vllm`, which installs vLLM for the CPU.

    python tests/examples/check_vllm.py --python .venv-vllm/bin/python

Exports tiny models with random weights, serves each with vLLM, encodes with the client of examples/serve_vllm.py, and
compares with `MetaEmbedModel`. Fails if a difference reaches 1e-5 in float32 or 1e-3 in bfloat16 (as cosine distance,
since both round at every layer there).
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples")]

import tiny  # noqa: E402
from conformance import picture  # noqa: E402
from serve_vllm import VllmClient  # noqa: E402
from tiny_backbone import build_backbone, build_processor  # noqa: E402

from metaembed import MetaEmbedModel  # noqa: E402
from metaembed.backbones.export import export_backbone  # noqa: E402
from metaembed.evaluation.tables import markdown_table  # noqa: E402

TEXTS = ["a red apple", "two cats under one chair", "what does <|meta_query_0|> show?", "the green pear " * 20]
CASES = [
    ("qwen3", "float32", {}),
    ("qwen3", "bfloat16", {}),
    ("qwen3", "float32", {"embedding_dim": 24, "query_instruction": "Find this."}),
    ("llama", "float32", {}),
    ("qwen2_5_vl", "float32", {}),
    ("qwen2_5_vl", "bfloat16", {}),
]
LIMITS = {"float32": 1e-5, "bfloat16": 1e-3}


def make_model(name: str, dtype: str, options: dict[str, Any]) -> MetaEmbedModel:
    """Return a tiny model with heads of the 32 numbers that vLLM's kernels for the CPU need."""
    if name == "qwen2_5_vl":
        processor = build_processor(TEXTS)
        backbone = build_backbone(processor, hidden_size=128).to(getattr(torch, dtype))
    else:
        tiny.SIZES |= {"hidden_size": 64, "head_dim": 32}
        backbone, processor = tiny.build(name, getattr(torch, dtype))
    model = MetaEmbedModel.from_backbone(
        backbone, processor=processor, num_query_tokens=4, num_document_tokens=8, **options
    )
    if model.projection is not None:
        torch.nn.init.normal_(model.projection.bias)
    return model


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    """A vLLM server of a folder, on this machine, for a `with` block."""

    def __init__(self, python: Path, folder: Path, dtype: str, log: Path):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        own = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "HF_HUB_OFFLINE": "1",
        }
        # What `vllm serve` runs, which builds for the CPU cannot, as their distribution has another name.
        command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--runner", "pooling", "--pooler-config.task", "token_embed"]
        command += ["--dtype", dtype, "--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "8"]
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **own},
                start_new_session=True,
            )

    def __enter__(self) -> Server:
        for _ in range(3600):  # a busy machine takes minutes
            if self.process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return self
            except OSError:
                time.sleep(1)
        self.__exit__()
        raise SystemExit(f"vLLM did not start:\n{self.log.read_text()[-4000:]}")

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait(600)


def check(python: Path, folder: Path, name: str, dtype: str, options: dict[str, Any]) -> list[list[str]]:
    """Return rows of the table, one for each side and kind of input."""
    model = make_model(name, dtype, options)
    export_backbone(model, folder / "plain")
    kinds: dict[str, list[Any]] = {"text": TEXTS}
    if model.processor.image_processor is not None:
        kinds["image"] = [picture(0), picture(1, 84, 140)]
        kinds["image and text"] = [{"image": picture(2), "text": "two cats"}]
    rows = []
    with Server(python, folder / "plain", dtype, folder / "log.txt") as server:
        client = VllmClient(server.url, folder / "plain")
        for kind, inputs in kinds.items():
            for side in ("query", "document"):
                worst = 0.0
                for num_meta in (None, 2):
                    ours = (model.encode_queries if side == "query" else model.encode_documents)(inputs, num_meta)
                    theirs = (client.encode_queries if side == "query" else client.encode_documents)(inputs, num_meta)
                    worst = max(worst, difference(ours.numpy(), theirs, dtype))
                what = ", ".join(options) or "none"
                rows.append([name, what, dtype, kind, side, f"{worst:.1e}", str(worst < LIMITS[dtype])])
    return rows


def difference(a: np.ndarray, b: np.ndarray, dtype: str) -> float:
    """Return the largest difference of a number (float32), or cosine distance of two vectors (bfloat16)."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.abs(a - b).max() if dtype == "float32" else (1 - (a * b).sum(axis=-1)).max())


def main() -> None:
    """Check every case, print the table, and fail if a difference is too large."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", type=Path, required=True, help="of the environment with vLLM")
    parser.add_argument("--cases", nargs="+", type=int, default=range(len(CASES)), help="which, counted from 0")
    arguments = parser.parse_args()
    rows = []
    for case in (CASES[i] for i in arguments.cases):
        with tempfile.TemporaryDirectory() as folder:
            rows += check(arguments.python, Path(folder), *case)
            print(rows[-1], flush=True)
    head = ["backbone", "options", "dtype", "input", "side", "largest difference", "within the limit"]
    print(markdown_table(head, rows))
    if failed := [row for row in rows if row[-1] != "True"]:
        raise SystemExit(f"{len(failed)} of {len(rows)} differ by too much")


if __name__ == "__main__":
    main()
