"""The documents' examples run as they are written."""

import re
from pathlib import Path

import pytest
from datasets import Dataset
from tiny_models import save_tiny_backbone, tiny_model

from metaembed import InputPolicy

DOCS = Path(__file__).parent.parent / "docs"


def run_blocks(name, stand_ins=(), **given):
    """Run the Python blocks of a document one after another, as a reader would, and return the variables.

    `stand_ins` map texts of the document, such as a Hub id, to what stands there in the test.
    """
    text = (DOCS / name).read_text(encoding="utf-8")
    for written, here in dict(stand_ins).items():
        assert written in text
        text = text.replace(written, str(here))
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    for number, block in enumerate(blocks):
        exec(compile(block, f"{name}, block {number}", "exec"), given)
    return given


def test_the_examples_of_search_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_blocks("search.md")
    assert len(names["index"]) == 0 and len(names["small"]) == 1000
    assert len(names["found"].ids[0]) == 10


def test_the_examples_of_inputs_run(tmp_path, monkeypatch, qwen, pictures):
    monkeypatch.chdir(tmp_path)
    pictures[0].save("photo.png")
    before = qwen.policy
    try:
        assert run_blocks("inputs.md", model=qwen)["model"].policy == InputPolicy.server()
    finally:
        qwen.policy = before


def test_the_examples_of_the_full_dial_run(tmp_path, monkeypatch, pictures):
    monkeypatch.chdir(tmp_path)
    backbone, pages = save_tiny_backbone(tmp_path / "backbone"), [*pictures, "a text"]
    names = run_blocks("full-dial.md", backbone=backbone, pages=pages, ids=["0", "1", "2", "text"])
    assert names["documents"].tokens.shape[:2] == (4, 64)
    assert len(names["meta"]) == len(names["tokens"]) == 4


def test_the_examples_of_the_readme_run(tmp_path, monkeypatch, pictures):
    monkeypatch.chdir(tmp_path)
    pictures[0].save("invoice.png")
    tiny_model(num_query_tokens=16, num_document_tokens=64).save_pretrained("trained")
    names = run_blocks(
        "../README.md",
        {
            "you/your-metaembed": tmp_path / "trained",
            "Qwen/Qwen2.5-VL-3B-Instruct": save_tiny_backbone(tmp_path / "backbone"),
        },
        dataset=Dataset.from_dict({"query": ["red", "cat"], "positive": ["a red apple", "a cat face"]}),
    )
    assert names["found"].ids == [["invoice"]]  # of one query, and the other document has no page
    assert (tmp_path / "my-metaembed" / "model.safetensors").is_file()


@pytest.mark.parametrize("path", sorted([*DOCS.glob("*.md"), *DOCS.parent.glob("*.md")]), ids=lambda path: path.name)
def test_links_between_documents_lead_to_files(path):
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        assert (path.parent / link).exists(), link
