"""The Python blocks of the site's pages run as they are written, and no page is left out."""

import re
import sys
from pathlib import Path

import pytest
from test_docs import DOCS, run_blocks
from tiny_models import save_tiny_backbone, tiny_model

BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = [
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


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """What stands for the models that the pages name."""
    folder = tmp_path_factory.mktemp("models")
    tiny_model(num_query_tokens=16, num_document_tokens=64).save_pretrained(folder / "trained")
    return {
        "you/your-metaembed": folder / "trained",
        "outputs/quickstart/model": folder / "trained",
        "Qwen/Qwen2.5-VL-3B-Instruct": save_tiny_backbone(folder / "backbone"),
    }


@pytest.mark.parametrize("name", PAGES)
def test_the_examples_of_the_site_run(name, tmp_path, monkeypatch, pictures, models):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for file in ("photo.png", "apple.png", "invoice.png"):
        pictures[0].save(file)
    text = "".join(BLOCK.findall((DOCS / name).read_text(encoding="utf-8")))
    run_blocks(name, {written: here for written, here in models.items() if written in text})


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
    prose = BLOCK.sub("", (DOCS / "guides" / "choose-a-budget.md").read_text(encoding="utf-8"))
    figures = set(re.findall(r"\b\d+\.\d+\b|\b\d{4,}\b", prose))
    assert len(figures) > 20 and {figure for figure in figures if figure not in known} == set()


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*/*.md")), ids=lambda path: path.name)
def test_links_between_pages_lead_to_files(path):
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        assert (path.parent / link).exists(), link
