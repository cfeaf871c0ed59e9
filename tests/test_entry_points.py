"""Both entry points give equal embeddings, and a saved folder is self-contained: it loads without this package."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEXTS
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.multi_vector_encoder.evaluation import MultiVectorInformationRetrievalEvaluator

from metaembed import MetaEmbedModel, MetaEmbedProcessor, maxsim
from metaembed.sentence_metaembed import MetaEmbedTransformer, to_multi_vector_encoder

STRANGER = """
import json, sys
sys.modules["metaembed"] = None  # importing the package raises
import numpy as np
from PIL import Image
from sentence_transformers import MultiVectorEncoder
from transformers import AutoConfig, AutoModel, AutoProcessor

folder, out = sys.argv[1:]
items = ["a red apple", {"image": Image.linear_gradient("L").resize((48, 32)), "text": "a cat"}]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
encoder = MultiVectorEncoder(folder, trust_remote_code=True)
features = processor.process_documents(items, num_meta=5)
np.savez(
    out + "/embeddings.npz",
    auto=model.encode_documents(items, num_meta=5, convert_to_numpy=True),
    forward=model(**features).embeddings.detach().numpy(),
    sentence=np.stack(encoder.encode_document(items, num_meta=5, convert_to_numpy=True)),
    query=model.encode_queries(items, convert_to_numpy=True),
    sentence_query=np.stack(encoder.encode_query(items, convert_to_numpy=True)),
)
model.save_pretrained(out + "/from_auto")
encoder.save_pretrained(out + "/from_sentence")
processor.save_pretrained(out + "/processor")
json.dump([type(x).__name__ for x in (config, processor, model, encoder[0])], open(out + "/types.json", "w"))
"""


def run_as_a_stranger(fresh_process, folder: Path, out: Path) -> dict[str, np.ndarray]:
    """Load `folder` in a fresh process, from an empty folder, with an empty cache of code."""
    out.mkdir()
    result = fresh_process("-c", STRANGER, folder, out, cwd=out)
    assert result.returncode == 0, result.stderr
    names = ["MetaEmbedConfig", "MetaEmbedProcessor", "MetaEmbedModel", "MetaEmbedTransformer"]
    assert json.loads((out / "types.json").read_text()) == names
    return dict(np.load(out / "embeddings.npz"))


@pytest.fixture(scope="module")
def defaulted(qwen) -> MetaEmbedModel:
    """A model with persistent defaults."""
    model = copy.deepcopy(qwen)
    model.config.query_num_meta = 4
    model.config.query_instruction = "find a picture"
    return model


@pytest.fixture(scope="module")
def folder(defaulted, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    defaulted.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def encoder(folder) -> MultiVectorEncoder:
    return MultiVectorEncoder(str(folder), trust_remote_code=True)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.slow
def test_saved_folders_are_self_contained_at_every_entry_point_also_when_saved_again(
    defaulted, folder, tmp_path, fresh_process
):
    to_multi_vector_encoder(defaulted).save_pretrained(str(tmp_path / "by_sentence_transformers"))
    first = run_as_a_stranger(fresh_process, folder, tmp_path / "first")
    for name in ("forward", "sentence"):
        np.testing.assert_allclose(first[name], first["auto"], atol=1e-6)
    assert first["query"].shape == first["sentence_query"].shape == (2, 4, 64)
    np.testing.assert_allclose(first["sentence_query"], first["query"], atol=1e-6)
    others = (tmp_path / "by_sentence_transformers", tmp_path / "first/from_auto", tmp_path / "first/from_sentence")
    for index, other in enumerate(others):
        again = run_as_a_stranger(fresh_process, other, tmp_path / f"again{index}")
        assert all(np.array_equal(first[name], again[name]) for name in first)
        # A card is written by the package, and by sentence-transformers where the package is not installed.
        assert names(other) - {"README.md"} == names(folder) - {"README.md"}


def test_a_saved_folder_is_a_complete_hub_repository(folder):
    names = {path.name for path in folder.iterdir()}
    code = {f"{name}_metaembed.py" for name in ("configuration", "processing", "modeling", "sentence", "scoring")}
    assert names >= code | {"model.safetensors", "config.json", "README.md", "modules.json", "tokenizer.json"}
    assert names >= {"config_sentence_transformers.json", "processor_config.json", "chat_template.jinja"}
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl", ".pickle"))]
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_metaembed.MetaEmbedConfig",
        "AutoModel": "modeling_metaembed.MetaEmbedModel",
    }
    card = (folder / "README.md").read_text()
    assert "trust_remote_code=True" in card and "pipeline_tag: visual-document-retrieval" in card


def test_loading_changes_nothing(defaulted, folder, pictures):
    loaded = MetaEmbedModel.from_pretrained(folder)
    assert torch.equal(loaded.encode_queries(TEXTS), defaulted.encode_queries(TEXTS))
    assert torch.equal(loaded.encode_documents(pictures), defaulted.encode_documents(pictures))
    assert loaded.config.query_num_meta == 4 and loaded.config.query_instruction == "find a picture"


def test_a_processor_loaded_alone_has_its_defaults(folder, tmp_path):
    processor = MetaEmbedProcessor.from_pretrained(folder)
    processor.save_pretrained(tmp_path)
    alone = MetaEmbedProcessor.from_pretrained(tmp_path)
    expected, features = processor.process_queries(TEXTS), alone.process_queries(TEXTS)
    assert expected.keys() == features.keys()
    assert all(torch.equal(expected[name], features[name]) for name in expected)
    assert "find a picture" in alone.tokenizer.decode(features["input_ids"][0])


def test_both_entry_points_give_equal_embeddings(defaulted, encoder, mixed):
    for ours, theirs in (
        (defaulted.encode_queries(mixed), encoder.encode_query(mixed)),
        (defaulted.encode_queries(mixed, num_meta=7), encoder.encode_query(mixed, num_meta=7)),
        (defaulted.encode_documents(mixed), encoder.encode_document(mixed)),
        (
            defaulted.encode_documents(mixed, instruction="a page"),
            encoder.encode_document(mixed, prompt="a page"),
        ),
    ):
        torch.testing.assert_close(torch.stack(theirs), ours, atol=1e-5, rtol=0)


def test_sentence_transformers_similarity_is_maxsim(encoder):
    queries, documents = encoder.encode_query(TEXTS, num_meta=4), encoder.encode_document(TEXTS, num_meta=8)
    expected = maxsim(torch.stack(queries), torch.stack(documents))
    torch.testing.assert_close(encoder.similarity(queries, documents), expected, atol=1e-5, rtol=0)
    assert encoder.get_embedding_dimension() == 64 and encoder.similarity_fn_name == "maxsim"


def test_default_num_meta_reaches_evaluators_and_is_saved(qwen, tmp_path):
    encoder = to_multi_vector_encoder(copy.deepcopy(qwen))
    encoder[0].query_num_meta, encoder[0].document_num_meta = 2, 3
    seen = {}
    encoder[0].register_forward_hook(lambda _, __, output: seen.update({output["token_embeddings"].shape[1]: True}))
    evaluator = MultiVectorInformationRetrievalEvaluator(
        queries={"q": "a red apple"}, corpus={"a": "an apple", "b": "a rocket"}, relevant_docs={"q": {"a"}}
    )
    evaluator(encoder)
    assert set(seen) == {2, 3}
    encoder.save_pretrained(str(tmp_path))
    again = MultiVectorEncoder(str(tmp_path), trust_remote_code=True)
    assert (again[0].query_num_meta, again[0].document_num_meta) == (2, 3)


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (17, ValueError), ("4", TypeError)])
def test_defaults_out_of_range_are_errors(qwen, value, error):
    module = MetaEmbedTransformer(copy.deepcopy(qwen))
    with pytest.raises(error, match="num_meta"):
        module.query_num_meta = value
    with pytest.raises(error, match="num_meta"):
        to_multi_vector_encoder(qwen).encode_query(["a"], num_meta=value)


def test_prompts_of_sentence_transformers_are_instructions(qwen):
    encoder = to_multi_vector_encoder(qwen, prompts={"query": "find a picture", "document": ""})
    queries, documents = encoder.encode_query(["a cat"]), encoder.encode_document(["a cat"])
    torch.testing.assert_close(queries[0], qwen.encode_queries("a cat", instruction="find a picture"))
    torch.testing.assert_close(documents[0], qwen.encode_documents("a cat", instruction=""))


def test_prompts_saved_by_sentence_transformers_apply_at_every_entry_point(qwen, tmp_path):
    encoder = to_multi_vector_encoder(copy.deepcopy(qwen), prompts={"query": "find a picture", "sts": "compare"})
    encoder.save_pretrained(str(tmp_path))
    assert encoder[0].model.config.query_instruction is None, "saving changed what training goes on with"
    expected = qwen.encode_queries("a cat", instruction="find a picture")
    model = MetaEmbedModel.from_pretrained(tmp_path)
    again = MultiVectorEncoder(str(tmp_path), trust_remote_code=True, device="cpu")
    torch.testing.assert_close(model.encode_queries("a cat"), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(again.encode_query("a cat"), expected, atol=1e-5, rtol=0)
    assert again.prompts["sts"] == "compare"
    model.config.query_instruction = None  # and saved from the other entry point into the same folder
    model.save_pretrained(tmp_path)
    again = MultiVectorEncoder(str(tmp_path), trust_remote_code=True, device="cpu")
    torch.testing.assert_close(again.encode_query("a cat"), model.encode_queries("a cat"), atol=1e-5, rtol=0)


def test_a_prompt_that_other_entry_points_would_not_apply_is_not_saved(defaulted, tmp_path):
    encoder = to_multi_vector_encoder(defaulted, prompts={"query": "find a page"})
    with pytest.raises(ValueError, match=r"query_instruction .* is 'find a picture'"):
        encoder.save_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    "options",
    [{"config_kwargs": {"query_num_meta": 2}}, {"processor_kwargs": {"max_pixels": 256}}, {"backend": "onnx"}],
    ids=lambda options: next(iter(options)),
)
def test_options_that_would_have_no_effect_are_errors(folder, options):
    with pytest.raises(ValueError, match=f"MetaEmbed model .*got.*{next(iter(next(iter(options.values()))))}"):
        MultiVectorEncoder(str(folder), trust_remote_code=True, **options)
