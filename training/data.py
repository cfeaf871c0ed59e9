"""Pairs to train on: rows of text and images from any file, folder or Hub dataset, as inputs of the model."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.compute
from datasets import Dataset, DatasetDict, load_dataset
from PIL import Image

from ..evaluation.budgets import BudgetEvaluator

if TYPE_CHECKING:
    from ..modeling_metaembed import MetaEmbedModel

LOADERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
HELD_OUT_SEED = 0  # the choice of held-out rows does not depend on the seed of the training


@dataclass(frozen=True)
class Pairs:
    """Rows of queries, positives and hard negatives.

    Args:
        rows: The dataset, as it was read.
        columns: The inputs of a row: the query, the positive, and the hard negatives.
        folder: What paths in image columns are relative to.
    """

    rows: Dataset
    columns: list[str]
    folder: Path

    def __len__(self) -> int:
        return len(self.rows)

    def inputs(self) -> Dataset:
        """Return a dataset with one column per input. Text and images are joined on reading: nothing is copied."""
        numbers = Dataset.from_dict({column: range(len(self.rows)) for column in self.columns})

        def read(batch: dict[str, list]) -> dict[str, list]:
            rows = self.rows[next(iter(batch.values()))]
            return join(split_negatives(rows), list(batch), self.folder)

        return numbers.with_transform(read)

    def evaluator(self, model: MetaEmbedModel, batch_size: int, name: str = "eval") -> BudgetEvaluator:
        """Return an evaluator in which each query must find its positive among all documents, negatives included."""
        queries, corpus, relevant = {}, {}, {}
        for index, row in enumerate(self.inputs()):
            query, *documents = (row[column] for column in self.columns)
            queries[f"q{index}"] = query
            corpus.update((identity(document), document) for document in documents)
            relevant[f"q{index}"] = {identity(documents[0])}
        cuts = dict(ndcg_at_k=[5, 10], mrr_at_k=[10], accuracy_at_k=[1], precision_recall_at_k=[1, 5], map_at_k=[100])
        cuts |= {"tokens": [16, True]} if model.config.token_projection else {}
        return BudgetEvaluator(
            queries, corpus, relevant, model.config.budgets, name=name, batch_size=batch_size, **cuts
        )


def load_pairs(
    dataset: str,
    config: str | None = None,
    train_split: str = "train",
    eval_split: str | None = None,
    eval_size: int = 0,
    query_column: str = "query",
    positive_column: str = "positive",
) -> tuple[Pairs, Pairs | None]:
    """Return the pairs to train on, and those to evaluate on if any.

    Args:
        dataset: Hub id; .parquet, .jsonl, .json or .csv file; folder with `pairs.jsonl` (or .parquet, ...) beside its
            images; image folder with `metadata.jsonl`; or folder of files named after their splits.
        config: Configuration of a Hub dataset.
        train_split: Split to train on.
        eval_split: Split to evaluate on.
        eval_size: Without `eval_split`: number of rows kept apart to evaluate on.
        query_column: Name of the queries' column.
        positive_column: Name of the documents' column.

    Raises:
        FileNotFoundError: If there is no such file, or an image that a row names is not there.
        ValueError: If a split or a column is missing, or negatives would be lost.
    """
    data, folder = read_dataset(dataset, config)
    for split in filter(None, (train_split, eval_split)):
        if split not in data:
            raise ValueError(f"{dataset} has no split {split!r}; it has {sorted(data)}.")
    train, held_out = data[train_split], None
    if eval_split:
        held_out = data[eval_split]
    elif eval_size:
        if eval_size >= len(train):
            raise ValueError(f"eval_size {eval_size} leaves none of the {len(train)} rows to train on: choose fewer.")
        parts = train.train_test_split(test_size=eval_size, seed=HELD_OUT_SEED)
        train, held_out = parts["train"], parts["test"]

    def pairs(rows: Dataset) -> Pairs:
        check_paths(rows, folder)
        return Pairs(rows, find_columns(rows, query_column, positive_column), folder)

    return pairs(train), None if held_out is None else pairs(held_out)


def read_dataset(dataset: str, config: str | None = None) -> tuple[DatasetDict, Path]:
    """Return the splits of a dataset, and the folder that its image paths are relative to.

    Raises:
        FileNotFoundError: If `dataset` looks like a file or a path, and there is none.
    """
    path = Path(dataset)
    file = path
    if path.is_dir():
        files = [path / f"pairs{suffix}" for suffix in LOADERS if (path / f"pairs{suffix}").is_file()]
        if len(files) > 1:
            raise ValueError(f"{path} has {' and '.join(file.name for file in files)}: name the one to read.")
        file = files[0] if files else path
    if file.suffix in LOADERS and file.is_file():
        return load_dataset(LOADERS[file.suffix], data_files=str(file)), file.parent
    if not path.exists() and (path.suffix in LOADERS or path.is_absolute() or dataset.count("/") > 1):
        raise FileNotFoundError(f"there is no file or folder {dataset!r} (in {Path.cwd()}).")
    return load_dataset(dataset, config), path if path.is_dir() else Path()


def find_columns(rows: Dataset, query_column: str = "query", positive_column: str = "positive") -> list[str]:
    """Return the inputs of a row: the query, the positive, and all hard negatives.

    Raises:
        ValueError: If the query's or positive's column is missing, or a column of negatives would not be used.
    """
    names = rows.column_names
    roots = {name.removesuffix("_image") for name in names}
    wanted = {"query_column": query_column, "positive_column": positive_column}
    for option, name in wanted.items():
        if name not in roots and name not in names:
            raise ValueError(f"the dataset has no column {name!r}; it has {names}. Name yours with {option}.")
    negatives = sorted(name for name in roots if re.fullmatch(r"negative(_\d+)?", name))
    used = {*wanted.values(), *negatives, "negatives"}
    if unused := [name for name in names if name.startswith("negative") and name.removesuffix("_image") not in used]:
        raise ValueError(
            f"the column {unused[0]!r} would not be used. Hard negatives are read from `negative`, `negative_1`, ... "
            "or from `negatives`, with a list in each row: rename the column, or remove it."
        )
    return [*wanted.values(), *negatives, *(f"negatives_{number + 1}" for number in range(count_negatives(rows)))]


def count_negatives(rows: Dataset) -> int:
    """Return the length of the lists in `negatives`.

    Raises:
        ValueError: If the lists have different lengths, or a row has none.
    """
    counts = set()
    for name in {"negatives", "negatives_image"} & set(rows.column_names):
        try:  # reads the lengths of the lists only, and no image
            counts |= set(pyarrow.compute.list_value_length(rows.data.column(name)).to_pylist())
        except NotImplementedError as error:
            raise ValueError(f"{name!r} must hold a list in each row; a single one goes into `negative`.") from error
    if len(counts) > 1 or None in counts:
        raise ValueError(
            "`negatives` and `negatives_image` must hold a list in each row, all of the same length; the lengths are "
            f"{sorted(counts, key=str)}. Cut the longer ones, or extend the shorter ones."
        )
    return counts.pop() if counts else 0


def check_paths(rows: Dataset, folder: Path) -> None:
    """Raise if an image path in a row does not exist, before the training starts.

    Raises:
        FileNotFoundError: If a file is missing.
    """
    for name, feature in rows.features.items():
        if name.endswith("_image") and "string" in str(feature):
            for index, value in enumerate(rows[name]):
                for path in flatten(value):
                    if not (folder / path).is_file():
                        raise FileNotFoundError(f"row {index} names {path!r} in {name!r}, which is not in {folder}.")


def flatten(value: Any) -> list[str]:
    """Return the strings in a string, in None, or in lists of these."""
    if isinstance(value, list):
        return [path for item in value for path in flatten(item)]
    return [] if value is None else [value]


def split_negatives(rows: dict[str, list]) -> dict[str, list]:
    """Return rows with their lists of `negatives` as separate columns: `negatives_1`, `negatives_2`, ..."""
    columns: dict[str, list] = {}
    for name, values in rows.items():
        if name in ("negatives", "negatives_image"):
            suffix = name.removeprefix("negatives")
            parts = enumerate(zip(*values, strict=True))
            columns.update((f"negatives_{number + 1}{suffix}", list(part)) for number, part in parts)
        else:
            columns[name] = values
    return columns


def join(rows: dict[str, list], columns: list[str], folder: Path) -> dict[str, list]:
    """Return the inputs of a batch of rows, the text of each joined with its images.

    Args:
        rows: Columns of values.
        columns: The inputs wanted.
        folder: What paths in image columns are relative to.

    Raises:
        ValueError: If a row has neither text nor an image for an input.
    """
    count = len(next(iter(rows.values())))
    batch: dict[str, list] = {}
    for column in columns:
        batch[column] = []
        images = rows.get(f"{column}_image", [None] * count)
        for text, image in zip(rows.get(column, [None] * count), images, strict=True):
            if text is None and image is None:
                raise ValueError(f"a row has neither text nor an image in {column!r}.")
            image = as_paths(image, folder)
            both = text is not None and image is not None
            batch[column].append({"text": text, "image": image} if both else image if text is None else text)
    return batch


def as_paths(image: Any, folder: Path) -> Any:
    """Return an image, or a list of them, with strings (as JSON holds them) replaced by paths."""
    if isinstance(image, list):
        return [as_paths(item, folder) for item in image]
    return folder / image if isinstance(image, str) else image


def identity(item: Any) -> str:
    """Return a name for an input, equal for equal inputs."""
    if isinstance(item, Image.Image):
        return hashlib.sha1(f"{item.mode}{item.size}".encode() + item.tobytes()).hexdigest()
    if isinstance(item, dict):
        return "+".join(identity(value) for value in item.values())
    if isinstance(item, (list, tuple)):
        return "+".join(map(identity, item))
    return str(item)
