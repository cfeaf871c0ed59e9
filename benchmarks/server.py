"""Load and fuzz the HTTP server: 50 concurrent clients for a minute, then 1,000 bad requests.

    python benchmarks/server.py                  after `make quickstart`, whose model and scenes it serves
    python benchmarks/server.py --seconds 10

Prints a Markdown table, and fails if a request was lost, an answer was an error, or memory grew.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from safetensors.torch import load_file

from metaembed import MultiVectorIndex
from metaembed.evaluation.tables import markdown_table

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from quickstart import TEST_SEED  # noqa: E402
from scenes import make_task  # noqa: E402

SERVE = """
import sys
from metaembed.app.server import serve
serve(sys.argv[1], port=int(sys.argv[2]), model=sys.argv[3])
"""


def memory(pid: int) -> float:
    """Megabytes of a process in memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 / 2**20


async def client_loop(client: httpx.AsyncClient, texts: list[str], until: float, times: list[float]) -> None:
    """Search, one request after the other, and check each answer."""
    rng = random.Random(len(times))
    while time.monotonic() < until:
        start = time.perf_counter()
        body = {"queries": [rng.choice(texts)], "k": 5, "budget": rng.choice([[1, 1], [4, 8], [16, 64]])}
        answer = await client.post("/search", json=body)
        answer.raise_for_status()
        assert len(answer.json()["results"][0]) == 5
        times.append(1000 * (time.perf_counter() - start))


async def load(url: str, pid: int, texts: list[str], clients: int, seconds: float) -> list[tuple[str, Any]]:
    """Return the figures of `clients` concurrent clients."""
    times: list[float] = []
    sizes: list[float] = []

    async def watch() -> None:
        while True:
            await asyncio.sleep(seconds / 20)
            sizes.append(memory(pid))

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        watching = asyncio.create_task(watch())
        until = time.monotonic() + seconds
        await asyncio.gather(*(client_loop(client, texts, until, times) for _ in range(clients)))
        watching.cancel()
        counted = (await client.get("/metrics")).text
    name = 'metaembed_requests_total{path="/search",status="200"} '
    answered = next(float(line.removeprefix(name)) for line in counted.splitlines() if line.startswith(name))
    assert answered == len(times), f"the server answered {answered} requests, and clients got {len(times)} answers"
    batches = {
        line.split()[0]: float(line.split()[1]) for line in counted.splitlines() if line.startswith("metaembed_batch")
    }
    mean = batches["metaembed_batch_inputs_sum"] / batches["metaembed_batch_inputs_count"]
    middle = len(sizes) // 4
    growth = np.median(sizes[-middle:]) - np.median(sizes[middle : 2 * middle])
    assert growth < 50, f"memory grew by {growth:.0f} MB"
    return [
        ("clients", clients),
        ("requests answered, of as many sent", len(times)),
        ("errors", 0),
        ("requests a second", f"{len(times) / seconds:.0f}"),
        ("p50, ms", f"{np.percentile(times, 50):.0f}"),
        ("p95, ms", f"{np.percentile(times, 95):.0f}"),
        ("queries in a batch, mean", f"{mean:.1f}"),
        ("memory, MB", f"{sizes[-1]:.0f}"),
        ("memory's growth from the second quarter to the last, MB", f"{growth:.0f}"),
    ]


def damage(value: Any, rng: random.Random) -> Any:
    """Return JSON with something wrong in it, or at least odd."""
    odd = [None, True, -1, 0, 10**40, 1e308, "", "\0", "\ud800", [], {}, [[]], {"$where": "1"}, "A" * 5000, -0.5]
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        return {**value, key: damage(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        return [damage(value[0], rng), *value[1:]]
    return rng.choice(odd)


def bad_request(rng: random.Random) -> tuple[str, str, bytes, dict[str, str]]:
    """Return method, path, body and headers of a request that no server should accept."""
    headers = {"Content-Type": "application/json"}
    good: list[tuple[str, Any]] = [
        ("/search", {"queries": ["x"], "k": 3, "budget": [1, 1], "where": {"a": 1}, "include_ids": ["1"]}),
        ("/encode", {"inputs": ["x"], "side": "query", "num_meta": 1}),
        ("/documents", {"documents": [{"id": "1", "input": {"image": "AAAA"}, "metadata": {"a": 1}}]}),
        ("/documents/delete", {"ids": None, "where": {"a": {"$in": [1]}}}),
    ]
    path, body = rng.choice(good)
    kind = rng.randrange(8)
    noise = "".join(rng.choices(string.printable, k=rng.randrange(1, 40)))
    if kind == 0:
        return "POST", path, noise.encode(), headers
    if kind == 1:
        return "POST", path, json.dumps(body).encode(), {"Content-Type": "text/plain"}
    if kind == 2:
        return "POST", path, b"[" * 5000 + b"]" * 5000, headers
    if kind == 3:
        return rng.choice(["PUT", "PATCH", "DELETE"]), path, json.dumps(body).encode(), headers
    if kind == 4:
        return "GET", "/" + "".join(rng.choices(string.ascii_letters + "/.%", k=12)), b"", {}
    if kind == 5:
        image = rng.choice(
            ["/etc/passwd", "http://localhost/", "file:///etc/passwd", "data:image/png;base64,AAAA", noise]
        )
        return "POST", "/search", json.dumps({"queries": [{"image": image}]}).encode(), headers
    if kind == 6:
        return "POST", path, json.dumps({**body, noise: noise}).encode(), headers
    wrong = damage(body, rng)
    required = next(iter(body))
    if isinstance(wrong, dict):
        wrong = {**wrong, required: rng.choice([3, {}, [3], "x" * 9, [{"image": 1}]])}
    return "POST", path, json.dumps(wrong).encode(), headers


async def fuzz(url: str, count: int) -> list[tuple[str, Any]]:
    """Send bad requests, and check that each is answered with a 4xx and a sentence."""
    rng, statuses = random.Random(0), list[int]()
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        for _ in range(count):
            method, path, body, headers = bad_request(rng)
            answer = await client.request(method, path, content=body, headers=headers)
            said = answer.json()["error"] if answer.headers["content-type"] == "application/json" else answer.text
            assert 400 <= answer.status_code < 500 and said.strip(), (
                method,
                path,
                body[:300],
                answer.status_code,
                said,
            )
            statuses.append(answer.status_code)
        assert (await client.get("/health")).json()["status"] == "ok"
    return [
        ("bad requests", count),
        *((f"of them {status}", statuses.count(status)) for status in sorted({*statuses})),
    ]


def main() -> None:
    """Serve the quickstart's scenes, and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--requests", type=int, default=1000, help="bad ones")
    arguments = parser.parse_args()
    quickstart = ROOT / "outputs/quickstart"
    documents = load_file(quickstart / "documents.safetensors")["documents"]
    texts = make_task(200, TEST_SEED)[2]
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        index = MultiVectorIndex.create(Path(folder) / "index", *documents.shape[1:])
        index.add(documents, [str(i) for i in range(len(documents))])
        index.close()
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        command = [sys.executable, "-c", SERVE, f"{folder}/index", str(port), str(quickstart / "model")]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
            try:
                url = f"http://127.0.0.1:{port}"
                while True:
                    try:
                        httpx.get(f"{url}/health")
                        break
                    except httpx.ConnectError:
                        assert server.poll() is None, "the server did not start"
                        time.sleep(0.2)
                rows = asyncio.run(load(url, server.pid, texts, arguments.clients, arguments.seconds))
                rows += asyncio.run(fuzz(url, arguments.requests))
            finally:
                server.terminate()
    print(markdown_table(["", ""], [[name, str(value)] for name, value in rows]))


if __name__ == "__main__":
    main()
