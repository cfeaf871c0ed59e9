"""Each recipe runs from the Hub's rows to a table: a tiny backbone, a few rows in the same format, no network."""

import sys

import pytest
from datasets import Dataset, load_dataset
from tiny_models import ROOT, WORDS, picture, save_tiny_backbone

sys.path.append(str(ROOT / "examples" / "recipes"))

import mine_negatives
import mmeb
import vidore

from metaembed import MetaEmbedModel, maxsim
from metaembed.training.data import identity, load_pairs

TINY = ["--num_query_tokens", 4, "--num_document_tokens", 8, "--per_device_train_batch_size", 4]
TINY += ["--mini_batch_size", 2, "--max_steps", 2, "--save_steps", 2, "--report_to", "none", "--warmup_steps", 0]
TINY += ["--dataloader_num_workers", 0, "--dataloader_pin_memory", False, "--per_device_eval_batch_size", 4]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_tiny_backbone(tmp_path_factory.mktemp("recipes") / "backbone")


def run(main, backbone, output, *options):
    every = ["--output_dir", output, "--cpu", *options, "--backbone", backbone, *TINY]
    main(list(map(str, every)))


def colpali_rows(count, seed=0):
    """Rows with the columns of vidore/colpali_train_set; the last has no query."""
    rows = range(count)
    return Dataset.from_dict(
        {
            "image": [picture(seed + i, 128, 96) for i in rows],
            "image_filename": [f"page-{i}.jpg" for i in rows],
            "query": [*(f"{WORDS[i % 16]} {WORDS[(i + 5) % 16]}" for i in rows[:-1]), None],
            "answer": ["a"] * count,
            "source": ["pdf"] * count,
            "options": [None] * count,
            "page": ["1"] * count,
            "model": ["m"] * count,
            "prompt": ["p"] * count,
            "answer_type": [None] * count,
        }
    )


def test_vidore_from_the_training_set_to_the_table(backbone, tmp_path, monkeypatch, capsys):
    from mteb.mocks.mock_tasks.retrieval import MockAny2AnyRetrievalT2ITask

    source = tmp_path / "colpali"
    source.mkdir()
    colpali_rows(13).to_parquet(source / "train.parquet")
    colpali_rows(5, seed=100).to_parquet(source / "test.parquet")
    asked = []
    monkeypatch.setattr(vidore, "public_tasks", lambda names: asked.extend(names) or [MockAny2AnyRetrievalT2ITask()])
    run(vidore.main, backbone, tmp_path / "out", "--training_set", source, "--image_tokens", 4)
    pairs = load_dataset(str(tmp_path / "out" / "pairs"))
    assert len(pairs["train"]) == 12 and pairs["train"].column_names == ["query", "positive_image"]
    assert all(image.width * image.height <= 4 * 28 * 28 for image in pairs["train"]["positive_image"])
    printed = capsys.readouterr().out
    assert asked == ["ViDoRe(v1)", "ViDoRe(v2)", "ViDoRe(v3)"]
    assert "| task | (1, 1) | (2, 4) | (4, 8) |" in printed and "| MockAny2AnyRetrievalT2I | " in printed
    model = MetaEmbedModel.from_pretrained(tmp_path / "out" / "final")
    assert dict(model.processor.image_processor.size)["longest_edge"] == 4 * 28 * 28
    patches = model.processor([picture(1, 640, 480)])["pixel_values"]
    assert len(patches) * 64 <= 4 * 28 * 28, "images that are searched are as large as those trained on"
    assert model.encode_documents(picture(1, 64, 48)).shape == (8, 32)


def test_mmeb_from_the_training_set_to_the_table(backbone, tmp_path, capsys):
    """Text and images on either side, and pages; the candidates of the evaluation are given."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(8):
        picture(i).save(images / f"{i}.png")
    rows = range(8)
    none = [""] * 8
    texts, paths = [f"<|image_1|>\nFind {WORDS[i]}" for i in rows], [f"{i}.png" for i in rows]
    kinds = {"DocVQA": (texts, paths, WORDS[:8], none), "MSCOCO_t2i": (WORDS[:8], none, none, paths)}
    names = ("qry", "qry_image_path", "pos_text", "pos_image_path")
    for kind, columns in kinds.items():
        train, test = tmp_path / "train" / kind, tmp_path / "test" / kind
        train.mkdir(parents=True), test.mkdir(parents=True)
        row = dict(zip(names, columns, strict=True), neg_text=none, neg_image_path=none)
        Dataset.from_dict(row).to_parquet(train / "original.parquet")
        asked = {"qry_text": columns[0], "qry_img_path": columns[1]}
        asked |= {"tgt_text": [[columns[2][i], columns[2][i - 1]] for i in rows]}
        asked |= {"tgt_img_path": [[columns[3][i], columns[3][i - 1]] for i in rows]}
        Dataset.from_dict(asked).to_parquet(test / "test.parquet")
    for folder, split in (("train", "original"), ("test", "test")):  # as the cards of the Hub name the subsets
        entry = "- config_name: {0}\n  data_files:\n  - split: {1}\n    path: {0}/{1}.parquet\n"
        entries = "".join(entry.format(kind, split) for kind in kinds)
        (tmp_path / folder / "README.md").write_text(f"---\nconfigs:\n{entries}---\n")
    (tmp_path / "pages").mkdir()
    colpali_rows(5).to_parquet(tmp_path / "pages" / "train.parquet")
    sets = ["--training_set", tmp_path / "train", "--evaluation_set", tmp_path / "test", "--pages", tmp_path / "pages"]
    where = ["--train_images", images, "--eval_images", images, "--subsets", *kinds, "--eval_subsets", *kinds]
    run(mmeb.main, backbone, tmp_path / "out", *sets, *where, "--rows", 6, "--image_tokens", 4, "--eval_size", 4)
    printed = capsys.readouterr().out
    assert all(line in printed for line in ("6 rows of DocVQA", "6 rows of MSCOCO_t2i", "4 rows of pages"))
    pairs = load_dataset("parquet", data_files=str(tmp_path / "out" / "pairs" / "pairs.parquet"))["train"]
    assert "Find" in pairs[0]["query"] and "image_1" not in pairs[0]["query"] and pairs[0]["query_image"]
    assert "| subset | (1,1) | (2,4) | (4,8) |" in printed and "| MSCOCO_t2i | " in printed


def test_the_cost_table_is_calculated_for_every_preset(capsys):
    import cost
    import recipe

    assert cost.SHAPES.keys() == recipe.PRESETS.keys()
    seven = cost.SHAPES["qwen2.5-vl-7b"]
    weights = seven.layers * sum(a * b for a, b in seven.maps())
    assert weights == pytest.approx(6.525e9, rel=1e-3), "7.07 billion without the output layer, of which 0.545 embed"
    cost.main([])
    printed = capsys.readouterr().out
    assert "By calculation" in printed and printed.count("\n| vidore | ") == printed.count("\n| mmeb | ") == 8
    readme = (ROOT / "examples" / "recipes" / "README.md").read_text()
    assert printed.split("\n\n")[1].strip() in readme


def test_mined_negatives_are_the_models_mistakes_and_are_trained_on(backbone, tmp_path):
    (tmp_path / "pairs").mkdir()
    pages = [picture(i % 10, 64, 48) for i in range(12)]  # two pages are the positives of two questions
    columns = {"query": [f"{WORDS[i]} {WORDS[-i]}" for i in range(12)], "positive_image": pages}
    Dataset.from_dict(columns).to_parquet(tmp_path / "pairs" / "train.parquet")
    Dataset.from_dict({name: values[:5] for name, values in columns.items()}).to_parquet(
        tmp_path / "pairs" / "test.parquet"
    )
    model = MetaEmbedModel.from_backbone(backbone, num_query_tokens=4, num_document_tokens=8)
    model.save_pretrained(tmp_path / "model")
    options = ["--model", tmp_path / "model", "--pairs", tmp_path / "pairs", "--output", tmp_path / "out" / "pairs"]
    mine_negatives.main(list(map(str, [*options, "--negatives", 2])))
    pairs, _ = load_pairs(str(tmp_path / "out" / "pairs"))
    assert pairs.columns == ["query", "positive", "negative_1", "negative_2"] and len(pairs) == 12
    for row in pairs.inputs():
        names = [identity(row[column]) for column in pairs.columns[1:]]
        assert len(set(names)) == 3, "a query's own page, or one page twice"
        query = model.encode_queries(row["query"])
        scores = [maxsim(query[None], model.encode_documents(row[c])[None]).item() for c in pairs.columns[1:]]
        easier = [maxsim(query[None], model.encode_documents(p)[None]).item() for p in pages]
        allowed = [score for score in easier if score <= 0.95 * scores[0]]
        assert not allowed or scores[1] == pytest.approx(max(allowed), abs=1e-4), "the hardest below the margin"
    run(vidore.main, backbone, tmp_path / "out", "--steps", "train")
    assert (tmp_path / "out" / "final" / "config.json").is_file()
