"""Each recipe runs from the Hub's rows to a table: a tiny backbone, a few rows in the same format, no network."""

import sys

import pytest
from datasets import Dataset, load_dataset
from tiny_models import ROOT, WORDS, picture, save_tiny_backbone

sys.path.append(str(ROOT / "examples" / "recipes"))

import recipe
import vidore

from metaembed import MetaEmbedModel

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
            "image": [picture(seed + i, 64, 48) for i in rows],
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
    run(vidore.main, backbone, tmp_path / "out", "--training_set", source, "--image_tokens", 2)
    pairs = load_dataset(str(tmp_path / "out" / "pairs"))
    assert len(pairs["train"]) == 12 and pairs["train"].column_names == ["query", "positive_image"]
    assert all(image.width * image.height <= 2 * 28 * 28 for image in pairs["train"]["positive_image"])
    printed = capsys.readouterr().out
    assert asked == ["ViDoRe(v1)", "ViDoRe(v2)", "ViDoRe(v3)"]
    assert "| task | (1, 1) | (2, 4) | (4, 8) |" in printed and "| MockAny2AnyRetrievalT2I | " in printed
    model = MetaEmbedModel.from_pretrained(tmp_path / "out" / "final")
    assert dict(model.processor.image_processor.size)["longest_edge"] == 2 * 28 * 28
    assert model.encode_documents(picture(1, 64, 48)).shape == (8, 32)
