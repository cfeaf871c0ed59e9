"""Kill writers of an index at random moments, and check that nothing they reported as done is lost.

    python tests/retrieval/kill_index.py --kills 100

Two writers add, upsert, delete and compact. After every operation, a writer notes it in its journal, which is flushed
before the next operation. One writer at a time is killed by SIGKILL; a reader, which is never killed, keeps
refreshing, searching and verifying. In the end the index must match the journals; the operation that a kill
interrupted has happened completely or not at all.
"""

import argparse
import json
import multiprocessing
import random
import tempfile
import time
from pathlib import Path

import torch
from torch.nn.functional import normalize

from metaembed.retrieval.index import MultiVectorIndex

VECTORS, DIM = 4, 32


def embedding(document: str, version: int) -> torch.Tensor:
    """Return the vectors of a document, which depend on its id and version, so that a mix-up is noticed."""
    generator = torch.Generator().manual_seed(hash((int(document[1:]), document[0] == "a", version)) % 2**31)
    return normalize(torch.randn(VECTORS, DIM, generator=generator), dim=-1)


def write(folder: str, name: str, seed: int, start: int) -> None:
    """Write forever; the journal lists every operation before and after it."""
    rng = random.Random(seed)
    index = MultiVectorIndex.open(folder, timeout=60)
    journal = (Path(folder).parent / f"{name}.journal").open("a", buffering=1)
    mine = [document for document in index.ids if document[0] == name]
    number = start
    while True:
        kind = rng.choices(["add", "upsert", "delete", "compact"], [6, 3, 2, 1])[0]
        if kind == "add":
            count = rng.choice([1, 2, 3, 500])
            what = {f"{name}{number + i}": 0 for i in range(count)}
            number += count
        elif kind == "upsert":
            what = {document: rng.randrange(1, 1000) for document in rng.sample(mine, min(len(mine), 3))}
        elif kind == "delete":
            what = dict.fromkeys(rng.sample(mine, min(len(mine), rng.choice([1, 40, 2000]))))
        else:
            what = {}
        journal.write(json.dumps({"begin": kind, "what": what}) + "\n")
        if kind == "delete":
            index.delete(ids=list(what))
        elif kind == "compact":
            index.compact()
        elif what:
            stack = torch.stack([embedding(*item) for item in what.items()])
            call = index.add if kind == "add" else index.upsert
            call(stack, ids=list(what), metadata=[{"version": version} for version in what.values()])
        journal.write("done\n")
        mine = [d for d in dict.fromkeys([*mine, *what]) if what.get(d, 0) is not None]


def read(folder: str) -> None:
    """Search and verify until an error."""
    index = MultiVectorIndex.open(folder)
    while True:
        hits = index.search(torch.randn(2, 2, DIM), k=5)
        assert all(m["version"] >= 0 for one in hits.metadata for m in one)
        size = len(index)
        index.verify()
        assert len(index) == size == len(index.ids)
        index.refresh()


def expected(journal: Path) -> dict[str, int]:
    """Return the documents of a journal. The index after a kill shows whether the last operation happened."""
    sure: dict[str, int] = {}
    begun: dict[str, int | None] = {}
    for line in journal.read_text().splitlines():
        if line.startswith("state "):
            state = json.loads(line[6:])
            happened = {state.get(d) == version for d, version in begun.items() if version != sure.get(d)}
            assert len(happened) < 2, "an operation happened only in part"
            begun = begun if True in happened else {}
        elif line != "done":
            begun = json.loads(line)["what"]
            continue
        sure = {d: v for d, v in {**sure, **begun}.items() if v is not None}
        begun = {}
    return sure


def held(folder: str, name: str | None = None) -> dict[str, int]:
    index = MultiVectorIndex.open(folder)
    found = {d.id: d.metadata["version"] for d in index if name is None or d.id[0] == name}
    index.close()
    return found


def run(kills: int, seed: int = 0) -> dict[str, float]:
    """Run the test and return the counts. Raises if anything is lost or corrupt."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as parent:
        folder = f"{parent}/index"
        MultiVectorIndex.create(folder, VECTORS, DIM, "float32").close()

        def start(work, *arguments):
            process = multiprocessing.get_context("fork").Process(target=work, args=(folder, *arguments), daemon=True)
            process.start()
            return process

        reader = start(read)
        starts, processes = {"a": 0, "b": 0}, {}
        for name in starts:
            processes[name] = start(write, name, rng.randrange(10**6), 0)
        for kill in range(kills):
            name = rng.choice("ab")
            journal = Path(parent) / f"{name}.journal"
            size = journal.stat().st_size if journal.exists() else 0
            while not journal.exists() or journal.stat().st_size < size + 200:  # it works again
                time.sleep(0.02)
                assert processes[name].is_alive(), "a writer ended without being killed"
            time.sleep(rng.random() * 0.3)
            processes[name].kill()
            processes[name].join()
            text = journal.read_text()
            if not text.endswith("\n"):
                journal.write_text(text[: text.rfind("\n") + 1])
            now = held(folder, name)
            with journal.open("a") as file:
                file.write("state " + json.dumps(now) + "\n")
            assert expected(journal) == now, f"after kill {kill}: documents are lost or came back"
            assert reader.is_alive(), "the reader found something wrong"
            if kill % 10 == 9:
                print(f"{kill + 1} kills, {len(now)} documents of {name}", flush=True)
            starts[name] += 10**6
            processes[name] = start(write, name, rng.randrange(10**6), starts[name])
        for process in processes.values():
            process.kill()
            process.join()
        time.sleep(0.2)
        assert reader.is_alive(), "the reader reported an error"
        reader.kill()
        reader.join()
        index = MultiVectorIndex.open(folder)
        index.verify()
        for document in index:
            assert torch.equal(document.embedding, embedding(document.id, document.metadata["version"]))
        operations = sum((Path(parent) / f"{n}.journal").read_text().count("done") for n in "ab")
        return {"kills": kills, "operations": operations, "documents": len(index), "lost": 0, "corrupt": 0}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.time()
    print(run(arguments.kills, arguments.seed), f"in {time.time() - began:.0f} s")
