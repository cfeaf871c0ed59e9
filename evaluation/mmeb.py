"""MMEB (36 data sets of images and text with given candidates, precision@1) at every budget, from one encoding."""

from __future__ import annotations

import json
import re
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..scoring_metaembed import maxsim
from .tables import markdown_table

GROUPS = {
    "classification": [
        *("ImageNet-1K", "N24News", "HatefulMemes", "VOC2007", "SUN397"),
        *("Place365", "ImageNet-A", "ImageNet-R", "ObjectNet", "Country211"),
    ],
    "question answering": [
        *("OK-VQA", "A-OKVQA", "DocVQA", "InfographicsVQA", "ChartQA"),
        *("Visual7W", "ScienceQA", "VizWiz", "GQA", "TextVQA"),
    ],
    "retrieval": [
        *("VisDial", "CIRR", "VisualNews_t2i", "VisualNews_i2t", "MSCOCO_t2i", "MSCOCO_i2t"),
        *("NIGHTS", "WebQA", "FashionIQ", "Wiki-SS-NQ", "OVEN", "EDIS"),
    ],
    "grounding": ["MSCOCO", "RefCOCO", "RefCOCO-Matching", "Visual7W-Pointing"],
}

Budget = tuple[int, int]


def evaluate(
    model: Any,
    load: Callable[[str], Iterable[Mapping[str, Any]]],
    subsets: Sequence[str],
    image_dir: Path,
    output: Path,
    overwrite: bool = False,
    batch_size: int = 8,
) -> tuple[dict[str, dict[Budget, float]], list[str]]:
    """Measure precision@1 on each subset. One that fails does not stop the others.

    Args:
        model: The `MetaEmbedModel`.
        load: Returns the rows of a subset.
        subsets: Their names, such as those of [`GROUPS`].
        image_dir: What the image paths are relative to.
        output: Folder that keeps the results, in one JSON file per subset.
        overwrite: Whether to run subsets again that have a file.
        batch_size: Inputs encoded at a time.

    Returns:
        Precision@1 by subset and budget; and for each subset that failed, its name and the error.
    """
    results: dict[str, dict[Budget, float]] = {}
    failures = []
    for subset in subsets:
        path = output / f"{subset}.json"
        if overwrite or not path.is_file():
            try:
                found = precision_at_1(model, load(subset), image_dir, batch_size)
            except Exception as error:
                traceback.print_exc()
                failures.append(f"{subset}: {error}")
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            named = {f"{r_q},{r_c}": value for (r_q, r_c), value in found.items()}
            path.write_text(json.dumps(named, indent=2) + "\n", encoding="utf-8")
        saved = json.loads(path.read_text(encoding="utf-8"))
        results[subset] = {(int(r_q), int(r_c)): saved[f"{r_q},{r_c}"] for r_q, r_c in (b.split(",") for b in saved)}
    return results, failures


def precision_at_1(
    model: Any, rows: Iterable[Mapping[str, Any]], image_dir: Path, batch_size: int = 8
) -> dict[Budget, float]:
    """Return by budget how often the relevant candidate scores higher than every other one. A tie is a miss.

    Args:
        model: The `MetaEmbedModel`.
        rows: In the format of MMEB: `qry_text`, `qry_img_path`, and the lists `tgt_text` and `tgt_img_path` of the
            candidates, the relevant one first.
        image_dir: What the image paths are relative to.
        batch_size: Inputs encoded at a time. Each different query and candidate is encoded once.
    """
    asked, offered = [], []
    for row in rows:
        asked.append((row["qry_text"], row["qry_img_path"]))
        # Some rows list a candidate twice.
        offered.append(list(dict.fromkeys(zip(row["tgt_text"], row["tgt_img_path"], strict=True))))
    query_rows, queries = _encode(model.encode_queries, asked, image_dir, batch_size)
    every = (candidate for candidates in offered for candidate in candidates)
    document_rows, documents = _encode(model.encode_documents, every, image_dir, batch_size)
    hits: dict[Budget, int] = dict.fromkeys(map(tuple, model.config.budgets), 0)
    for key, candidates in zip(asked, offered, strict=True):
        query = queries[query_rows[key]][None]  # [1, R_q, D]
        vectors = documents[[document_rows[candidate] for candidate in candidates]]  # [candidates, R_c, D]
        for budget in hits:
            scores = maxsim(query, vectors, budget=budget)[0]  # [candidates]
            hits[budget] += bool((scores[0] > scores[1:]).all())
    return {budget: count / len(asked) for budget, count in hits.items()}


def _encode(
    encode: Callable[..., Tensor], inputs: Iterable[tuple[str, str]], image_dir: Path, batch_size: int
) -> tuple[dict[tuple[str, str], int], Tensor]:
    """Encode each different input once; return the rows of the inputs, and vectors [N, R, D]."""
    rows = {key: row for row, key in enumerate(dict.fromkeys(inputs))}
    return rows, encode([_as_input(*key, image_dir) for key in rows], batch_size=batch_size)


def _as_input(text: str, image_path: str, image_dir: Path) -> Any:
    """Turn a text and an image path, either of which may be empty, into an input of the model."""
    text = re.sub(r"<\|image_\d+\|>\s*", "", text).strip()  # the data set's placeholder of the image
    if not image_path:
        return text
    image = image_dir / image_path
    return {"text": text, "image": image} if text else image


def table(results: Mapping[str, Mapping[Budget, float]]) -> str:
    """Return a Markdown table: one row per subset, and the means of complete groups and of all subsets."""
    budgets = list(next(iter(results.values())))
    groups = {name: names for name, names in GROUPS.items() if set(names) <= set(results)}
    rows = []
    for title, names in [*((name, [name]) for name in results), *groups.items(), ("mean", list(results))]:
        means = (sum(results[name][budget] for name in names) / len(names) for budget in budgets)
        rows.append([title, *(f"{mean:.4f}" for mean in means)])
    return markdown_table(["subset", *(f"({r_q},{r_c})" for r_q, r_c in budgets)], rows)
