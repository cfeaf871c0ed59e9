"""The notebooks run from the first cell to the last, as they are stored: small, and without outputs."""

import ast
import json

import pytest
from tiny_models import ROOT, tiny_model

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_cells(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.fixture
def run(fresh_process, tmp_path):
    """Runs a notebook in a folder of its own, beside what `make quickstart` writes, and returns what it prints."""
    tiny_model(num_query_tokens=16, num_document_tokens=64).save_pretrained(tmp_path / "outputs/quickstart/model")

    def run(name, **environment):
        (tmp_path / "notebooks").mkdir()
        code = "\n".join(code_cells(ROOT / "notebooks" / name))
        done = fresh_process("-c", code, cwd=tmp_path / "notebooks", path=[ROOT / "examples"], env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_stored_without_outputs_and_is_plain_python(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4 and len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    assert notebook["cells"][0]["cell_type"] == "markdown"
    for cell in notebook["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
    for code in code_cells(path):
        ast.parse(code)  # no magics: it runs without IPython too


def test_the_three_notebooks_are_there():
    assert [path.name for path in NOTEBOOKS] == ["fine_tune.ipynb", "pdf_dial.ipynb", "quickstart.ipynb"]


def test_the_quickstart_runs(run, tmp_path):
    printed = run("quickstart.ipynb", STEPS="2", TEST_SCENES="20")
    assert "| (16,64) |" in printed and "[1, 1] [[" in printed and "[16, 64] [[" in printed
    assert (tmp_path / "outputs/notebook/model/model.safetensors").is_file()


def test_fine_tuning_on_own_pairs_runs(run, tmp_path):
    printed = run("fine_tune.ipynb", EPOCHS="1")
    assert printed.count(" of 8 at budget (4,8)") == 2 and "\n| (16" in printed
    assert len((tmp_path / "outputs/pairs/pairs.jsonl").read_text().splitlines()) == 256


def test_the_dial_over_pdfs_runs(run):
    printed = run("pdf_dial.ipynb")
    assert "pdf 3" in printed and printed.count("circles.pdf page") == 15
