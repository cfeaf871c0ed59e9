"""What `import metaembed` gives, and what it leaves for later."""

import importlib
import subprocess
import sys

import pytest

import metaembed
from metaembed.old_names import MOVED

HEAVY = {"sentence_transformers", "peft", "datasets", "mteb"}


def test_importing_the_package_imports_no_training_library():
    """They take seconds; whoever encodes and searches never needs them."""
    code = "import sys, metaembed; metaembed.search, metaembed.cascade, dir(metaembed); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "metaembed.retrieval.cascade" in loaded and HEAVY.isdisjoint(loaded), HEAVY & set(loaded)


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
