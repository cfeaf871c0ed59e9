"""How many nodes and shards a Qdrant cluster needs, as arithmetic. Prints a Markdown table.

python examples/qdrant_cluster/plan.py [--vectors 64] [--dim 128] [--replicas 2] [--memory 64] [--disk 4000]
"""

import argparse
from math import ceil

PREFIXES = (1, 8)  # kept beside all vectors, as `create_store` does
LINK_BYTES, M = 4, 16  # the HNSW graph has 2 * M links of a document on its lowest layer, and a tenth more above
ID_BYTES = 64  # a UUID, its number and its version, both ways
PAYLOAD_BYTES = 1_000  # of metadata on disk
MOST_PER_SHARD = 20_000_000  # documents: a larger graph takes hours to build anew
USED_MEMORY, USED_DISK = 0.6, 0.6  # the rest of the memory caches the disk, the rest of the disk lets segments merge


def plan(documents: int, options: argparse.Namespace) -> list[str]:
    """One row: what all replicas need together, and the nodes and shards for it."""
    numbers = sum({*PREFIXES, options.vectors}) * options.dim
    disk = documents * options.replicas * (numbers * (2 if options.half else 4) + PAYLOAD_BYTES)
    first = {"float32": 4 * options.dim, "int8": options.dim, "binary": options.dim / 8}[options.quantization]
    memory = documents * options.replicas * (first + 2.2 * M * LINK_BYTES + ID_BYTES)
    by_memory, by_disk = memory / (USED_MEMORY * options.memory * 1e9), disk / (USED_DISK * options.disk * 1e9)
    nodes = max(3, ceil(by_memory), ceil(by_disk))
    shards = nodes * ceil(documents / MOST_PER_SHARD / nodes)
    why = "replicas" if nodes == 3 else "memory" if by_memory > by_disk else "disk"
    return [
        f"{documents:,}",
        gigabytes(disk),
        gigabytes(memory),
        str(nodes),
        why,
        str(shards),
        f"{documents / shards:,.0f}",
    ]


def gigabytes(size: float) -> str:
    """A size as text."""
    return f"{size / 1e12:,.1f} TB" if size >= 1e12 else f"{size / 1e9:,.1f} GB"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=64)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--quantization", choices=["float32", "int8", "binary"], default="int8")
    parser.add_argument("--half", action="store_true", help="float16 on disk")
    parser.add_argument("--memory", type=float, default=64, help="GB of a node")
    parser.add_argument("--disk", type=float, default=4000, help="GB of a node")
    options = parser.parse_args()
    print("| documents | disk | memory | nodes | because of | shards | documents a shard |\n" + "|---" * 7 + "|")
    for documents in (10**6, 10**7, 10**8, 10**9):
        print("| " + " | ".join(plan(documents, options)) + " |")


if __name__ == "__main__":
    main()
