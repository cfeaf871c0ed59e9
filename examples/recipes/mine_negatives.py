"""Mine hard negatives for pairs of any kind: for each query, documents that a trained model ranks high by mistake.

    python examples/recipes/mine_negatives.py --model outputs/vidore-3b/final --pairs outputs/vidore-3b/pairs
        --output outputs/vidore-3b-mined/pairs
    python examples/recipes/vidore.py --preset qwen2.5-vl-3b --output_dir outputs/vidore-3b-mined
        --steps train evaluate --backbone outputs/vidore-3b/final

Each split's queries are searched among the split's own documents, by exact late interaction at one budget.
(sentence-transformers' `mine_hard_negatives` has the same ideas, for models of a single vector and for texts only.)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets

from metaembed import MetaEmbedModel, search
from metaembed.training.data import Pairs, find_columns, identity, read_dataset

PART = 1_000  # rows in memory at a time


def encode(encode: Callable[..., torch.Tensor], inputs: Dataset, column: str, num_meta: int, batch_size: int) -> Any:
    """Return the vectors [N, num_meta, D] of a column and a name for each input, equal for equal ones."""
    vectors, names = [], []
    for start in range(0, len(inputs), PART):
        part = inputs[start : start + PART][column]
        vectors.append(encode(part, num_meta=num_meta, batch_size=batch_size))
        names += [identity(item) for item in part]
    return torch.cat(vectors), names


def mine(
    pairs: Pairs,
    model: MetaEmbedModel,
    budget: tuple[int, int],
    count: int,
    margin: float,
    depth: int,
    batch_size: int,
) -> list[list[int]]:
    """Return for each row the rows whose positives are its hard negatives, `count` each, hardest first.

    Args:
        pairs: The rows.
        model: The model whose mistakes are looked for.
        budget: `(r_q, r_c)` to search at.
        count: Negatives of a query.
        margin: A document that scores above `1 - margin` of the positive's score may well be relevant: left out.
            Where too few are left, the lowest-ranked of the `depth` best follow.
        depth: Documents looked at for a query.
        batch_size: Inputs encoded at a time.

    Raises:
        ValueError: If a query has fewer than `count` documents that are not its own.
    """
    inputs = pairs.inputs()
    queries, asked = encode(model.encode_queries, inputs, pairs.columns[0], budget[0], batch_size)
    documents, names = encode(model.encode_documents, inputs, pairs.columns[1], budget[1], batch_size)
    relevant: dict[str, set[str]] = {}  # a question that is asked twice has two positives
    for query, name in zip(asked, names, strict=True):
        relevant.setdefault(query, set()).add(name)
    first = {name: row for row, name in reversed(list(enumerate(names)))}  # each different document once
    rows = torch.tensor(sorted(first.values()), device=documents.device)
    found = search(queries, documents[rows], k=min(depth, len(rows)))
    own = (queries.float() @ documents.float().mT).amax(-1).sum(-1)  # of each row's query with its own document
    chosen = []
    for query, scores, indices, best in zip(asked, found.scores, rows[found.indices], own.tolist(), strict=True):
        ranked = zip(indices.tolist(), scores.tolist(), strict=True)
        others = [(row, score) for row, score in ranked if names[row] not in relevant[query]]
        hard = [row for row, score in others if score <= best - margin * abs(best)]
        rest = [row for row, _ in reversed(others) if row not in hard]
        if len(hard + rest) < count:
            raise ValueError(f"{len(hard + rest)} of {depth} documents are not the query's own, {count} are needed.")
        chosen.append((hard + rest)[:count])
    return chosen


def with_negatives(pairs: Pairs, chosen: Sequence[Sequence[int]]) -> Dataset:
    """Return the rows with the columns `negative_1`, `negative_1_image`, ..., which `examples/train.py` reads."""
    positives = [name for name in (pairs.columns[1], f"{pairs.columns[1]}_image") if name in pairs.rows.column_names]
    source, parts = pairs.rows.select_columns(positives), [pairs.rows]
    for number, rows in enumerate(zip(*chosen, strict=True), start=1):
        names = {name: name.replace(pairs.columns[1], f"negative_{number}", 1) for name in positives}
        parts.append(source.select(rows).rename_columns(names))
    return concatenate_datasets([part.flatten_indices() for part in parts], axis=1)


def main(argv: Sequence[str] | None = None) -> None:
    """Mine for every split."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Hub id or folder")
    parser.add_argument("--pairs", required=True, help="as --dataset of examples/train.py")
    parser.add_argument("--output", type=Path, required=True, help="folder of the pairs with negatives")
    parser.add_argument("--budget", default="4,8", help="vectors of a query and of a document")
    parser.add_argument("--negatives", type=int, default=1, help="of each query")
    parser.add_argument("--margin", type=float, default=0.05, help="below the positive's score, as a share of it")
    parser.add_argument("--depth", type=int, default=50, help="documents looked at for a query")
    parser.add_argument("--batch_size", type=int, default=8)
    arguments = parser.parse_args(argv)
    gpu = torch.cuda.is_available()
    model = MetaEmbedModel.from_pretrained(arguments.model, dtype=torch.bfloat16 if gpu else torch.float32).eval()
    model.to("cuda" if gpu else "cpu")
    r_q, r_c = map(int, arguments.budget.split(","))
    data, folder = read_dataset(arguments.pairs)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for split, rows in data.items():
        pairs = Pairs(rows, find_columns(rows), folder)
        settings = (r_q, r_c), arguments.negatives, arguments.margin, arguments.depth, arguments.batch_size
        with_negatives(pairs, mine(pairs, model, *settings)).to_parquet(arguments.output / f"{split}.parquet")
        print(f"{arguments.negatives} negatives for each of {len(rows)} rows of {split}")


if __name__ == "__main__":
    main()
