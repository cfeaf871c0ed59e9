"""The ONNX export of a text backbone, with both engines. The vision-language one is checked by the command."""

import importlib.util

import pytest
from conformance import load
from export_onnx import compare, export_onnx, other_texts

NEEDED = ("onnxscript", "onnxruntime", "openvino")


@pytest.mark.slow
@pytest.mark.skipif(not all(map(importlib.util.find_spec, NEEDED)), reason=f"needs {', '.join(NEEDED)}")
def test_both_engines_give_torch_s_embeddings(tmp_path):
    """On batches of other sizes and lengths than the example's."""
    model = load("qwen3")
    path = export_onnx(model, tmp_path / "folder" / "query.onnx", "a red apple", "query", 1)
    rows = compare(model, path, other_texts("a"), "query", 1, repeats=1)
    assert [row[0] for row in rows] == ["torch", "ONNX Runtime", "OpenVINO"]
    assert max(float(row[1]) for row in rows) < 1e-5
