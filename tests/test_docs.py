"""The documents' examples run as they are written."""

import re
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from tiny_models import save_tiny_backbone, tiny_model

from metaembed import InputPolicy

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def run_blocks(name, stand_ins=(), **given):
    """Run the Python blocks of a document one after another, as a reader would, and return the variables.

    `stand_ins` map texts of the document, such as a Hub id, to what stands there in the test.
    """
    text = (DOCS / name).read_text(encoding="utf-8")
    for written, here in dict(stand_ins).items():
        assert written in text
        text = text.replace(written, str(here))
    blocks = BLOCK.findall(text)
    assert blocks
    for number, block in enumerate(blocks):
        exec(compile(block, f"{name}, block {number}", "exec"), given)
    return given


@pytest.fixture(scope="module")
def ids(tmp_path_factory):
    """What stands for the models that the documents name."""
    folder = tmp_path_factory.mktemp("models")
    tiny_model(num_query_tokens=16, num_document_tokens=64).save_pretrained(folder / "trained")
    return {
        "you/your-metaembed": folder / "trained",
        "outputs/quickstart/model": folder / "trained",
        "Qwen/Qwen2.5-VL-3B-Instruct": save_tiny_backbone(folder / "backbone"),
    }


def named_in(name, ids):
    """Those of `ids` that a document names in a Python block."""
    blocks = "".join(BLOCK.findall((DOCS / name).read_text(encoding="utf-8")))
    return {written: here for written, here in ids.items() if written in blocks}


WITH_A_MODEL = [
    "index.md",
    "concepts.md",
    "comparison.md",
    "guides/getting-started.md",
    "guides/fine-tune.md",
    "guides/evaluate.md",
    "guides/choose-a-budget.md",
    "reference/model.md",
    "reference/training.md",
    "reference/search.md",
    "reference/stores.md",
    "reference/app.md",
]


@pytest.mark.parametrize("name", WITH_A_MODEL)
def test_the_examples_of_the_site_run(name, tmp_path, monkeypatch, pictures, ids):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for file in ("photo.png", "apple.png", "invoice.png"):
        pictures[0].save(file)
    run_blocks(name, named_in(name, ids))


def test_every_page_with_python_is_run():
    """Here, or by another test, which names the page."""
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.rglob("test_*.py"))
    pages = [path for path in DOCS.rglob("*.md") if BLOCK.search(path.read_text(encoding="utf-8"))]
    assert len(pages) > 10
    assert [page.name for page in pages if f'{page.relative_to(DOCS).as_posix()}"' not in tests] == []


def test_the_figures_of_the_guide_to_budgets_are_those_that_commands_wrote():
    """A figure that was measured again must be brought here too."""
    sources = ["../README.md", "performance.md", "reproduction.md"]
    known = "".join((DOCS / name).read_text(encoding="utf-8") for name in sources)
    guide = (DOCS / "guides" / "choose-a-budget.md").read_text(encoding="utf-8")
    prose = BLOCK.sub("", guide)
    figures = set(re.findall(r"\b\d+\.\d+\b|\b\d{4,}\b", prose))
    assert len(figures) > 20 and {figure for figure in figures if figure not in known} == set()


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


def test_the_examples_of_the_readme_run(tmp_path, monkeypatch, pictures, ids):
    monkeypatch.chdir(tmp_path)
    pictures[0].save("invoice.png")
    names = run_blocks(
        "../README.md",
        named_in("../README.md", ids),
        dataset=Dataset.from_dict({"query": ["red", "cat"], "positive": ["a red apple", "a cat face"]}),
    )
    assert names["found"].ids == [["invoice"]]  # of one query, and the other document has no page
    assert (tmp_path / "my-metaembed" / "model.safetensors").is_file()


@pytest.mark.parametrize("path", sorted([*DOCS.rglob("*.md"), *DOCS.parent.glob("*.md")]), ids=lambda path: path.name)
def test_links_between_documents_lead_to_files(path):
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        assert (path.parent / link).exists(), link
