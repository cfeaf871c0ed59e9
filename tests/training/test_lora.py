"""Adapters train the right weights, are self-contained, and load completely or not at all, at every entry point."""

import copy
import importlib.metadata
import json
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import picture, save_tiny_backbone, tiny_model
from torch import nn

from metaembed import MetaEmbedModel
from metaembed.sentence_metaembed import to_multi_vector_encoder
from metaembed.training.lora import lora_config, merge_adapter
from metaembed.training.losses import CachedMMRLoss

QUERIES = ["red apple", "blue boat and a cat"]
DOCUMENTS = [picture(0), {"text": "a cat", "image": picture(1, 48, 32)}, "green hat"]


def embeddings(model):
    return torch.cat([model.encode_queries(QUERIES).flatten(), model.encode_documents(DOCUMENTS).flatten()])


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_tiny_backbone(tmp_path_factory.mktemp("hub") / "tiny-qwen2.5-vl")


@pytest.fixture(scope="module")
def untrained(backbone):
    """A model without an adapter. Copy it to change it, or use `plain`."""
    return MetaEmbedModel.from_backbone(backbone, num_query_tokens=4, num_document_tokens=8, embedding_dim=24)


@pytest.fixture
def plain(untrained):
    """A model without an adapter, which the test may change."""
    return copy.deepcopy(untrained)


@pytest.fixture(scope="module")
def model(untrained):
    """A model with a trained adapter, all of whose parts differ from their initial values."""
    torch.manual_seed(0)
    model = copy.deepcopy(untrained)
    model.add_adapter(lora_config(model, r=4, lora_alpha=4))
    encoder = to_multi_vector_encoder(model, device="cpu").train()
    loss = CachedMMRLoss(encoder, mini_batch_size=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        batch = [encoder.preprocess(QUERIES, task="query"), encoder.preprocess(DOCUMENTS[:2], task="document")]
        sum(loss(batch).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    model.save_pretrained(folder)
    return folder


def test_the_recipe_trains_the_language_model_the_meta_tokens_and_the_projection(untrained, model):
    before, model = untrained.state_dict(), copy.deepcopy(model)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names if "lora_" in name} == set(kinds)
    assert all("visual" not in name for name in names)
    assert {name for name in names if "lora_" not in name} == {
        "backbone.language_model.embed_tokens.token_adapter.trainable_tokens_delta.default",
        "projection.modules_to_save.default.weight",
        "projection.modules_to_save.default.bias",
    }
    merge_adapter(model)
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in changed} == {*kinds, "embed_tokens", "projection"}
    rows = (
        before["backbone.language_model.embed_tokens.weight"] != after["backbone.language_model.embed_tokens.weight"]
    )
    ids = model.config.query_token_ids + model.config.document_token_ids
    assert rows.any(dim=1).nonzero().flatten().tolist() == ids


def recipe(model):
    config = lora_config(model)
    return config.target_modules, config.trainable_token_indices, config.modules_to_save


def trainable(model, adapter="default"):
    """Return the trained parameters, without the adapter's and the wrappers' parts of their names."""
    names = [name.replace("_orig_mod.", "") for name, p in model.named_parameters() if p.requires_grad]
    return {name.replace(f".{adapter}", "") for name in names if f".{adapter}" in name}


def test_the_recipe_of_a_model_with_an_adapter_fits_it_too(plain):
    """For a second adapter, whose patterns must not match the layers of the first."""
    expected = recipe(plain)
    plain.add_adapter(lora_config(plain))
    first = trainable(plain)
    assert len(first) == 2 * 7 * 2 + 3
    assert recipe(plain) == expected
    plain.add_adapter(lora_config(plain), "second")
    assert trainable(plain, "second") == first


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda m: get_peft_model(m, lora_config(m))])
def test_the_recipe_of_a_wrapped_model_is_that_of_the_model(plain, wrap):
    expected = recipe(plain)
    assert recipe(wrap(plain)) == expected


def test_the_recipe_of_a_compiled_backbone_fits_it_and_one_that_is_not_compiled(untrained, plain):
    compiled, other = copy.deepcopy(untrained), copy.deepcopy(untrained)
    compiled.backbone = torch.compile(compiled.backbone)
    config = lora_config(compiled)
    plain.add_adapter(lora_config(plain))
    for model in (compiled, other):
        model.add_adapter(copy.deepcopy(config))
        assert trainable(model) == trainable(plain)


def test_the_recipe_for_another_object_is_an_error_that_says_what_to_pass(plain):
    with pytest.raises(TypeError, match=r"expected a MetaEmbedModel, got MultiVectorEncoder.*encoder\[0\]\.model"):
        lora_config(to_multi_vector_encoder(plain, device="cpu"))
    with pytest.raises(TypeError, match="expected a MetaEmbedModel, got str"):
        lora_config("you/your-metaembed")


def test_a_backbone_without_numbered_blocks_needs_target_modules(plain):
    plain.backbone.language_model.layers = nn.ModuleDict({"only": plain.backbone.language_model.layers[0]})
    plain.backbone.visual = None
    with pytest.raises(ValueError, match="pass `target_modules`"):
        lora_config(plain)
    assert lora_config(plain, target_modules=["q_proj"]).target_modules == {"q_proj"}


def test_an_adapter_holds_only_what_was_trained(adapter, backbone):
    assert not (adapter / "model.safetensors").exists()
    sizes = {name: value.shape for name, value in load_file(adapter / "adapter_model.safetensors").items()}
    assert all("lora_" in name or "trainable_tokens" in name or "projection" in name for name in sizes)
    assert sum("lora_" in name for name in sizes) == 2 * 7 * 2  # A and B, seven layers, two blocks
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == backbone


def test_every_loader_gives_equal_embeddings(model, adapter, plain):
    from sentence_transformers import MultiVectorEncoder
    from transformers import AutoModel

    expected = embeddings(model)
    loaded = {
        "MetaEmbedModel": MetaEmbedModel.from_pretrained(adapter),
        "AutoModel": AutoModel.from_pretrained(adapter, trust_remote_code=True),
    }
    assert not torch.allclose(embeddings(plain), expected, atol=1e-2)
    wrapped = copy.deepcopy(plain)
    plain.load_adapter(str(adapter))
    loaded["load_adapter"] = plain
    loaded["PeftModel"] = PeftModel.from_pretrained(wrapped, str(adapter)).eval()
    for name, other in loaded.items():
        assert torch.equal(embeddings(other), expected), name
    encoder = MultiVectorEncoder(str(adapter), trust_remote_code=True, device="cpu")
    torch.testing.assert_close(torch.stack(encoder.encode_query(QUERIES)), model.encode_queries(QUERIES))


def test_merged_equals_unmerged(model, adapter, plain, tmp_path):
    expected = embeddings(model)
    merged = MetaEmbedModel.from_pretrained(adapter)
    merge_adapter(merged)
    torch.testing.assert_close(embeddings(merged), expected, atol=1e-5, rtol=0)
    merged.save_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert torch.equal(embeddings(MetaEmbedModel.from_pretrained(tmp_path / "merged")), embeddings(merged))
    by_peft = PeftModel.from_pretrained(plain, str(adapter)).merge_and_unload()
    by_peft.save_pretrained(tmp_path / "by-peft")
    again = MetaEmbedModel.from_pretrained(tmp_path / "by-peft")
    torch.testing.assert_close(embeddings(again), expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="no adapter to merge"):
        merge_adapter(again)


def test_an_adapter_of_a_finetuned_model_names_that_model(model, adapter, tmp_path):
    """And not the plain backbone, with which it would give other embeddings."""
    merged = MetaEmbedModel.from_pretrained(adapter)
    merge_adapter(merged)
    merged.save_pretrained(tmp_path / "whole")
    second = MetaEmbedModel.from_pretrained(tmp_path / "whole")
    second.add_adapter(lora_config(second, r=2, init_lora_weights=False))
    second.eval().save_pretrained(tmp_path / "second")
    saved = json.loads((tmp_path / "second" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(tmp_path / "whole")
    assert torch.equal(embeddings(MetaEmbedModel.from_pretrained(tmp_path / "second")), embeddings(second))


def test_a_loaded_adapter_can_be_trained_further(adapter):
    frozen = MetaEmbedModel.from_pretrained(adapter)
    further = MetaEmbedModel.from_pretrained(adapter, is_trainable=True)
    names = {name for name, p in further.named_parameters() if p.requires_grad}
    assert len(names) == 2 * 7 * 2 + 3
    assert not any(p.requires_grad for name, p in frozen.named_parameters() if "lora_" in name)


def broken(adapter, tmp_path, change):
    folder = tmp_path / "broken"
    shutil.copytree(adapter, folder)
    weights = load_file(folder / "adapter_model.safetensors")
    change(weights)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "trainable_tokens", "projection"])
def test_a_missing_part_raises(adapter, tmp_path, part):
    def change(weights):
        del weights[next(name for name in weights if part in name)]

    with pytest.raises(ValueError, match="missing, so random"):
        MetaEmbedModel.from_pretrained(broken(adapter, tmp_path, change))


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_a_missing_part_raises_in_peft_too(adapter, plain, tmp_path, part):
    """PEFT itself only warns of these parts, and raises a KeyError for others."""

    def change(weights):
        del weights[next(name for name in weights if part in name)]

    folder = broken(adapter, tmp_path, change)
    with pytest.raises(ValueError, match=f"missing from what is loaded, so would be random: .*{part}"):
        PeftModel.from_pretrained(plain, str(folder))


def test_a_second_adapter_does_not_need_the_first(model, adapter, plain):
    wrapped = PeftModel.from_pretrained(plain, str(adapter), adapter_name="first")
    wrapped.load_adapter(str(adapter), adapter_name="second")
    wrapped.set_adapter("second")
    torch.testing.assert_close(embeddings(wrapped.eval()), embeddings(model))


def test_an_adapter_that_peft_saved_says_how_it_loads(backbone, plain, tmp_path):
    """It names the base, but not the Meta Tokens; the test follows the advice of the error."""
    model = copy.deepcopy(plain)
    wrapped = get_peft_model(plain, lora_config(plain, r=4, init_lora_weights=False))
    expected = embeddings(wrapped.eval())
    wrapped.save_pretrained(tmp_path / "peft")
    saved = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == backbone
    with pytest.raises(ValueError, match=r"holds no config.json, no processor_config.json.* model.load_adapter"):
        MetaEmbedModel.from_pretrained(tmp_path / "peft")
    model.load_adapter(str(tmp_path / "peft"))
    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(embeddings(MetaEmbedModel.from_pretrained(tmp_path / "whole")), expected)


def test_an_adapter_that_names_no_base_raises(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="no base_model_name_or_path"):
        MetaEmbedModel.from_pretrained(tmp_path / "adapter")


def test_an_unused_part_raises(adapter, tmp_path):
    def change(weights):
        name = next(name for name in weights if "lora_A" in name)
        weights[name.replace("layers.0", "layers.9")] = weights[name].clone()

    with pytest.raises(ValueError, match="unexpected, so lost"):
        MetaEmbedModel.from_pretrained(broken(adapter, tmp_path, change))


def test_an_adapter_that_would_not_load_is_not_saved(model, adapter, plain, tmp_path):
    with pytest.raises(ValueError, match="holds an adapter"):
        plain.save_pretrained(adapter)
    plain.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a whole model"):
        model.save_pretrained(tmp_path)
    get_peft_model(plain, lora_config(plain))
    with pytest.raises(ValueError, match="wrapped with get_peft_model"):
        plain.save_pretrained(tmp_path / "other")


def test_an_adapter_of_an_unknown_backbone_is_not_saved(backbone, tmp_path):
    model = tiny_model()
    model.add_adapter(lora_config(model))
    with pytest.raises(ValueError, match="must name the model it belongs to"):
        model.save_pretrained(tmp_path)
    model.adapter_base = (backbone, None)
    model.save_pretrained(tmp_path)
    assert MetaEmbedModel.from_pretrained(tmp_path).adapter_base == (backbone, None)


def test_an_adapter_on_a_bfloat16_backbone_trains_in_float32(backbone):
    """The usual way: the backbone in bfloat16, the adapter's weights in float32, under autocast."""
    model = MetaEmbedModel.from_backbone(
        backbone, num_query_tokens=4, num_document_tokens=8, embedding_dim=24, dtype=torch.bfloat16
    )
    model.add_adapter(lora_config(model, r=4))
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    assert dtypes == {torch.float32}
    assert embeddings(model).isfinite().all()
    encoder = to_multi_vector_encoder(model, device="cpu").train()
    batch = [encoder.preprocess(QUERIES, task="query"), encoder.preprocess(DOCUMENTS[:2], task="document")]
    sum(CachedMMRLoss(encoder, mini_batch_size=1)(batch).values()).backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


@pytest.mark.parametrize("use", ["lora_config", "add_adapter", "load_adapter"])
def test_a_peft_that_is_too_old_for_transformers_says_what_to_install(backbone, model, adapter, monkeypatch, use):
    plain = MetaEmbedModel.from_backbone(backbone, num_query_tokens=4, num_document_tokens=8, embedding_dim=24)
    config = lora_config(plain)
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "99.0")
    monkeypatch.setattr("transformers.__version__", "98.0")
    call = {
        "lora_config": lambda: lora_config(plain),
        "add_adapter": lambda: plain.add_adapter(config),
        "load_adapter": lambda: plain.load_adapter(str(adapter)),
    }[use]
    advice = r"98\.0 needs peft>=99\.0, but peft .* pip install --upgrade 'peft>=99\.0' .* 'transformers<98\.0'"
    with pytest.raises(ImportError, match=advice):
        call()


def test_no_peft_says_what_to_install(model, monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", absent)
    with pytest.raises(ImportError, match=r"adapters need peft: pip install 'peft>=0\.20"):
        lora_config(model)
