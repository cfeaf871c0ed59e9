"""What a newcomer gets wrong: the error says what to do instead. More of this kind is tested where it belongs."""

import io

import pytest
import torch
from PIL import Image
from tiny_models import ROOT

from metaembed import MultiVectorIndex, search


@pytest.fixture(scope="module")
def pdf(tmp_path_factory):
    path = tmp_path_factory.mktemp("pdf") / "report.pdf"
    Image.new("RGB", (20, 20)).save(path)
    return path


@pytest.mark.parametrize("form", ["path", "bytes", "file", "dict"])
def test_a_pdf_that_is_passed_as_a_picture(qwen, pdf, form):
    content = pdf.read_bytes()
    given = {"path": pdf, "bytes": content, "file": io.BytesIO(content), "dict": {"image": str(pdf)}}[form]
    with pytest.raises(ValueError, match=r"it is a PDF\. Render its pages, with pypdfium2 for instance"):
        qwen.encode_documents([given])


def test_ids_where_positions_are_wanted_and_positions_where_ids_are():
    documents = torch.eye(4).view(2, 2, 4)
    for name in ("include", "exclude"):
        with pytest.raises(
            TypeError, match=rf"{name} must be positions .*, got ids: search a MultiVectorIndex, which"
        ):
            search(documents[:1], documents, k=1, **{name: ["a"]})
    with MultiVectorIndex.create(None, 2, 4) as index:
        with pytest.raises(TypeError, match="ids must be str, not 0"):
            index.add(documents, ids=range(2))
        index.add(documents, ids=["a", "b"])
        with pytest.raises(TypeError, match="ids must be str, not 0"):
            index.get([0])


def test_training_without_the_packages_that_only_training_needs_is_one_line(fresh_process):
    code = """
import runpy, sys
sys.modules["datasets"] = None  # as if it were not installed
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    done = fresh_process("-c", code, ROOT / "examples" / "train.py", "--help")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("train.py: error: import of datasets") and line.endswith("pip install 'metaembed[train]'")
