"""What `import metaembed` gives, and what it leaves for later."""

import importlib
import subprocess
import sys

import pytest

import metaembed
from metaembed.configuration_metaembed import DEFAULT_BUDGETS
from metaembed.old_names import MOVED
from metaembed.retrieval import storage

HEAVY = {"sentence_transformers", "peft", "datasets", "mteb"}


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_importing_the_package_imports_no_library_that_takes_seconds():
    """Whoever searches needs torch alone, and `metaembed --help` not even that."""
    loaded = run("import sys, metaembed; dir(metaembed); print(*sys.modules)")
    assert {"torch", "transformers", *HEAVY}.isdisjoint(loaded)
    code = "import sys, metaembed; metaembed.search, metaembed.cascade, metaembed.open_store; print(*sys.modules)"
    loaded = run(code)
    assert {"torch", "metaembed.retrieval.cascade"} <= set(loaded) and {"transformers", *HEAVY}.isdisjoint(loaded)


@pytest.mark.parametrize(
    "imports",
    [
        "import metaembed, transformers",
        "import metaembed.processing_metaembed",  # which imports transformers before its classes are there
        "import transformers, metaembed",
    ],
)
def test_the_auto_classes_know_ours_whatever_is_imported_first(imports, fresh_process):
    code = f"""
import sys
del sys.modules["transformers"]  # as if nobody had imported it yet
{imports}
from transformers import AutoConfig, AutoModel, AutoProcessor
config = AutoConfig.for_model("metaembed")
assert type(config).__module__ == "metaembed.configuration_metaembed"
assert type(config) in AutoModel._model_mapping
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
assert type(config) in PROCESSOR_MAPPING
print(*(type(finder).__name__ for finder in sys.meta_path))
print(type(sys.modules["metaembed.modeling_metaembed"].__loader__).__name__)
"""
    done = fresh_process("-c", code)
    printed = done.stdout.split()
    assert done.returncode == 0 and "Watch" not in printed and printed[-1] == "SourceFileLoader", done.stderr


def test_an_index_is_laid_out_for_the_papers_budgets_although_it_does_not_import_them():
    assert tuple(r_c for _, r_c in DEFAULT_BUDGETS) == storage._EDGES


@pytest.mark.parametrize("name", metaembed.__all__)
def test_every_public_name_is_there_and_listed(name):
    assert callable(getattr(metaembed, name)) and name in dir(metaembed)


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'metaembed' has no attribute 'nothing'"):
        _ = metaembed.nothing


@pytest.mark.parametrize("old", MOVED)
def test_a_module_of_version_0_1_is_todays_under_its_old_name_and_warns(old):
    sys.modules.pop(f"metaembed.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"metaembed.{old} is now called metaembed.{MOVED[old]};") as caught:
        module = importlib.import_module(f"metaembed.{old}")
    assert module is importlib.import_module(f"metaembed.{MOVED[old]}") and len(caught) == 1


def test_the_readme_of_version_0_1_still_runs():
    for old in ("adapter_metaembed", "training_metaembed"):
        sys.modules.pop(f"metaembed.{old}", None)
    with pytest.warns(DeprecationWarning) as caught:
        from metaembed.adapter_metaembed import merge_adapter
        from metaembed.training_metaembed import MMRLoss
    assert (merge_adapter, MMRLoss) == (metaembed.merge_adapter, metaembed.MMRLoss)
    assert {warning.filename for warning in caught} == {__file__}


def test_no_other_module_is_found_under_an_old_name():
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'metaembed\.nothing_metaembed'"):
        importlib.import_module("metaembed.nothing_metaembed")
