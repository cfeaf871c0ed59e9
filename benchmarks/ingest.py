"""Prove what `metaembed index` promises: kills lose nothing, memory is bounded. Prints Markdown.

    python benchmarks/ingest.py kills --model MODEL [--kills 20]
    python benchmarks/ingest.py pages --model MODEL --source FOLDER [--pages 100 1000] [--dpi 36]

`kills` indexes pictures, texts and a PDF, is killed by SIGKILL at random points and started again, and compares the
index with one of an unbroken run, byte by byte. `pages` indexes PDFs of a folder, as many as have that many pages, and
samples the memory of the command with all its processes.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
from PIL import Image

from metaembed.app import cli, encoder, ingest  # noqa: F401  (a child that is forked need not import them)
from metaembed.app.pdf import PdfReader


def command(*arguments: object, kill_after: float | None = None, log: Path = Path(os.devnull)) -> tuple[int, float]:
    """Run `metaembed` in a process of its own; return its exit code, or minus the signal, and its seconds."""
    start = time.monotonic()
    child = os.fork()
    if not child:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        if kill_after is not None:
            threading.Timer(kill_after, os.kill, (os.getpid(), signal.SIGKILL)).start()
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as ended:
            sys.stdout.flush()
            os._exit(ended.code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, time.monotonic() - start


def content(index: Path) -> dict[str, tuple[bytes, str]]:
    """Return all that an index holds, by id."""
    from metaembed import MultiVectorIndex

    with MultiVectorIndex.open(index) as opened:
        return {one.id: (one.embedding.numpy().tobytes(), repr(sorted(one.metadata.items()))) for one in opened}


def kills(model: str, count: int, seed: int) -> None:
    """Print how an index that was killed that often differs from one of an unbroken run."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "source"
        source.mkdir()
        for number in range(60):
            Image.frombytes("RGB", (48, 32), rng.randbytes(48 * 32 * 3)).save(source / f"{number:02}.png")
            (source / f"{number:02}.txt").write_text(f"This is text number {number}.")
        sheets = [Image.frombytes("RGB", (40, 60), rng.randbytes(40 * 60 * 3)) for _ in range(60)]
        sheets[0].save(source / "book.pdf", save_all=True, append_images=sheets[1:])
        (source / "damaged.png").write_bytes((source / "00.png").read_bytes()[:100])
        options = ("index", source, "--model", model, "--batch", 2, "--dpi", 72, "--quiet")
        code, seconds = command(*options, "--to", folder / "unbroken")
        if code != cli.UNREADABLE:  # there is one damaged picture
            raise SystemExit(f"the unbroken run ended with {code}")
        killed, finished = 0, 0
        while killed < count:
            code, _ = command(*options, "--to", folder / "index", kill_after=rng.uniform(0.2, seconds / 4))
            killed += code == -signal.SIGKILL
            if code != -signal.SIGKILL:  # complete before the kill: begin another index
                finished += 1
                if content(folder / "index") != content(folder / "unbroken"):
                    raise SystemExit("an index differs from that of the unbroken run")
                if killed < count:
                    shutil.rmtree(folder / "index")
        code, _ = command(*options, "--to", folder / "index")
        first, second = content(folder / "unbroken"), content(folder / "index")
        same = sum(first[i] == second.get(i) for i in first)
        print("| kills | indexes finished | documents | equal | lost | too many |\n|---|---|---|---|---|---|")
        print(f"| {killed} | {finished + 1} | {len(first)} | {same} | ", end="")
        print(f"{len(first.keys() - second.keys())} | {len(second.keys() - first.keys())} |")


def pages(model: str, source: Path, counts: list[int], dpi: float) -> None:
    """Print times, memory and sizes of indexing that many pages."""
    reader = PdfReader()
    books = [(path, reader.count(path)) for path in sorted(source.rglob("*.pdf")) if not path.is_symlink()]
    reader.close()
    print("| PDFs | pages | seconds | pages a second | peak memory, MB | bytes a page | search, ms |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for count in counts:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "source").mkdir()
            total = chosen = 0
            for number, (path, length) in enumerate(books):
                if total < count:
                    shutil.copy(path, folder / "source" / f"{number:02}-{path.name}")
                    total, chosen = total + length, chosen + 1
            with Memory() as memory:
                log = folder / "log"
                arguments = ("index", folder / "source", "--model", model, "--to", folder / "index")
                code, seconds = command(*arguments, "--dpi", dpi, "--quiet", log=log)
            if code:
                raise SystemExit(f"exit code {code}: {log.read_text()}")
            size = sum(path.stat().st_size for path in (folder / "index").iterdir())
            log.unlink()
            command("search", folder / "index", "a plot", "--json", log=log)
            spent = json.loads(log.read_text().splitlines()[-1])["scoring_ms"]
            print(
                f"| {chosen} | {total:,} | {seconds:.0f} | {total / seconds:.1f} | {memory.peak / 1e6:,.0f} ", end=""
            )
            print(f"| {size / total:,.0f} | {spent:.1f} |", flush=True)


class Memory:
    """Samples the memory of all processes that this one starts: `peak`, in bytes, of what each has for itself."""

    def __enter__(self) -> "Memory":
        self.peak, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.25):
            used = 0
            for process in psutil.Process().children(recursive=True):
                try:
                    used += process.memory_full_info().pss
                except psutil.Error:
                    continue
            self.peak = max(self.peak, used)

    def __exit__(self, *args: object) -> None:
        self._done.set()
        self._thread.join()


def main() -> None:
    """Run the proof that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("proof", choices=["kills", "pages"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--source", type=Path)
    parser.add_argument("--pages", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--dpi", type=float, default=36)
    options = parser.parse_args()
    if options.proof == "kills":
        kills(options.model, options.kills, options.seed)
    else:
        pages(options.model, options.source, options.pages, options.dpi)


if __name__ == "__main__":
    main()
