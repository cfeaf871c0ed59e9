"""Pairs are read from any kind of file with nothing lost, and unusable parts are named."""

import json

import pytest
from datasets import Dataset
from tiny_models import picture

from metaembed.training.data import find_columns, load_pairs


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path):
    for i in range(2):
        picture(i).save(tmp_path / f"{i}.png")
    return tmp_path


def test_rows_of_text_and_images_are_read_from_any_kind_of_file(folder):
    """jsonl with paths, parquet with pictures, an image folder: the same inputs."""
    row = {"query": "a", "positive": "b", "positive_image": "0.png", "negative_image": ["0.png", "1.png"]}
    write_rows(folder / "rows.jsonl", row)
    pictures = [{**row, "positive_image": picture(0), "negative_image": [picture(0), picture(1)]}]
    Dataset.from_list(pictures).to_parquet(folder / "rows.parquet")
    (folder / "images" / "train").mkdir(parents=True)
    picture(0).save(folder / "images" / "train" / "0.png")
    write_rows(folder / "images" / "train" / "metadata.jsonl", {"file_name": "0.png", "query": "a"})
    found = {}
    for name, positive in (("rows.jsonl", "positive"), ("rows.parquet", "positive"), ("images", "image")):
        pairs, held_out = load_pairs(str(folder / name), positive_column=positive)
        found[name] = pairs.inputs()[0]
        assert held_out is None and len(pairs) == 1
    assert list(found["rows.jsonl"]) == ["query", "positive", "negative"]
    assert found["rows.jsonl"]["positive"] == {"text": "b", "image": folder / "0.png"}
    assert found["rows.jsonl"]["negative"] == [folder / "0.png", folder / "1.png"]
    assert found["rows.parquet"]["positive"]["image"].tobytes() == picture(0).tobytes()
    assert [image.tobytes() for image in found["rows.parquet"]["negative"]] == [picture(i).tobytes() for i in range(2)]
    assert found["images"]["image"].tobytes() == picture(0).tobytes() and list(found["images"]) == ["query", "image"]


def test_a_folder_with_pairs_beside_its_pictures_is_read_as_pairs(folder):
    write_rows(folder / "pairs.jsonl", {"query": "a", "positive_image": "0.png"}, {"query": "b", "positive": "c"})
    pairs, _ = load_pairs(str(folder))
    assert pairs.columns == ["query", "positive"]
    assert list(pairs.inputs()) == [{"query": "a", "positive": folder / "0.png"}, {"query": "b", "positive": "c"}]
    (folder / "pairs.csv").write_text("query,positive\na,b\n")
    with pytest.raises(ValueError, match=r"has pairs\.jsonl and pairs\.csv: name the one to read"):
        load_pairs(str(folder))


def test_each_entry_of_a_list_of_negatives_is_a_hard_negative(folder):
    row = {"query": "a", "positive": "b", "negative": "c"}
    write_rows(
        folder / "rows.jsonl",
        {**row, "negatives": ["d", "e"], "negatives_image": [None, ["0.png"]]},
        {**row, "negatives": ["f", None], "negatives_image": [["0.png"], ["0.png", "0.png"]]},
    )
    pairs, _ = load_pairs(str(folder / "rows.jsonl"))
    assert pairs.columns == ["query", "positive", "negative", "negatives_1", "negatives_2"]
    image = folder / "0.png"
    assert pairs.inputs()[1] == {
        **{"query": "a", "positive": "b", "negative": "c"},
        **{"negatives_1": {"text": "f", "image": [image]}, "negatives_2": [image, image]},
    }


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"negatives": [["a"], ["b", "c"]]}, r"all of the same length; the lengths are \[1, 2\]"),
        ({"negatives": [["a"], None]}, r"a list in each row.*\[1, None\]"),
        ({"negatives": [["a"]], "negatives_image": [["0.png", "1.png"]]}, r"the lengths are \[1, 2\]"),
        ({"negatives": ["a"]}, "'negatives' must hold a list in each row"),
        ({"negative_hard": ["a"]}, "'negative_hard' would not be used"),
        ({"negatives_1": ["a"]}, "'negatives_1' would not be used"),
    ],
)
def test_negatives_that_would_be_lost_are_named(columns, message):
    count = len(next(iter(columns.values())))
    rows = Dataset.from_dict({"query": ["a"] * count, "positive": ["b"] * count, **columns})
    with pytest.raises(ValueError, match=message):
        find_columns(rows)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(dataset="nothing.jsonl"), FileNotFoundError, "there is no file or folder 'nothing.jsonl'"),
        (dict(dataset="a/b/c"), FileNotFoundError, "there is no file or folder 'a/b/c'"),
        (dict(positive_column="answer"), ValueError, "no column 'answer'; it has .* with positive_column"),
        (dict(eval_split="test"), ValueError, r"has no split 'test'; it has \['train'\]"),
        (dict(eval_size=2), ValueError, "eval_size 2 leaves none of the 2 rows"),
    ],
)
def test_missing_files_columns_and_splits_are_named(folder, options, error, message):
    write_rows(folder / "pairs.jsonl", {"query": "a", "positive": "b"}, {"query": "b", "positive": "c"})
    with pytest.raises(error, match=message):
        load_pairs(**{"dataset": str(folder), **options})


def test_a_missing_image_is_named_before_the_training(folder):
    rows = [{"query": "a", "positive_image": ["0.png", "1.png"]}, {"query": "b", "positive_image": ["0.png", "2.png"]}]
    write_rows(folder / "pairs.jsonl", *rows)
    with pytest.raises(FileNotFoundError, match=r"row 1 names '2\.png' in 'positive_image'"):
        load_pairs(str(folder))


def test_held_out_rows_are_the_same_every_time(folder):
    write_rows(folder / "pairs.jsonl", *({"query": str(i), "positive": "b"} for i in range(10)))
    kept = [sorted(load_pairs(str(folder), eval_size=3)[1].rows["query"]) for _ in range(2)]
    rest = load_pairs(str(folder), eval_size=3)[0].rows["query"]
    assert kept[0] == kept[1] and sorted([*kept[0], *rest]) == [str(i) for i in range(10)]
