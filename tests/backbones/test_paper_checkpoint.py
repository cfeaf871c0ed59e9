"""Weights trained with the paper's own code give the same embeddings here as with its procedure."""

import copy
import functools
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
from metaembed.backbones import paper_checkpoint
from metaembed.backbones.loading import load_backbone

R_Q, R_C, DIM = 3, 5, 24


@functools.cache
def built():
    backbone, processor = build("qwen2_5_vl", dtype=torch.float64)
    headed = Qwen2_5_VLForConditionalGeneration(backbone.config).double().eval()
    headed.model.load_state_dict(backbone.state_dict())
    torch.manual_seed(1)
    tokens = torch.randn(R_Q + R_C, 32, dtype=torch.float64)
    return headed, processor, tokens, nn.Linear(32, DIM).double()


def paper_model():
    """The parts of the paper's model: a backbone with a head, its processor, Meta Tokens and a projection."""
    return copy.deepcopy(built())


def paper_procedure(headed, processor, tokens, projection, item):
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
            query, document = paper_procedure(headed, processor, tokens, projection, (image, text))
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
    headed, processor, tokens, projection = paper_model()
    projection = projection if projected else None
    state = dict(headed.state_dict())
    for new, old in OLD_NAMES if old_names else []:
        state = {old + name.removeprefix(new) if name.startswith(new) else name: v for name, v in state.items()}
    state["prompt_embed_tokens.weight"] = tokens
    if projection:
        state.update({f"custom_text_proj.{name}": value for name, value in projection.state_dict().items()})
    write(tmp_path / "paper", state, headed.config)
    model = MetaEmbedModel.from_authors_checkpoint(
        tmp_path / "paper", processor=processor, num_query_tokens=R_Q, dtype=torch.float64
    )
    assert model.config.document_sees_query_tokens and model.config.num_document_tokens == R_C
    assert not model.is_untrained
    assert_equal(model, headed, processor, tokens, projection)


def lora_on(headed, old_names=False):
    """Apply LoRA to the language model, and return the LoRA weights under PEFT's names."""
    state = {}
    with torch.no_grad():
        for name, module in headed.named_modules():
            if isinstance(module, nn.Linear) and ".language_model.layers." in name:
                down, up = torch.randn(2, module.in_features).double(), torch.randn(module.out_features, 2).double()
                module.weight += up @ down * (4 / 2) * 0.1
                name = name.replace(".language_model.", ".") if old_names else name
                state[f"{name}.lora_A.weight"] = down * 0.1
                state[f"{name}.lora_B.weight"] = up
    return state


def write_adapter(folder, state, **settings):
    folder.mkdir(exist_ok=True)
    state = {f"base_model.model.{name}": value.clone().contiguous() for name, value in state.items()}
    save_file(state, folder / "adapter_model.safetensors")
    plain = {"base_model_name_or_path": None, "r": 2, "lora_alpha": 4, "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps({**plain, **settings}))
    return folder


def write_base(folder, headed, processor):
    headed.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def own_weights(tokens, projection):
    named = {f"custom_text_proj.{name}": value for name, value in projection.state_dict().items()}
    return {"prompt_embed_tokens.weight": tokens, **named}


OPTIONS = dict(num_query_tokens=R_Q, dtype=torch.float64)


@pytest.mark.parametrize("old_names", [False, True])
def test_a_peft_adapter(tmp_path, old_names):
    headed, processor, tokens, projection = paper_model()
    base = write_base(tmp_path / "base", headed, processor)
    state = {**own_weights(tokens, projection), **lora_on(headed, old_names)}
    adapter = write_adapter(tmp_path / "adapter", state, base_model_name_or_path=base)
    model = MetaEmbedModel.from_authors_checkpoint(adapter, **OPTIONS)
    assert_equal(model, headed, processor, tokens, projection)
    model.save_pretrained(tmp_path / "ours")
    again = MetaEmbedModel.from_pretrained(tmp_path / "ours", dtype=torch.float64)
    assert_equal(again, headed, processor, tokens, projection)


def test_a_peft_adapter_with_its_base_named(tmp_path):
    headed, processor, tokens, projection = paper_model()
    base = write_base(tmp_path / "base", headed, processor)
    state = {**own_weights(tokens, projection), **lora_on(headed)}
    adapter = write_adapter(tmp_path / "adapter", state, base_model_name_or_path="/where/it/was/trained")
    model = MetaEmbedModel.from_authors_checkpoint(adapter, base=base, **OPTIONS)
    assert_equal(model, headed, processor, tokens, projection)
    assert model.config.base_model == base
    nameless = write_adapter(tmp_path / "adapter", state)
    with pytest.raises(ValueError, match="`base`"):
        MetaEmbedModel.from_authors_checkpoint(nameless, **OPTIONS)


def test_an_adapter_on_a_full_state_dict(tmp_path):
    headed, processor, tokens, projection = paper_model()
    write(tmp_path / "paper", {**headed.state_dict(), "prompt_embed_tokens.weight": tokens - 1}, headed.config)
    adapter = write_adapter(tmp_path / "adapter", {**own_weights(tokens, projection), **lora_on(headed)})
    model = MetaEmbedModel.from_authors_checkpoint(tmp_path / "paper", adapter=adapter, processor=processor, **OPTIONS)
    assert_equal(model, headed, processor, tokens, projection)


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_a_full_state_dict_in_shards(tmp_path, format):
    headed, processor, tokens, projection = paper_model()
    state = {name: value.clone() for name, value in {**headed.state_dict(), **own_weights(tokens, projection)}.items()}
    headed.config.save_pretrained(tmp_path)
    names = sorted(state)
    for index in range(3):
        part = {name: state[name] for name in names[index::3]}
        if format == "bin":
            torch.save(part, tmp_path / f"pytorch_model-0000{index + 1}-of-00003.bin")
        else:
            save_file(part, tmp_path / f"model-0000{index + 1}-of-00003.safetensors")
    model = MetaEmbedModel.from_authors_checkpoint(tmp_path, processor=processor, **OPTIONS)
    assert_equal(model, headed, processor, tokens, projection)
    next(tmp_path.glob("*-00002-of*")).unlink()
    with pytest.raises(ValueError, match="missing"):
        MetaEmbedModel.from_authors_checkpoint(tmp_path, processor=processor, **OPTIONS)


class RunsCode:
    def __reduce__(self):
        return print, ("code of a checkpoint runs",)


def test_code_in_a_bin_file_is_not_run(tmp_path, capsys):
    torch.save({"prompt_embed_tokens.weight": RunsCode()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds more than tensors"):
        MetaEmbedModel.from_authors_checkpoint(tmp_path)
    assert "code of a checkpoint runs" not in capsys.readouterr().out


def test_weights_in_two_files_at_once_are_an_error(tmp_path):
    headed, processor, tokens, _ = paper_model()
    write(tmp_path / "paper", {**headed.state_dict(), "prompt_embed_tokens.weight": tokens}, headed.config)
    save_file({"prompt_embed_tokens.weight": tokens}, tmp_path / "paper" / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"prompt_embed_tokens\.weight more than once"):
        MetaEmbedModel.from_authors_checkpoint(tmp_path / "paper", processor=processor, **OPTIONS)


LAYER = "model.language_model.layers.0.self_attn.q_proj"
HALF = {f"{LAYER}.lora_A.weight": torch.zeros(2, 32)}
ZERO = torch.zeros(R_Q + R_C, 32)


def lora(name, rank=2, inside=32, outside=32, value=0.0):
    down, up = torch.full((rank, inside), value), torch.zeros(outside, rank)
    return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}


@pytest.mark.parametrize(
    "weights, settings, message",
    [
        ({"model.stray.weight": ZERO}, {}, "model.stray.weight"),
        ({"custom_text_proj.lora_A.weight": ZERO}, {}, "custom_text_proj.lora_A.weight"),
        ({**lora(LAYER), f"{LAYER}.lora_C.weight": ZERO}, {}, "lora_C"),
        (HALF, {}, "lora_A"),
        (lora("nonsense.merger.mlp.0", inside=128, outside=128), {}, "nonsense.merger.mlp.0 has no place"),
        (lora("model.language_model.layers.9.self_attn.q_proj"), {}, "layers.9.self_attn.q_proj has no place"),
        (lora(LAYER, rank=3), {}, r"\(32, 3\) by \(3, 32\): expected \(32, 2\) by \(2, 32\)"),
        (lora(LAYER, inside=48), {}, r"expected \(32, 2\) by \(2, 32\)"),
        (lora(LAYER, value=float("nan")), {}, "finite"),
        ({"prompt_embed_tokens.modules_to_save.default.weight": ZERO}, {}, "more than once"),
        ({f"{LAYER}.lora_A.default.weight": ZERO, **lora(LAYER)}, {}, "more than once"),
        ({"prompt_embed_tokens.weight": torch.zeros(8, 48)}, {}, r"\(8, 48\): expected \(8, 32\)"),
        ({"prompt_embed_tokens.weight": ZERO * float("nan")}, {}, "finite"),
        ({"custom_text_proj.weight": torch.zeros(24, 48)}, {}, r"\(24, 48\): expected \(24, 32\)"),
        (
            {"custom_text_proj.weight": torch.zeros(24, 32), "custom_text_proj.bias": torch.zeros(23)},
            {},
            r"\(23,\): expected \(24,\)",
        ),
        ({"custom_text_proj.bias": torch.zeros(24)}, {}, "instead of one weight and one bias"),
        ({}, {"peft_type": "IA3"}, "IA3"),
        ({}, {"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({}, {"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({}, {"use_dora": True}, "use_dora"),
        ({}, {"layer_replication": [[0, 1]]}, "layer_replication"),
        ({}, {"init_lora_weights": "pissa_niter_4"}, "pissa"),
    ],
)
def test_an_adapter_that_does_not_fit_is_an_error_that_says_where(tmp_path, paper_base, weights, settings, message):
    adapter = write_adapter(tmp_path / "adapter", {"prompt_embed_tokens.weight": ZERO, **weights}, **settings)
    with pytest.raises(ValueError, match=message):
        MetaEmbedModel.from_authors_checkpoint(adapter, base=paper_base, num_query_tokens=R_Q)


@pytest.fixture(scope="module")
def paper_base(tmp_path_factory):
    headed, processor, _, _ = paper_model()
    return write_base(tmp_path_factory.mktemp("paper") / "base", headed.float(), processor)


def test_an_adapter_of_rank_stabilised_lora_is_scaled_by_the_root_of_its_rank(tmp_path, paper_base):
    plain, rooted = (
        MetaEmbedModel.from_authors_checkpoint(
            write_adapter(
                tmp_path / str(alpha),
                {
                    "prompt_embed_tokens.weight": ZERO,
                    f"{LAYER}.lora_A.weight": torch.ones(2, 32),
                    f"{LAYER}.lora_B.weight": torch.ones(32, 2),
                },
                lora_alpha=alpha,
                use_rslora=root,
            ),
            base=paper_base,
            num_query_tokens=R_Q,
        )
        .backbone.language_model.layers[0]
        .self_attn.q_proj.weight
        for alpha, root in ((4 * 2**0.5, False), (4, True))
    )
    torch.testing.assert_close(plain, rooted)


@pytest.mark.parametrize("option", [{"num_query_tokens": "3"}, {"query_instructions": "x"}, {"budget": [[1, 1]]}])
def test_an_unknown_option_is_an_error(tmp_path, paper_base, option):
    adapter = write_adapter(tmp_path / "adapter", {"prompt_embed_tokens.weight": ZERO})
    with pytest.raises(TypeError, match=next(iter(option))):
        MetaEmbedModel.from_authors_checkpoint(adapter, base=paper_base, **{"num_query_tokens": R_Q, **option})


@pytest.mark.parametrize("full", [True, False])
def test_options_reach_the_backbone_and_the_model(tmp_path, paper_base, full):
    headed, _, tokens, _ = paper_model()
    if full:
        checkpoint = tmp_path / "paper"
        write(checkpoint, {**headed.state_dict(), "prompt_embed_tokens.weight": tokens}, headed.config)
    else:
        checkpoint = write_adapter(tmp_path / "adapter", {"prompt_embed_tokens.weight": tokens})
    model = MetaEmbedModel.from_authors_checkpoint(
        checkpoint, base=paper_base, attn_implementation="eager", query_instruction="find", **OPTIONS
    )
    assert model.backbone.config._attn_implementation == "eager" and model.dtype == torch.float64
    assert model.config.query_instruction == "find"


@pytest.mark.parametrize("asked", [None, "v2"])
def test_each_repository_has_its_own_revision(tmp_path, monkeypatch, paper_base, asked):
    adapter = write_adapter(
        tmp_path / "adapter",
        {"prompt_embed_tokens.weight": ZERO},
        base_model_name_or_path="lab/base",
        revision="v1",
    )
    asked_for = {}

    def download(source, revision=None, **hub):
        asked_for[source] = revision, hub
        return adapter

    def load(source, revision=None, cache_dir=None, **kwargs):
        asked_for[source] = revision, {"cache_dir": cache_dir}
        return load_backbone(paper_base, **kwargs)

    monkeypatch.setattr(paper_checkpoint, "snapshot_download", download)
    monkeypatch.setattr(paper_checkpoint, "load_backbone", load)
    MetaEmbedModel.from_authors_checkpoint(
        "lab/adapter",
        adapter="lab/second",
        revision="abc",
        base_revision=asked,
        adapter_revision="def",
        cache_dir="cache",
        num_query_tokens=R_Q,
    )
    where = {"cache_dir": "cache"}
    assert asked_for == {
        "lab/adapter": ("abc", where),
        "lab/base": (asked or "v1", where),
        "lab/second": ("def", where),
    }


def test_a_checkpoint_without_a_processor_says_what_to_pass(tmp_path):
    headed, _, tokens, _ = paper_model()
    write(tmp_path / "paper", {**headed.state_dict(), "prompt_embed_tokens.weight": tokens}, headed.config)
    with pytest.raises(ValueError, match="`processor`"):
        MetaEmbedModel.from_authors_checkpoint(tmp_path / "paper", **OPTIONS)


@pytest.mark.parametrize("change", ["stray", "missing", "no tokens", "too few tokens"])
def test_weights_that_are_not_accounted_for_are_errors(tmp_path, change):
    headed, processor, tokens, _ = paper_model()
    state = {**headed.state_dict(), "prompt_embed_tokens.weight": tokens}
    if change == "stray":
        state["model.language_model.stray.weight"] = tokens
    elif change == "missing":
        del state["model.language_model.norm.weight"]
    elif change == "no tokens":
        del state["prompt_embed_tokens.weight"]
    write(tmp_path / "paper", state, headed.config)
    wanted = {"stray": "stray", "missing": "norm", "no tokens": "prompt_embed_tokens", "too few tokens": "16"}[change]
    with pytest.raises(ValueError, match=wanted):
        MetaEmbedModel.from_authors_checkpoint(
            tmp_path / "paper", processor=processor, num_query_tokens=16 if "few" in change else R_Q
        )
