"""Seven files travel with a checkpoint, short enough to be read by a person who is asked to trust them."""

import ast
import os
import sys
from pathlib import Path

import pytest
import wall
from tiny_models import tiny_model
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from metaembed.loading_metaembed import TRAVELLING
from metaembed.training.lora import lora_config

NAMES = ("configuration", "inputs", "processing", "modeling", "loading", "scoring", "sentence")
EVERY = {f"{name}_metaembed.py" for name in NAMES}


@pytest.fixture(scope="module")
def model():
    return tiny_model(layers=1)


def python_files(folder):
    return {path.name for path in Path(folder).rglob("*.py")}


def test_exactly_seven_files_travel_and_no_other_has_their_suffix():
    assert set(TRAVELLING) == EVERY and len(TRAVELLING) == wall.MOST_FILES
    assert {path.name for path in wall.ROOT.rglob("*_metaembed.*") if "data" not in path.parts} >= EVERY
    assert {path.name for path in wall.ROOT.glob("*_metaembed.*")} == EVERY


def test_what_travels_can_be_read_in_one_sitting():
    assert sum(wall.lines().values()) <= wall.MOST_LINES, wall.lines()


def test_a_command_prints_what_travels(fresh_process):
    output = fresh_process(wall.__file__).stdout
    assert all(name in output for name in EVERY) and f"in 7 files, of {wall.MOST_LINES:,} allowed" in output


@pytest.mark.parametrize("start", ["modeling_metaembed.py", "sentence_metaembed.py"])
def test_transformers_finds_all_of_them_from_either_entry_point(start):
    found = {os.path.basename(path) for path in get_relative_import_files(wall.ROOT / start)}
    assert found == EVERY


@pytest.mark.parametrize("name", TRAVELLING)
def test_a_file_that_travels_imports_only_its_siblings_and_what_users_have(name):
    path = wall.ROOT / name
    known = {"torch", "transformers", "numpy", "PIL", "huggingface_hub", "safetensors", "tqdm", "httpx", "packaging"}
    assert set(get_imports(path)) <= known | sys.stdlib_module_names
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and f"{node.module}.py" in EVERY, f"line {node.lineno} leaves the flat files"
    imports = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("from .")]
    assert len(imports) == sum(
        isinstance(node, ast.ImportFrom) and node.level == 1
        for node in ast.parse(path.read_text(encoding="utf-8")).body
    ), "an import is hidden in a string"


def test_every_entry_point_saves_exactly_these(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    model.to_sentence_transformers().save_pretrained(str(tmp_path / "encoder"))
    model.processor.save_pretrained(tmp_path / "processor")
    assert python_files(tmp_path / "model") == python_files(tmp_path / "encoder") == EVERY
    needed = {f"{name}_metaembed.py" for name in ("configuration", "inputs", "processing")}
    assert python_files(tmp_path / "processor") == needed
    adapted = tiny_model(layers=1)
    adapted.adapter_base = ("lab/backbone", None)
    adapted.add_adapter(lora_config(adapted, r=2))
    adapted.save_pretrained(tmp_path / "adapter")
    assert python_files(tmp_path / "adapter") == EVERY


@pytest.mark.slow
def test_a_checkpoint_saves_all_of_them_again_without_the_package_and_says_what_needs_it(
    model, tmp_path, fresh_process
):
    model.save_pretrained(tmp_path / "first")
    code = """
import sys
sys.modules["metaembed"] = None
from transformers import AutoModel
model = AutoModel.from_pretrained("first", trust_remote_code=True)
model.save_pretrained("second")
model.to_sentence_transformers(device="cpu").save_pretrained("third")
assert model.score(model.encode_queries(["a"]), model.encode_documents(["a", "b"])).shape == (1, 2)
for create in (type(model).from_backbone, type(model).from_authors_checkpoint):
    try:
        create("lab/backbone")
    except ImportError as error:
        assert "pip install metaembed" in str(error), error
    else:
        raise AssertionError("the package was found")
"""
    done = fresh_process("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert python_files(tmp_path / "second") == python_files(tmp_path / "third") == EVERY
