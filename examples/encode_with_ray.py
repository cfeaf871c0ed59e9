"""Encode a dataset on a Ray cluster into a store: a pool of model actors, GPUs where there are some, exactly once.

python examples/encode_with_ray.py --model M --data "pages/*.parquet" --id id --image image --text title \
    --to http://qdrant:6333/pages --vectors 64 --actors 8

A folder as `--to` becomes `--shards` indexes, `shard-000`, ..., for which all machines need that folder on one file
system with locks. A store in a server needs nothing. Started again, it goes on where it was.
"""

import argparse
import sys
import zlib
from pathlib import Path
from typing import Any

import ray
import torch

from metaembed import MetaEmbedModel
from metaembed.stores import Ledger, SearchHits, create_store, open_store


class Shards:
    """Indexes in one folder. The id of a document alone decides in which of them it is, so there is no second copy."""

    def __init__(self, folder: str):
        self.stores = [open_store(path) for path in sorted(Path(folder).glob("shard-*"))]

    def upsert(self, embeddings: torch.Tensor, ids: list[str], metadata: list[dict[str, Any]]) -> None:
        """Add or replace documents, each in its shard."""
        places = [zlib.crc32(id.encode()) % len(self.stores) for id in ids]
        for place in set(places):
            rows = [row for row, at in enumerate(places) if at == place]
            self.stores[place].upsert(embeddings[rows], [ids[r] for r in rows], [metadata[r] for r in rows])

    def search(self, queries: torch.Tensor, k: int = 10, *arguments: Any, **search: Any) -> SearchHits:
        """Search every shard and merge what they find."""
        found = [store.search(queries, k, *arguments, **search) for store in self.stores]
        scores, best = torch.cat([hits.scores for hits in found], dim=1).sort(dim=1, descending=True, stable=True)
        ids, metadata = ([[x for side in sides for x in side] for sides in zip(*lists, strict=True)] for lists in (
            [hits.ids for hits in found], [hits.metadata for hits in found]
        ))  # fmt: skip
        chosen = list(enumerate(best[:, :k].tolist()))
        return SearchHits([[ids[q][i] for i in row] for q, row in chosen], scores[:, :k],
                          [[metadata[q][i] for i in row] for q, row in chosen])  # fmt: skip

    def __len__(self) -> int:
        return sum(map(len, self.stores))


def is_folder(address: str) -> bool:
    """Whether a store at an address is our own index."""
    return "://" not in address


class Encoder:
    """An actor: it holds the model, and encodes and stores the batches that it is given."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.ledger = options, Ledger(options.ledger)
        self.model = MetaEmbedModel.from_pretrained(options.model).to("cuda" if torch.cuda.is_available() else "cpu")
        self.store = Shards(options.to) if is_folder(options.to) else open_store(options.to)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Encode and store a batch of columns, unless the ledger has it: how many documents were encoded."""
        ids = [str(id) for id in batch[self.options.id]]
        if ids in self.ledger:
            return {"encoded": [0]}
        embeddings = self.model.encode_documents(self.documents(batch), num_meta=self.options.vectors)
        kept = self.options.metadata
        metadata = [dict(zip(kept, (plain(batch[name][i]) for name in kept), strict=True)) for i in range(len(ids))]
        self.store.upsert(embeddings, ids, metadata)  # killed between here ...
        self.ledger.add(ids)  # ... and here, the batch comes again and replaces the same documents
        return {"encoded": [len(ids)]}

    def documents(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """The inputs of the model. An image is its bytes, or the dict that `datasets` writes."""
        columns = {
            key: batch[name] for key, name in (("text", self.options.text), ("image", self.options.image)) if name
        }
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        for row in rows:
            if isinstance(row.get("image"), dict):
                row["image"] = row["image"]["bytes"]
        return [{key: value for key, value in row.items() if value is not None} for row in rows]


def plain(value: Any) -> Any:
    """A value of a column as JSON can hold it."""
    return value.item() if hasattr(value, "item") else value.tolist() if hasattr(value, "tolist") else value


def prepare(options: argparse.Namespace) -> None:
    """Create what is not there yet."""
    model = MetaEmbedModel.from_pretrained(options.model)
    options.vectors = options.vectors or model.processor.resolve_num_meta("document", None)
    dim = model.config.embedding_dim or model.config.hidden_size
    places = [options.to]
    if is_folder(options.to):
        places = [str(Path(options.to) / f"shard-{i:03}") for i in range(options.shards)]
        there = sorted(map(str, Path(options.to).glob("shard-*")))
        if there and there != places[: len(there)]:
            raise ValueError(f"{options.to} has other shards than {options.shards}; take another folder, or as many")
    for place in places:
        try:
            open_store(place).close()
        except FileNotFoundError:
            create_store(place, options.vectors, dim, quantization=options.quantization).close()


def run(options: argparse.Namespace, encoder: type[Encoder] = Encoder) -> int:
    """Encode the dataset, and return how many documents were encoded by this call.

    Raises:
        ValueError: if all CPUs would be taken by actors, so that nothing could be read, or the shards are others.
    """
    there = ray.cluster_resources()
    if options.actors >= there.get("CPU", 0):
        raise ValueError(f"{options.actors} actors and reading need more than the {there.get('CPU', 0):g} CPUs of Ray")
    prepare(options)
    # The same blocks in the same order each time, so that the ledger knows them again.
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.use_datasource_v2 = False  # it starts many processes to read the footers of a few files
    columns = dict.fromkeys([options.id, options.text, options.image, *options.metadata])
    data = ray.data.read_parquet(
        options.data, columns=[name for name in columns if name], override_num_blocks=options.blocks
    )
    encoded = data.map_batches(
        encoder,
        fn_constructor_args=(options,),
        batch_size=options.batch_size,
        concurrency=options.actors,
        num_gpus=1 if there.get("GPU") else 0,
        num_cpus=1,
    )
    return sum(row["encoded"] for row in encoded.iter_rows())


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, nargs="+", help="parquet files or folders")
    parser.add_argument("--id", default="id", help="the column of ids, all different")
    parser.add_argument("--text", help="the column of texts")
    parser.add_argument("--image", help="the column of images: bytes, or as datasets writes them")
    parser.add_argument("--metadata", nargs="*", default=[], help="columns to keep as metadata")
    parser.add_argument("--to", required=True, help="the address of a store, or a folder of shards")
    parser.add_argument("--ledger", help="a folder that all machines see; TO/ledger if TO is a folder")
    parser.add_argument("--vectors", type=int, help="of a document; the model's default")
    parser.add_argument("--quantization", default="float32")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=100, help="pieces of the data; the same at every start")
    options = parser.parse_args(arguments)
    if not options.text and not options.image:
        parser.error("give --text, --image or both")
    if not options.ledger and not is_folder(options.to):
        parser.error("a store in a server needs --ledger, a folder that all machines see")
    options.ledger = options.ledger or str(Path(options.to) / "ledger")
    return options


if __name__ == "__main__":
    print(f"{run(parse(sys.argv[1:])):,} documents encoded")
