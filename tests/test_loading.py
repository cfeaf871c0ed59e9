"""Checkpoints load completely or not at all, loaded models keep working, and saved models load again."""

import copy
import json
import os
import pickle
import re
import shutil
import sys

import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModel

from metaembed import MetaEmbedConfig, MetaEmbedModel
from metaembed.training.lora import lora_config


@pytest.fixture(scope="module")
def model():
    """Copy it to change it."""
    return tiny_model(layers=1, embedding_dim=8)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(path)
    return path


# -- The configuration fits, or nothing is loaded or saved ----------------------------------------------------------

MISFITS = [
    ({"num_query_tokens": 2}, ValueError, "query_token_ids|budget"),
    ({"budgets": [[4, 8], [1, 1]]}, ValueError, "not nested"),
    ({"query_num_meta": 99}, ValueError, "query_num_meta must be between 1 and 4"),
    ({"document_instruction": 5}, TypeError, "document_instruction must be a string"),
    ({"query_token_ids": [3, 4, 5, 7]}, ValueError, "4 contiguous ids"),
]


@pytest.mark.parametrize(("fields", "error", "message"), MISFITS, ids=lambda value: str(value)[:30])
def test_a_configuration_that_does_not_fit_is_neither_loaded_nor_saved(
    model, folder, tmp_path, fields, error, message
):
    with pytest.raises(error, match=message):
        MetaEmbedModel.from_pretrained(folder, **fields)
    changed = copy.deepcopy(model)
    for name, value in fields.items():
        setattr(changed.config, name, value)
    for save in (changed.save_pretrained, changed.config.save_pretrained):
        with pytest.raises(error, match=message):
            save(tmp_path / "out")
    assert not list(tmp_path.glob("out/*.safetensors")) and not (tmp_path / "out/config.json").exists()


@pytest.mark.parametrize(
    "fields", [{"embedding_dim": 12}, {"embedding_dim": None}, {"document_token_ids": list(range(9000, 9008))}]
)
def test_a_configuration_that_does_not_fit_the_weights_is_not_saved(model, tmp_path, fields):
    changed = copy.deepcopy(model)
    for name, value in fields.items():
        setattr(changed.config, name, value)
    with pytest.raises(ValueError, match="does not fit the weights"):
        changed.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ids", [[3, 4, 5, 6], [-4, -3, -2, -1], None], ids=str)
def test_token_ids_that_are_not_the_tokenizers_are_neither_loaded_nor_saved(model, folder, tmp_path, ids):
    changed = copy.deepcopy(model)
    changed.config.query_token_ids = ids
    with pytest.raises(ValueError, match=r"Meta Tokens|token_ids"):
        changed.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    if ids is not None:
        with pytest.raises(ValueError, match=r"Meta Tokens|token_ids"):
            MetaEmbedModel.from_pretrained(folder, query_token_ids=ids)


def test_an_override_that_fits_is_loaded_and_saved(folder, tmp_path):
    loaded = MetaEmbedModel.from_pretrained(folder, query_num_meta=2, traits={"causal": False})
    loaded.save_pretrained(tmp_path)
    again = MetaEmbedModel.from_pretrained(tmp_path)
    assert again.config.query_num_meta == 2 and again.config.traits.causal is False
    assert again.encode_queries("a").shape == (2, 8)


def test_a_plain_backbone_is_not_a_saved_model_and_the_error_says_what_to_do(model, tmp_path):
    model.backbone.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"not a MetaEmbed model.* use MetaEmbedModel\.from_backbone"):
        MetaEmbedModel.from_pretrained(tmp_path)


# -- What was loaded keeps working -----------------------------------------------------------------------------------


def test_a_model_encodes_after_its_folder_is_gone_elsewhere_and_pickled(model, folder, tmp_path, monkeypatch):
    expected = model.encode_queries("a red apple")
    shutil.copytree(folder, tmp_path / "here/model")
    (tmp_path / "there/model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    loaded = MetaEmbedModel.from_pretrained("model")
    data = pickle.dumps(loaded)
    monkeypatch.chdir(tmp_path / "there")
    shutil.rmtree(tmp_path / "here")
    for each in (loaded, pickle.loads(data), copy.deepcopy(loaded)):
        torch.testing.assert_close(each.encode_queries("a red apple"), expected)
        assert each.processor.config is each.config
    loaded.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(
        MetaEmbedModel.from_pretrained(tmp_path / "again").encode_queries("a red apple"), expected
    )


@pytest.mark.parametrize("kind", ["folder", "adapter"])
def test_the_token_of_the_hub_stays_out_of_the_model(request, kind):
    loaded = MetaEmbedModel.from_pretrained(request.getfixturevalue(kind), token="hf_secret_of_a_user")
    for part in (loaded, loaded.config, loaded.processor):
        assert b"hf_secret" not in pickle.dumps(part) and "hf_secret" not in repr(vars(copy.deepcopy(part)))


def test_a_model_can_be_made_from_a_configuration_and_weights(model):
    loaded = MetaEmbedModel.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    inputs = model.processor.process_queries(["a red apple"])
    assert torch.equal(loaded(**inputs).embeddings, model(**inputs).embeddings)
    with pytest.raises(ValueError, match="has no processor"):
        loaded.encode_queries("a")
    short = {name: value for name, value in model.state_dict().items() if not name.startswith("projection")}
    with pytest.raises(ValueError, match=r"state dict did not load completely: .* missing.*projection"):
        MetaEmbedModel.from_pretrained(None, config=model.config, state_dict=short)


def test_a_default_dtype_of_torch_changes_nothing(model, folder):
    torch.set_default_dtype(torch.bfloat16)
    try:
        loaded = MetaEmbedModel.from_pretrained(folder)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.encode_queries("a red apple"), model.encode_queries("a red apple"))


# -- From model inputs to embeddings --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen", "bert"])
@pytest.mark.parametrize("side", ["query", "document"])
@torch.no_grad()
def test_an_exported_and_a_compiled_model_equal_the_eager_one(request, name, side):
    model = request.getfixturevalue(name)
    inputs = {**model.processor.process(["a red apple", "a blue rocket over the moon"], side, 3), "num_meta": 3}
    eager = model(**inputs).embeddings
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(**inputs).embeddings, eager)
    exported = torch.export.export(model, (), inputs).module()
    assert torch.equal(exported(**inputs).embeddings, eager)


@torch.no_grad()
def test_a_compiled_model_gives_nan_where_there_is_no_meta_token(qwen):
    inputs = {**qwen.processor.process_queries(["a red apple"], 2), "num_meta": 3}
    torch.compiler.reset()
    embeddings = torch.compile(qwen, fullgraph=True, backend="eager")(**inputs).embeddings
    assert embeddings[:, :2].isfinite().all() and embeddings[:, 2].isnan().all()
    with pytest.raises(ValueError, match="num_meta must be between 1 and 2"):
        qwen(**inputs)


def test_outputs_are_tuples_where_asked(model):
    inputs = model.processor.process_queries(["a"])
    output = model(**inputs, return_dict=False)
    assert type(output) is tuple and torch.equal(output[0], model(**inputs).embeddings)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_compiled_backbone_saves_the_names_of_the_plain_one(model, tmp_path, adapted):
    changed = copy.deepcopy(model)
    if adapted:
        changed.adapter_base = ("lab/backbone", None)
        changed.add_adapter(lora_config(changed, r=2))
    changed.save_pretrained(tmp_path / "plain")
    changed.backbone = torch.compile(changed.backbone, backend="eager")
    changed.compile(backend="eager")
    changed.save_pretrained(tmp_path / "compiled")
    changed.save_pretrained(tmp_path / "given", state_dict=changed.state_dict())
    assert hasattr(changed.backbone, "_orig_mod")
    name = "adapter_model.safetensors" if adapted else "model.safetensors"
    plain = (tmp_path / "plain" / name).read_bytes()
    assert plain == (tmp_path / "compiled" / name).read_bytes()
    if not adapted:
        assert plain == (tmp_path / "given" / name).read_bytes()


def test_a_compiled_model_is_not_saved_without_the_package(model, tmp_path, monkeypatch):
    """Under the names of the wrappers it would not load."""
    changed = copy.deepcopy(model)
    changed.backbone = torch.compile(changed.backbone, backend="eager")
    monkeypatch.setitem(sys.modules, "metaembed.training.saving", None)
    with pytest.raises(ImportError, match=r"needs training\.saving of the package: pip install metaembed"):
        changed.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


# -- What leaves the machine, and what comes in ---------------------------------------------------------------------


def test_a_saved_configuration_holds_no_path_of_this_machine(model, folder, tmp_path):
    changed = copy.deepcopy(model)
    changed.config.base_model = changed.config.backbone_config._name_or_path = str(tmp_path)
    changed.save_pretrained(tmp_path / "saved")
    assert str(tmp_path) not in (tmp_path / "saved/config.json").read_text()
    loaded = MetaEmbedModel.from_pretrained(folder)
    loaded.save_pretrained(tmp_path / "again")
    assert str(folder) not in (tmp_path / "again/config.json").read_text()
    changed.config.base_model = "lab/backbone"
    assert changed.config.to_dict()["base_model"] == "lab/backbone"


@pytest.fixture
def adapter(model, folder, tmp_path):
    """An adapter on the saved model."""
    adapted = MetaEmbedModel.from_pretrained(folder)
    adapted.add_adapter(lora_config(adapted, r=2))
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def rebase(adapter, base):
    path = adapter / "adapter_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "base_model_name_or_path": str(base), "revision": None}))


@pytest.mark.timeout(60)
def test_an_adapter_that_names_itself_is_an_error_at_every_entry_point(adapter):
    from sentence_transformers import MultiVectorEncoder

    rebase(adapter, adapter)
    for load in (AutoModel.from_pretrained, MultiVectorEncoder):
        with pytest.raises(ValueError, match=r"names .* as its base, which is an adapter too"):
            load(str(adapter), trust_remote_code=True)


@pytest.mark.timeout(60)
def test_an_adapter_that_names_itself_or_another_adapter_is_an_error(adapter, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    for base in (adapter, other):
        rebase(adapter, base)
        rebase(other, adapter)
        with pytest.raises(ValueError, match=r"names .* as its base, which is an adapter too"):
            MetaEmbedModel.from_pretrained(adapter)


def test_trust_in_an_adapter_is_not_trust_in_its_base(model, adapter, tmp_path):
    """Code in the repository of the base runs only if the user trusts that one too."""
    base, ran = tmp_path / "base", tmp_path / "ran"
    model.backbone.save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "code.Config"}
    (base / "config.json").write_text(json.dumps(config))
    code = f"open({str(ran)!r}, 'w').close()\nfrom transformers import PreTrainedConfig\n"
    (base / "code.py").write_text(code + "class Config(PreTrainedConfig): pass\n")
    rebase(adapter, base)
    message = f"{re.escape(str(adapter))} is based on {re.escape(str(base))}.*trusted_base"
    for load in (MetaEmbedModel, AutoModel):
        with pytest.raises(ValueError, match=message):
            load.from_pretrained(adapter, trust_remote_code=True)
    MetaEmbedModel.from_pretrained(adapter)  # without that code, which transformers does not need
    assert not ran.exists()
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        MetaEmbedModel.from_pretrained(adapter, trust_remote_code=True, trusted_base=str(base))
    assert ran.exists()


def test_a_saved_adapter_says_that_its_base_is_a_folder_and_is_not_pushed(adapter):
    loaded = MetaEmbedModel.from_pretrained(adapter)
    with pytest.raises(ValueError, match="names a folder of this machine"):
        loaded.push_to_hub("lab/adapter")
    with pytest.raises(ValueError, match="names a folder of this machine"):
        loaded.save_pretrained(adapter.parent / "pushed", push_to_hub=True)
    assert not os.path.exists(adapter.parent / "pushed")


def test_version_0_1_saved_the_traits_flat():
    config = MetaEmbedConfig(causal=False, pads_left=False)
    assert (config.traits.causal, config.traits.pads_left, config.traits.mixes_images) == (False, False, True)
    assert not hasattr(config, "causal") and "causal" not in config.to_dict()


def test_auto_classes_take_the_same_arguments(folder):
    loaded, info = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert loaded.encode_queries("a").shape == (4, 8) and not info["missing_keys"]
