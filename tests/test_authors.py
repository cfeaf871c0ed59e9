"""Weights trained with the paper's own code give, here, the embeddings that their procedure gives."""

import copy
import json

import pytest
import torch
from conformance import picture
from safetensors.torch import save_file
from tiny import build
from tiny_models import EXACT
from torch import nn
from torch.nn.functional import normalize
from transformers import Qwen2_5_VLForConditionalGeneration

from metaembed import MetaEmbedModel

R_Q, R_C, DIM = 3, 5, 24


def their_full_model():
    """Their class in its parts: a headed backbone, Meta Tokens, a projection."""
    backbone, processor = build("qwen2_5_vl", dtype=torch.float64)
    headed = Qwen2_5_VLForConditionalGeneration(backbone.config).double().eval()
    headed.model.load_state_dict(backbone.state_dict())
    torch.manual_seed(1)
    tokens = torch.randn(R_Q + R_C, 32, dtype=torch.float64)
    return headed, processor, tokens, nn.Linear(32, DIM).double()


def their_procedure(headed, processor, tokens, projection, item):
    """Written out from the paper: left padding, `[input; M_q; M_c]` as `inputs_embeds`, explicit positions, slices."""
    model = headed.model
    image, text = item
    content = ([{"type": "image"}] if image else []) + [{"type": "text", "text": text}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    bare = copy.deepcopy(processor)
    features = bare(
        text=[prompt], images=[image] if image else None, return_tensors="pt", padding="max_length", max_length=96,
        padding_side="left", add_special_tokens=not prompt.startswith("<s>"), return_mm_token_type_ids=True,
    )  # fmt: skip
    ids, mask = features["input_ids"], features["attention_mask"]
    embeds = model.get_input_embeddings()(ids)
    if image:
        seen = model.visual(features["pixel_values"].double(), grid_thw=features["image_grid_thw"]).pooler_output
        embeds[ids == model.config.image_token_id] = seen
    embeds = torch.cat([embeds, tokens[None]], dim=1)
    extra = torch.ones(1, R_Q + R_C, dtype=ids.dtype)
    ids, mask = torch.cat([ids, extra], dim=1), torch.cat([mask, extra], dim=1)
    kinds = torch.cat([features["mm_token_type_ids"], torch.zeros_like(extra)], dim=1)
    positions, _ = model.get_rope_index(
        ids, mm_token_type_ids=kinds, image_grid_thw=features.get("image_grid_thw"), attention_mask=mask
    )
    hidden = model.language_model(inputs_embeds=embeds, position_ids=positions, attention_mask=mask).last_hidden_state
    meta = hidden[0, -(R_Q + R_C) :]
    meta = meta if projection is None else projection(meta)
    return normalize(meta[:R_Q], dim=-1), normalize(meta[R_Q:], dim=-1)


ITEMS = [(None, "a red apple"), (picture(0), "the green pear"), (picture(1, 84, 140), "two cats")]


def assert_equal(model, headed, processor, tokens, projection):
    with torch.no_grad():
        for image, text in ITEMS:
            item = {"image": image, "text": text}
            query, document = their_procedure(headed, processor, tokens, projection, (image, text))
            ours = [
                model(**features).embeddings[0]
                for features in (model.processor.process_queries(item), model.processor.process_documents(item))
            ]
            torch.testing.assert_close(ours[0], query, atol=EXACT, rtol=0)
            torch.testing.assert_close(ours[1], document, atol=EXACT, rtol=0)


def write(folder, state, config):
    folder.mkdir()
    save_file({name: value.clone().contiguous() for name, value in state.items()}, folder / "model.safetensors")
    config.save_pretrained(folder)


OLD_NAMES = [("model.visual.", "visual."), ("model.language_model.", "model.")]  # of transformers before 4.52


@pytest.mark.parametrize("old_names", [False, True])
@pytest.mark.parametrize("projected", [True, False])
def test_a_full_state_dict(tmp_path, projected, old_names):
    headed, processor, tokens, projection = their_full_model()
    projection = projection if projected else None
    state = dict(headed.state_dict())
    for new, old in OLD_NAMES if old_names else []:
        state = {old + name.removeprefix(new) if name.startswith(new) else name: v for name, v in state.items()}
    state["prompt_embed_tokens.weight"] = tokens
    if projection:
        state.update({f"custom_text_proj.{name}": value for name, value in projection.state_dict().items()})
    write(tmp_path / "theirs", state, headed.config)
    model = MetaEmbedModel.from_authors_checkpoint(
        tmp_path / "theirs", processor=processor, num_query_tokens=R_Q, dtype=torch.float64
    )
    assert model.config.document_sees_query_tokens and model.config.num_document_tokens == R_C
    assert_equal(model, headed, processor, tokens, projection)


@pytest.mark.parametrize("old_names", [False, True])
def test_a_peft_adapter(tmp_path, old_names):
    headed, processor, tokens, projection = their_full_model()
    headed.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    state = {"base_model.model.prompt_embed_tokens.weight": tokens}
    for name, value in projection.state_dict().items():
        state[f"base_model.model.custom_text_proj.{name}"] = value
    with torch.no_grad():
        for name, module in headed.named_modules():
            if isinstance(module, nn.Linear) and ".language_model.layers." in name:
                down, up = torch.randn(2, module.in_features).double(), torch.randn(module.out_features, 2).double()
                module.weight += up @ down * (4 / 2) * 0.1
                name = name.replace(".language_model.", ".") if old_names else name
                state[f"base_model.model.{name}.lora_A.weight"] = down * 0.1
                state[f"base_model.model.{name}.lora_B.weight"] = up
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(
        {name: value.clone().contiguous() for name, value in state.items()}, adapter / "adapter_model.safetensors"
    )
    settings = {"base_model_name_or_path": str(tmp_path / "base"), "r": 2, "lora_alpha": 4, "peft_type": "LORA"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    model = MetaEmbedModel.from_authors_checkpoint(adapter, num_query_tokens=R_Q, dtype=torch.float64)
    assert_equal(model, headed, processor, tokens, projection)
    model.save_pretrained(tmp_path / "ours")
    again = MetaEmbedModel.from_pretrained(tmp_path / "ours", dtype=torch.float64)
    assert_equal(again, headed, processor, tokens, projection)

    for stray in (
        "model.stray.weight",
        "custom_text_proj.lora_A.weight",
        "model.layers.0.self_attn.q_proj.lora_C.weight",
    ):
        save_file({**state, f"base_model.model.{stray}": torch.zeros(2, 32)}, adapter / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=stray):
            MetaEmbedModel.from_authors_checkpoint(adapter, num_query_tokens=R_Q, dtype=torch.float64)


@pytest.mark.parametrize("change", ["stray", "missing", "no tokens", "too few tokens"])
def test_weights_that_are_not_accounted_for_are_errors(tmp_path, change):
    headed, processor, tokens, _ = their_full_model()
    state = {**headed.state_dict(), "prompt_embed_tokens.weight": tokens}
    if change == "stray":
        state["model.language_model.stray.weight"] = tokens
    elif change == "missing":
        del state["model.language_model.norm.weight"]
    elif change == "no tokens":
        del state["prompt_embed_tokens.weight"]
    write(tmp_path / "theirs", state, headed.config)
    wanted = {"stray": "stray", "missing": "norm", "no tokens": "prompt_embed_tokens", "too few tokens": "16"}[change]
    with pytest.raises(ValueError, match=wanted):
        MetaEmbedModel.from_authors_checkpoint(
            tmp_path / "theirs", processor=processor, num_query_tokens=16 if "few" in change else R_Q
        )
