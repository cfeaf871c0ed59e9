"""A model returns the right rows, the same rows for every way to ask, and errors that say what to do."""

import copy
import json
import re
import types

import numpy as np
import pytest
import torch
from conftest import TEXTS, build_bert, build_qwen2_5_vl
from PIL import Image
from torch.nn.functional import normalize
from transformers import AutoModel, AutoProcessor

from metaembed import MetaEmbedConfig, MetaEmbedModel
from metaembed.backbones.lengths import image_size
from metaembed.configuration_metaembed import BackboneTraits
from metaembed.encoding.batches import plan
from metaembed.inputs_metaembed import InputPolicy

SIDES = ("query", "document")


def embed(model, inputs, side, num_meta=None, **kwargs):
    features = model.processor.process(inputs, side, num_meta, **kwargs)
    with torch.no_grad():
        return model(**features).embeddings


@pytest.mark.parametrize("side", SIDES)
def test_fewer_tokens_equals_prefix(model, mixed, side):
    full = embed(model, mixed, side)
    assert full.dtype == torch.float64
    for num_meta in (1, 3, full.shape[1]):
        assert torch.equal(embed(model, mixed, side, num_meta), full[:, :num_meta])


def test_only_the_needed_tokens_are_appended_in_a_causal_backbone(model):
    lengths = [model.processor.process_documents(["a"], num_meta=r)["input_ids"].shape[1] for r in (1, 2, 64)]
    assert lengths[1] == lengths[0] + 1 and lengths[2] == lengths[0] + 63


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_batch_of_one_equals_batch_of_many_with_either_padding_side(model, mixed, side, padding_side):
    together = embed(model, mixed, side, padding_side=padding_side)
    for item, row in zip(mixed, together, strict=True):
        torch.testing.assert_close(embed(model, item, side)[0], row, atol=1e-12, rtol=0)


def test_query_and_document_sides_differ(model):
    query, document = embed(model, "a red apple", "query", 4), embed(model, "a red apple", "document", 4)
    assert (query - document).abs().max() > 0.1


def test_every_vector_of_an_input_differs_and_depends_on_the_input(model, mixed):
    rows = embed(model, mixed, "document", 8)
    gaps = torch.cdist(rows.flatten(0, 1), rows.flatten(0, 1)) + torch.eye(len(mixed) * 8)
    assert gaps.min() > 1e-3


def test_positions_are_the_backbones_own_and_not_one_dimensional(model, mixed):
    """`inputs_embeds` paths lose M-RoPE silently; ours must equal a run with the positions written out."""
    features = model.processor.process_documents(mixed)
    grid = dict(image_grid_thw=features["image_grid_thw"], attention_mask=features["attention_mask"])
    positions, _ = model.backbone.get_rope_index(
        features["input_ids"], mm_token_type_ids=features["mm_token_type_ids"], **grid
    )
    flat = torch.arange(positions.shape[-1]).expand_as(positions)
    ours = embed(model, mixed, "document")
    explicit = model.embed(**features, position_ids=positions)
    one_dimensional = model.embed(**features, position_ids=flat)
    assert torch.equal(ours, explicit)
    assert (ours[1:] - one_dimensional[1:]).abs().max() > 1e-3


def test_authors_layout_equals_their_procedure_written_out(pictures):
    """The paper's code: `[input; M_q; M_c]` as `inputs_embeds`, explicit positions, slice, L2."""
    backbone, processor = build_qwen2_5_vl()
    model = MetaEmbedModel.from_backbone(backbone.double(), processor=processor, document_sees_query_tokens=True)
    features = model.processor.process_documents([{"image": pictures[0], "text": "a cat"}])
    ids, mask = features["input_ids"], features["attention_mask"]
    config = model.config
    assert ids[0, -80:].tolist() == config.query_token_ids + config.document_token_ids

    table = model.get_input_embeddings().weight
    prompt, meta = ids[:, :-80], torch.cat([table[config.query_token_ids[0] :][:16], table[-64:]])  # [1, L], [80, D]
    inputs_embeds = model.get_input_embeddings()(prompt)
    seen = backbone.visual(features["pixel_values"].double(), grid_thw=features["image_grid_thw"]).pooler_output
    inputs_embeds[prompt == backbone.config.image_token_id] = seen
    inputs_embeds = torch.cat([inputs_embeds, meta[None]], dim=1)
    positions, _ = backbone.get_rope_index(
        ids,
        mm_token_type_ids=features["mm_token_type_ids"],
        image_grid_thw=features["image_grid_thw"],
        attention_mask=mask,
    )
    hidden = backbone.language_model(inputs_embeds=inputs_embeds, position_ids=positions, attention_mask=mask)[0]
    torch.testing.assert_close(model(**features).embeddings, normalize(hidden[:, -64:], dim=-1), atol=1e-13, rtol=0)
    # The query Meta Tokens come before the document's, so a query does not need the latter.
    assert model.processor.process_queries(["a"])["input_ids"][0, -16:].tolist() == config.query_token_ids


def test_query_meta_tokens_change_a_document_only_in_the_authors_layout(qwen):
    backbone, processor = build_qwen2_5_vl()
    authors = MetaEmbedModel.from_backbone(backbone, processor=processor, document_sees_query_tokens=True)
    with torch.no_grad():
        for each, changes in ((qwen, False), (authors, True)):
            each = copy.deepcopy(each)
            before = each.encode_documents("a cat")
            each.get_input_embeddings().weight[each.config.query_token_ids] *= -1
            assert torch.equal(before, each.encode_documents("a cat")) != changes


@pytest.mark.parametrize(
    "text", ["<|meta_query_0|>", "<|image_pad|>", "a <|meta_document_63|> b<|im_end|>", "<|im_start|>"]
)
@pytest.mark.parametrize("side", SIDES)
def test_special_tokens_in_a_users_text_are_text(model, text, side):
    features = model.processor.process([text, "a cat"], side)
    ids = features["input_ids"]
    structure = [(ids == token).sum(dim=1) for token in model.processor.tokenizer.all_special_ids if token != 0]
    assert all(row[0] == row[1] for row in structure)  # as many as in a text without any
    assert embed(model, text, side).shape[1] == model.config.num_tokens(side)
    decoded = model.processor.tokenizer.decode(ids[0])
    assert model.processor.escape(text) in decoded


def test_special_tokens_split_over_parts_or_cut_to_length_are_text(model):
    processor = model.processor
    special = torch.tensor(processor.tokenizer.all_special_ids)

    def structure(content, **kwargs):
        ids = processor.process_documents([{"role": "user", "content": content}], **kwargs)["input_ids"]
        return ids[torch.isin(ids, special)].tolist()

    for content in (
        ["a<|im_", "end|>b"],
        ["<", "|im", "_end", "|>"],
        ["<|meta_document", "_0|>"],
        ["<|image_pad|", ">"],
    ):
        for kwargs in ({}, {"max_length": 1000}, {"max_length": 4}, {"instruction": "a <|im_end|>"}):
            assert structure(content, **kwargs) == structure("a", **kwargs)


def test_a_special_token_that_begins_with_a_space_is_broken_too(qwen):
    processor = copy.copy(qwen.processor)
    processor.__dict__["_special"] = re.compile(re.escape(" [X]")), set()
    assert processor.escape("a [X] b [X]") == "a [ X] b [ X]"


def test_bidirectional_backbone_appends_all_tokens_and_slices(bert):
    assert not bert.config.traits.causal
    full, sliced = embed(bert, TEXTS, "document"), embed(bert, TEXTS, "document", 5)
    assert sliced.shape[1] == 5 and torch.equal(full[:, :5], sliced)
    ids = bert.processor.process_documents(TEXTS, num_meta=5)["input_ids"]
    assert (ids >= bert.config.document_token_ids[0]).sum(dim=1).tolist() == [64] * 3


def test_causal_backbones_are_measured_as_such(model):
    assert model.config.traits.causal


# -- Encoding ------------------------------------------------------------------------------------------------------


def test_encoding_returns_float32_unit_rows_in_input_order(qwen, mixed):
    items = [*mixed, *TEXTS]
    embeddings = qwen.encode_documents(items, num_meta=6, batch_size=3)
    assert embeddings.shape == (len(items), 6, 64) and embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(len(items), 6))
    for item, expected in zip(items, embeddings, strict=True):
        single = qwen.encode_documents(item, num_meta=6)
        assert single.shape == (6, 64)
        torch.testing.assert_close(single, expected, atol=1e-5, rtol=0)


def test_batches_of_pictures_of_mixed_sizes_pad_little(qwen, tmp_path):
    generator = np.random.default_rng(0)
    sizes = generator.integers(16, 200, (64, 2))
    pictures = [Image.new("RGB", (int(width), int(height))) for width, height in sizes]
    for i in range(0, 62, 3):  # a file's header is read too; an array's shape is known
        pictures[i].save(tmp_path / f"{i}.png")
        pictures[i], pictures[i + 1] = tmp_path / f"{i}.png", np.asarray(pictures[i + 1])
    batches = list(plan(qwen.processor, qwen.processor.parse(pictures), qwen.policy, 4))
    assert sorted(i for batch in batches for i in batch) == list(range(64))
    masks = [qwen.processor.process_documents([pictures[i] for i in b], 1)["attention_mask"] for b in batches]
    assert 1 - sum(mask.sum() for mask in masks) / sum(mask.numel() for mask in masks) < 0.1


def test_estimating_sizes_reads_no_file_that_the_policy_forbids(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "picture.png")
    path = tmp_path / "picture.png"
    assert image_size(path, InputPolicy()) == image_size(str(path), InputPolicy()) == (20, 30)
    assert image_size(path, InputPolicy.server()) == (1, 1)
    assert image_size("https://example.com/picture.png", InputPolicy()) == (1, 1)
    assert image_size(tmp_path / "missing.png", InputPolicy()) == (1, 1)


def test_half_precision_model_gives_float32_embeddings(qwen):
    half = copy.deepcopy(qwen).to(torch.bfloat16)
    embeddings = half.encode_queries(TEXTS)
    assert embeddings.dtype == torch.float32
    assert (embeddings.norm(dim=-1) - 1).abs().max() < 1e-6  # normalised in float32, not rounded to bfloat16
    assert torch.cosine_similarity(embeddings, qwen.encode_queries(TEXTS), dim=-1).mean() > 0.99


def test_encoding_an_empty_list_gives_no_rows(qwen):
    assert qwen.encode_queries([], num_meta=3).shape == (0, 3, 64)


def test_an_empty_string_is_an_empty_text(qwen):
    assert qwen.encode_queries("").shape == (16, 64)
    assert not torch.equal(qwen.encode_queries(""), qwen.encode_queries("a"))


def test_encoding_to_numpy_gives_the_same_numbers(qwen):
    array = qwen.encode_queries(TEXTS, num_meta=2, convert_to_numpy=True)
    assert isinstance(array, np.ndarray)
    np.testing.assert_array_equal(array, qwen.encode_queries(TEXTS, num_meta=2).numpy())


def test_encoding_leaves_a_training_model_in_training(qwen):
    copied = copy.deepcopy(qwen).train()
    copied.encode_queries(["a"])
    assert all(module.training for module in copied.modules())


def test_encoding_leaves_a_frozen_part_in_evaluation_mode(qwen):
    copied = copy.deepcopy(qwen).train()
    copied.backbone.visual.eval().patch_embed.train()
    before = [module.training for module in copied.modules()]
    copied.encode_queries(["a"])
    with pytest.raises(TypeError):
        copied.encode_queries([3])
    assert [module.training for module in copied.modules()] == before


def test_an_instruction_changes_the_embedding_and_its_default_holds_until_overridden(qwen):
    copied = copy.deepcopy(qwen)
    plain, instructed = copied.encode_queries("a cat"), copied.encode_queries("a cat", instruction="find a picture")
    assert not torch.equal(plain, instructed)
    copied.config.query_instruction = "find a picture"
    assert torch.equal(copied.encode_queries("a cat"), instructed)
    assert torch.equal(copied.encode_queries("a cat", instruction=""), plain)


def test_default_num_meta_holds_where_a_call_names_none(qwen):
    copied = copy.deepcopy(qwen)
    copied.config.query_num_meta, copied.config.document_num_meta = 4, 8
    assert copied.encode_queries("a").shape[0] == 4 and copied.encode_documents("a").shape[0] == 8
    assert copied.encode_documents("a", num_meta=9).shape[0] == 9


def test_score_is_maxsim(qwen):
    queries, documents = qwen.encode_queries(TEXTS), qwen.encode_documents(TEXTS)
    expected = torch.einsum("qid,njd->qnij", queries[:, :2], documents[:, :4]).amax(-1).sum(-1)
    torch.testing.assert_close(qwen.score(queries, documents, budget=(2, 4)), expected)


@pytest.mark.parametrize(
    ("num_meta", "error"), [(0, ValueError), (17, ValueError), ("4", TypeError), (True, TypeError)]
)
def test_num_meta_out_of_range_is_an_error(qwen, num_meta, error):
    with pytest.raises(error, match="num_meta of a query must be"):
        qwen.encode_queries(["a"], num_meta=num_meta)


@pytest.mark.parametrize("number", [np.int64(3), np.uint8(3), torch.tensor(3)])
def test_integers_of_numpy_and_torch_are_accepted(qwen, number):
    assert torch.equal(qwen.encode_queries("a", number), qwen.encode_queries("a", 3))
    assert qwen.encode_queries("a red apple", max_length=number).shape == (16, 64)


@pytest.mark.parametrize(
    ("num_meta", "error"), [(0, ValueError), (-1, ValueError), (100, ValueError), ("4", TypeError), (True, TypeError)]
)
def test_num_meta_out_of_range_in_a_forward_pass_is_an_error(qwen, bert, num_meta, error):
    for model in (qwen, bert):
        features = {**model.processor.process_documents(["a"]), "num_meta": num_meta}
        with pytest.raises(error, match="num_meta must be"):
            model(**features)


@pytest.mark.parametrize(("instruction", "error"), [(3, TypeError), (["a"], TypeError), ("\ud800", ValueError)])
def test_an_instruction_that_is_not_text_is_an_error(qwen, instruction, error):
    with pytest.raises(error, match="instruction must be"):
        qwen.encode_queries("a", instruction=instruction)


@pytest.mark.parametrize("options", [{"return_tensors": "np"}, {"text_kwargs": {"return_tensors": None}}])
def test_asking_for_tensors_of_another_library_is_an_error(qwen, options):
    with pytest.raises(ValueError, match="`return_tensors` must be 'pt'"):
        qwen.processor.process_queries("a", **options)


@pytest.mark.parametrize("bad", [None, 3, object(), [None], [["a"]], {"txt": "a"}, {"text": 3}, {}, {"text": None}])
def test_values_that_are_not_inputs_are_errors_that_say_so(qwen, bad):
    with pytest.raises((TypeError, ValueError), match=r"cannot encode|unknown keys|must be|holds neither"):
        qwen.encode_queries(bad)


def test_an_error_names_the_place_of_the_input_in_the_users_list(qwen, tmp_path):
    items = ["a", "a much longer text", tmp_path / "missing.png", "b", "c"]
    with pytest.raises(ValueError, match=r"^input 2: .*missing\.png"):
        qwen.encode_documents(items, batch_size=1)
    with pytest.raises(TypeError, match=r"^input 4: cannot encode None"):
        qwen.encode_documents(["a", "a much longer text", "b", "c", None], batch_size=2)


def test_batches_may_be_any_ordered_sequence(qwen):
    expected = qwen.encode_queries(TEXTS)
    for batch in (tuple(TEXTS), iter(TEXTS), np.array(TEXTS), np.array(TEXTS, object)):
        assert torch.equal(qwen.encode_queries(batch), expected)


def test_unordered_collections_and_tables_are_not_batches(qwen):
    import pandas
    from datasets import Dataset

    table = pandas.DataFrame({"text": TEXTS})
    for batch in (set(TEXTS), frozenset(TEXTS), table, types.MappingProxyType({"text": "a"})):
        with pytest.raises(TypeError, match="no sequence of inputs in order"):
            qwen.encode_queries(batch)
    dataset, expected = Dataset.from_pandas(table), qwen.encode_queries(TEXTS)
    for batch in (table["text"], dataset["text"], dataset):
        assert torch.equal(qwen.encode_queries(batch), expected)


def test_processing_nothing_is_an_error(qwen):
    with pytest.raises(ValueError, match="empty"):
        qwen.processor.process_queries([])


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, True])
def test_a_batch_size_out_of_range_is_an_error(qwen, batch_size):
    with pytest.raises(ValueError, match="batch_size"):
        qwen.encode_queries(["a"], batch_size=batch_size)


def test_input_ids_without_meta_tokens_are_an_error(qwen):
    with pytest.raises(ValueError, match="process_queries"):
        qwen(input_ids=torch.tensor([[1, 2, 3]]))


def test_truncation_that_would_cut_meta_tokens_is_an_error(qwen):
    with pytest.raises(ValueError, match="Meta Tokens"):
        qwen.processor.process_queries(["a long text " * 20], truncation=True, max_length=24)


# -- Creating a model from a backbone -------------------------------------------------------------------------------


def test_meta_token_rows_have_the_scale_of_the_embedding_and_all_differ():
    backbone, processor = build_qwen2_5_vl()
    known = backbone.get_input_embeddings().weight.detach().clone()
    model = MetaEmbedModel.from_backbone(backbone, processor=processor)
    table = model.get_input_embeddings().weight.detach()
    assert torch.equal(table[: len(known)], known)
    meta = table[len(known) :]
    assert meta.shape == (80, 64)
    assert (meta.std() / known.std() - 1).abs() < 0.1
    assert torch.pdist(meta).min() > known.std()


def test_spare_rows_used_by_meta_tokens_are_initialised_too():
    backbone, processor = build_qwen2_5_vl()
    size = len(processor.tokenizer)
    backbone.resize_token_embeddings(size + 128)
    backbone.config.text_config.vocab_size = size + 128
    with torch.no_grad():
        backbone.get_input_embeddings().weight[size:] = 0
    model = MetaEmbedModel.from_backbone(backbone, processor=processor)
    table = model.get_input_embeddings().weight
    assert table.shape[0] == size + 128
    assert (table[size : size + 80].abs().sum(dim=1) > 1).all() and (table[size + 80 :] == 0).all()


def test_the_callers_processor_is_not_changed():
    backbone, processor = build_qwen2_5_vl()
    before = len(processor.tokenizer)
    MetaEmbedModel.from_backbone(backbone, processor=processor)
    assert len(processor.tokenizer) == before


def test_projection_gives_the_dimension_asked_for(pictures):
    backbone, processor = build_qwen2_5_vl()
    model = MetaEmbedModel.from_backbone(
        backbone, processor=processor, num_query_tokens=4, num_document_tokens=6, embedding_dim=24
    )
    assert model.config.budgets == [[1, 1], [2, 4], [4, 6]]
    assert model.encode_documents(pictures).shape == (3, 6, 24)


def test_a_backbone_from_a_folder_gives_the_same_model(tmp_path, qwen, pictures):
    backbone, processor = build_qwen2_5_vl()
    backbone.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model = MetaEmbedModel.from_backbone(str(tmp_path))
    assert torch.equal(model.encode_documents(pictures), qwen.encode_documents(pictures))


def test_a_weight_missing_from_the_backbone_is_an_error(tmp_path):
    backbone, processor = build_qwen2_5_vl()
    weights = {name: value for name, value in backbone.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    backbone.save_pretrained(tmp_path, state_dict=weights)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"1 weights are missing.*layers\.1\.mlp\.up_proj"):
        MetaEmbedModel.from_backbone(str(tmp_path))


def test_a_weight_missing_from_a_saved_model_is_an_error(tmp_path, qwen):
    weights = {name: value for name, value in qwen.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    qwen.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"1 weights are missing.*layers\.1\.mlp\.up_proj"):
        AutoModel.from_pretrained(tmp_path, trust_remote_code=True)


def test_an_unexpected_weight_in_a_saved_model_is_an_error(tmp_path, qwen):
    """For instance that of a projection where the configuration has no dimension."""
    qwen.save_pretrained(tmp_path, state_dict={**qwen.state_dict(), "projection.weight": torch.zeros(24, 64)})
    with pytest.raises(ValueError, match=r"unexpected, so lost: projection\.weight"):
        AutoModel.from_pretrained(tmp_path, trust_remote_code=True)


def test_from_backbone_of_a_metaembed_model_is_an_error(qwen):
    with pytest.raises(ValueError, match="already has Meta Tokens"):
        MetaEmbedModel.from_backbone(build_qwen2_5_vl()[0], processor=qwen.processor.backbone_processor)


def test_a_loaded_backbone_needs_its_processor():
    with pytest.raises(ValueError, match="processor"):
        MetaEmbedModel.from_backbone(build_bert()[0])


@pytest.mark.parametrize("backbone", [None, 3, torch.nn.Linear(2, 2)])
def test_values_that_are_not_backbones_are_errors(backbone):
    with pytest.raises(TypeError, match="backbone must be"):
        MetaEmbedModel.from_backbone(backbone)


def test_gradients_reach_every_meta_token(qwen, mixed):
    copied = copy.deepcopy(qwen).train()
    for side in SIDES:
        weighted = copied(**copied.processor.process(mixed, side)).embeddings
        (weighted * torch.linspace(-1, 1, weighted.numel()).reshape(weighted.shape)).sum().backward()
    gradient = copied.get_input_embeddings().weight.grad
    ids = copied.config.query_token_ids + copied.config.document_token_ids
    assert (gradient[ids].abs().sum(dim=1) > 0).all()


def test_a_plain_processor_folder_is_refused_by_name(tmp_path):
    from metaembed import MetaEmbedProcessor

    _, processor = build_qwen2_5_vl()
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="from_backbone"):
        MetaEmbedProcessor.from_pretrained(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path)).__name__ == "Qwen2_5_VLProcessor"


# -- Configuration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ([[2, 4], [1, 1], [16, 64]], "not nested"),
        ([[1, 1], [1, 1], [16, 64]], "not strictly growing"),
        ([[1, 1], [2, 4]], "full size"),
        ([[2, 1], [1, 4], [8, 8]], "not nested.*full size"),
        ([[0, 1], [16, 64]], "between 1 and 16"),
        ([[1, 65], [16, 64]], "between 1 and 64"),
    ],
)
def test_unusable_budgets_are_named(budgets, message):
    with pytest.raises(ValueError, match=message):
        MetaEmbedConfig(budgets=budgets)


@pytest.mark.parametrize("budgets", [[], "16,64", [[1]], [[1.0, 1], [16, 64]], [16, 64]])
def test_values_that_are_not_budgets_are_errors(budgets):
    with pytest.raises(TypeError, match="budget"):
        MetaEmbedConfig(budgets=budgets)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_query_tokens": 0},
        {"embedding_dim": -1},
        {"query_num_meta": 17},
        {"document_num_meta": 0},
        {"query_token_ids": [5, 6]},
        {"num_query_tokens": 2, "query_token_ids": [6, 5]},
        {"query_token_ids": []},
        {"num_document_tokens": 2, "query_token_ids": list(range(16)), "document_token_ids": [15, 16]},
    ],
)
def test_settings_out_of_range_are_errors(settings):
    with pytest.raises(ValueError, match=next(reversed(settings))):
        MetaEmbedConfig(**settings)


@pytest.mark.parametrize("side", SIDES)
def test_an_instruction_of_the_configuration_must_be_text(side):
    with pytest.raises(TypeError, match=f"{side}_instruction"):
        MetaEmbedConfig(**{f"{side}_instruction": 5})


def test_configuration_survives_saving(tmp_path):
    config = MetaEmbedConfig(
        num_query_tokens=4, num_document_tokens=np.int64(8), query_num_meta=2, document_instruction="x"
    )
    config.save_pretrained(tmp_path)
    assert MetaEmbedConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_default_budgets_are_the_papers():
    assert MetaEmbedConfig().budgets == [[1, 1], [2, 4], [4, 8], [8, 16], [16, 64]]


def test_a_configuration_is_saved_after_transformers_has_loaded_its_file_again(bert, monkeypatch):
    """As it does for a class of a file that another file of the same checkpoint has imported."""
    again = type("BackboneTraits", (BackboneTraits,), {})
    monkeypatch.setattr("metaembed.configuration_metaembed.BackboneTraits", again)
    assert json.loads(bert.config.to_json_string())["traits"]["causal"] is False
