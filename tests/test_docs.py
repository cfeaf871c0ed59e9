"""The documents' examples run as they are written."""

import re
from pathlib import Path

import pytest

from metaembed import InputPolicy

DOCS = Path(__file__).parent.parent / "docs"


def run_blocks(name, **given):
    """Run the Python blocks of a document one after another, as a reader would, and return the variables."""
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / name).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
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


@pytest.mark.parametrize("path", sorted([*DOCS.glob("*.md"), *DOCS.parent.glob("*.md")]), ids=lambda path: path.name)
def test_links_between_documents_lead_to_files(path):
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        assert (path.parent / link).exists(), link
