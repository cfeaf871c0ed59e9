"""Checks that every backbone must pass, one function each, for `test_backbones.py` and `benchmarks/backbones.py`."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from tiny import build
from torch.nn.functional import cosine_similarity
from transformers import AddedToken

from metaembed import MetaEmbedModel, MetaEmbedProcessor

SIDES = ("query", "document")
TOKENS = {"query": 2, "document": 4}
CLOSE = 2e-4  # distance of float32 unit vectors; a leak between rows changes them a hundred times as much


def picture(seed: int, width: int = 112, height: int = 84) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def video(seed: int, frames: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, 56, 84, 3), dtype=np.uint8)


def recording(seed: int, seconds: float = 0.8, rate: int = 16_000) -> dict[str, object]:
    """Noise, as sentence-transformers has recordings in memory."""
    noise = np.random.default_rng(seed).uniform(-0.5, 0.5, int(seconds * rate))
    return {"array": noise.astype(np.float32), "sampling_rate": rate}


@functools.cache
def load(name: str) -> MetaEmbedModel:
    """Return the tiny model of an architecture, shared by all checks: change a `fork` of it only."""
    backbone, processor = build(name)
    return MetaEmbedModel.from_backbone(
        backbone, processor=processor, num_query_tokens=TOKENS["query"], num_document_tokens=TOKENS["document"]
    )


def fork(name: str) -> MetaEmbedModel:
    """Return a copy of the model of an architecture, to be changed.

    Not by `deepcopy`: that copies the hooks by which transformers records hidden states, which then record twice.
    """
    model = load(name)
    copied = MetaEmbedModel(copy.deepcopy(model.config))
    copied.load_state_dict(model.state_dict())
    copied.processor = MetaEmbedProcessor(model.processor.backbone_processor, copied.config)
    return copied.eval()


def encode(model: MetaEmbedModel, side: str, *args, **kwargs) -> torch.Tensor:
    return (model.encode_queries if side == "query" else model.encode_documents)(*args, **kwargs)


@functools.cache
def inputs_of(model: MetaEmbedModel) -> dict[str, object]:
    """Return one input of each kind that the backbone takes: `test_backbones.py` states which these are."""
    inputs: dict[str, object] = {"text": "a red apple and the green pear"}
    if model.processor.image_processor is not None:
        inputs["image"] = picture(0)
        inputs["image and text"] = {"image": picture(1), "text": "a red apple"}
        if takes(model, two := {"image": [picture(0), picture(1)], "text": "two cats"}):
            inputs["two images"] = two
            interleaved = ["first", picture(2), "then", {"type": "image", "image": picture(3)}, "what is new?"]
            inputs["interleaved"] = [{"role": "user", "content": interleaved}]
    if model.processor.video_processor is not None and takes(model, clip := {"video": video(0), "text": "a cat"}):
        inputs["video"] = clip
    if model.processor.takes("audio"):
        inputs["audio"] = heard = recording(0, rate=(rate := model.processor.audio_processor.sampling_rate))
        inputs["audio and text"] = {"audio": recording(1, 1.3, rate), "text": "a red apple"}
        if takes(model, two := {"audio": [heard, recording(2, 1.1, rate)], "text": "two cats"}):
            inputs["two recordings"] = two
        if "image" in inputs:
            inputs["image and audio"] = {"image": picture(4), "audio": heard, "text": "a cat"}
    return inputs


def takes(model: MetaEmbedModel, item: object) -> bool:
    try:
        model.encode_documents(item)
    except Exception:
        return False
    return True


@functools.cache
def rows_of(model: MetaEmbedModel, side: str) -> dict[str, torch.Tensor]:
    """Return the rows of each of these inputs, encoded by itself."""
    return {kind: encode(model, side, item) for kind, item in inputs_of(model).items()}


def batch_of(model: MetaEmbedModel, side: str) -> tuple[list, list[torch.Tensor]]:
    """Return inputs of each kind and of several lengths, and the rows of each, encoded by itself."""
    more = ["cat", "the green pear on a blue table " * 5]
    return [*inputs_of(model).values(), *more], [
        *rows_of(model, side).values(),
        *(encode(model, side, t) for t in more),
    ]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a - b).norm(dim=-1).max())


def check_every_kind_of_input_is_embedded(model: MetaEmbedModel) -> None:
    for side in SIDES:
        rows = rows_of(model, side)
        for kind, row in rows.items():
            assert row.shape == (TOKENS[side], model.config.hidden_size), kind
            torch.testing.assert_close(row.norm(dim=-1), torch.ones(TOKENS[side]), msg=kind)
        kinds = list(rows)
        for first in range(len(kinds)):
            for second in range(first):
                assert distance(rows[kinds[first]], rows[kinds[second]]) > 100 * CLOSE, (kinds[first], kinds[second])
    text = "a red apple"
    assert distance(encode(model, "query", text), encode(model, "document", text)[:2]) > 100 * CLOSE


def check_fewer_tokens_equal_the_prefix(model: MetaEmbedModel) -> None:
    for side in SIDES:
        for kind, item in inputs_of(model).items():
            whole = rows_of(model, side)[kind]
            for r in range(1, TOKENS[side]):
                part = encode(model, side, item, num_meta=r)
                assert distance(part, whole[:r]) < CLOSE, (side, kind, r)


def check_a_batch_equals_one_by_one(model: MetaEmbedModel) -> None:
    items, alone = batch_of(model, "document")
    for item, row, rows in zip(items, alone, model.encode_documents(items), strict=True):
        assert distance(row, rows) < CLOSE, item


def check_either_padding_side_gives_equal_rows(model: MetaEmbedModel) -> None:
    """Or left padding is refused, where positions count it."""
    if not model.config.traits.pads_left:
        with pytest.raises(ValueError, match="padding"):
            model.encode_documents(batch_of(model, "document")[0], padding_side="left")
        return
    for side in SIDES:
        items, alone = batch_of(model, side)
        for item, row, rows in zip(items, alone, encode(model, side, items, padding_side="left"), strict=True):
            assert distance(row, rows) < CLOSE, item


def check_special_tokens_in_user_text_are_text(model: MetaEmbedModel) -> None:
    processor = model.processor
    special = torch.tensor([i for i, token in processor.tokenizer.added_tokens_decoder.items() if token.special])
    names = [processor.tokenizer.decode([i], skip_special_tokens=False) for i in special.tolist()]
    places = [value for name, value in vars(processor.backbone_processor).items() if name.endswith("_token")]
    names += [str(place) for place in places if isinstance(place, (str, AddedToken)) and str(place)]

    def split(name: str) -> list:
        half = len(name) // 2
        parts = [f"apple {name[:half]}", {"type": "text", "text": f"{name[half:]} pear"}]
        return [{"role": "user", "content": parts}]

    def structures(items: list) -> list[list[int]]:
        features = processor.process_documents(items)
        rows = zip(features["input_ids"], features["attention_mask"].bool(), strict=True)
        return [ids[mask & torch.isin(ids, special)].tolist() for ids, mask in rows]

    (plain,) = structures(["apple"])
    whole = structures([f"apple {name}{name} pear" for name in names])
    halves = structures([split(name) for name in names])
    for name, *found in zip(names, whole, halves, strict=True):
        assert found == [plain, plain], name
    model.encode_documents("".join(names))


def check_saving_and_loading_changes_nothing(model: MetaEmbedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    loaded = MetaEmbedModel.from_pretrained(folder)
    for kind, item in inputs_of(model).items():
        before, after = model.processor.process_documents(item), loaded.processor.process_documents(item)
        assert before.keys() == after.keys(), kind
        for name, value in before.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(after[name])), (kind, name)
        assert distance(rows_of(model, "document")[kind], loaded.encode_documents(item)) < 1e-5, kind


def check_a_training_step_changes_what_it_should(name: str) -> None:
    """The Meta Tokens and the LoRA weights, all of them, and nothing else."""
    model = fork(name)
    embedding = next(n for n, module in model.named_modules() if module is model.get_input_embeddings())
    ids = model.config.query_token_ids + model.config.document_token_ids
    lora = LoraConfig(
        target_modules=linear_names(model), trainable_token_indices={embedding: ids}, init_lora_weights=False
    )
    trained = get_peft_model(model, lora).train()
    before = {n: p.detach().clone() for n, p in trained.named_parameters()}
    trainable = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=10.0)
    mmr_loss(model, inputs_of(load(name))).backward()
    optimizer.step()
    after = dict(trained.named_parameters())
    changed = {n for n, value in before.items() if not torch.equal(value, after[n])}
    assert changed == {n for n, p in after.items() if p.requires_grad}
    delta = next(n for n in changed if "token_adapter" in n)
    rows = (before[delta] - after[delta]).abs().amax(dim=1) > 0  # [R_q + R_c]
    # Every query vector contributes to the loss; a document vector only if it is the best of some query vector.
    assert rows[: TOKENS["query"] + 1].all()


def linear_names(model: MetaEmbedModel) -> list[str]:
    """Return the names of two linear layers of the language model that every input passes through."""
    used: dict[str, None] = {}
    hooks = [
        module.register_forward_hook(lambda *_, n=name: used.setdefault(n))
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear
    ]
    model.encode_queries("a red apple")
    for hook in hooks:
        hook.remove()
    return list(used)[:2]


def mmr_loss(model: MetaEmbedModel, items: dict[str, object]) -> torch.Tensor:
    """The paper's loss, written out for two queries and two documents."""
    queries = model(**model.processor.process_queries(["a red apple", "a green pear"])).embeddings
    documents = torch.cat(
        [
            model(**model.processor.process_documents(item)).embeddings
            for item in (items.get("image and text", items["text"]), "the green pear on a blue table")
        ]
    )
    scores = torch.einsum("qid,njd->qnij", queries, documents)
    target = torch.arange(2)
    losses = [
        torch.nn.functional.cross_entropy(scores[..., :r_q, :r_c].amax(-1).sum(-1) / 0.3, target)
        for r_q, r_c in model.config.budgets
    ]
    return sum(losses)


def check_bfloat16(model: MetaEmbedModel, folder: Path) -> None:
    """Rounding changes every row less than the hidden states of another layer would change any."""
    model.save_pretrained(folder)
    rough = MetaEmbedModel.from_pretrained(
        folder, dtype=torch.bfloat16
    )  # some parts stay in float32, which `to` ignores
    for kind, item in inputs_of(model).items():
        rows, right = rough.encode_documents(item), rows_of(model, "document")[kind]
        assert rows.dtype == torch.float32
        # Random weights amplify rounding, above all with many layers and few dimensions.
        close = cosine_similarity(rows, right, dim=-1).min()
        assert close > 0.85 and close > similarity_of_the_layer_before(model, item, right), kind


@torch.no_grad()
def similarity_of_the_layer_before(model: MetaEmbedModel, item: object, rows: torch.Tensor) -> float:
    """Return the largest cosine of a row to the same row of the last layer but one."""
    features = model.processor.process_documents(item)
    features.pop("num_meta", None)
    inputs = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in features.items()}
    try:
        hidden = model.backbone(**inputs, output_hidden_states=True).hidden_states[-2]
    except AttributeError:  # phi4_multimodal asks its vision tower for one layer, and gets none then
        return -1.0
    if hidden.shape[-1] != rows.shape[-1]:  # some layers are wider: taking them would be an error
        return -1.0
    ids = model.config.document_token_ids
    meta = (features["input_ids"] >= ids[0]) & (features["input_ids"] <= ids[-1])
    return float(cosine_similarity(hidden[meta], rows, dim=-1).max())


def check_gradient_checkpointing_changes_nothing(name: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = fork(name)
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)  # the same dropout
        mmr_loss(model.train(), inputs_of(load(name))).backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)


def check_sdpa_equals_eager(name: str) -> None:
    model, eager = load(name), fork(name)
    eager.set_attn_implementation("eager")
    for kind, item in inputs_of(model).items():
        assert distance(rows_of(model, "document")[kind], eager.encode_documents(item)) < CLOSE, kind


def check_max_length_cuts_the_text_alone(model: MetaEmbedModel) -> None:
    text = "a red apple and the green pear on a blue table"
    ids = model.processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    cut = text[: ids["offset_mapping"][2][1]]
    assert distance(model.encode_documents(text, max_length=3), model.encode_documents(cut)) < 1e-5
    assert distance(model.encode_documents(text, max_length=1000), model.encode_documents(text)) < 1e-5


def check_no_row_begins_with_two_bos(model: MetaEmbedModel) -> None:
    bos = model.processor.tokenizer.bos_token_id
    for kind, item in inputs_of(model).items():
        ids = model.processor.process_documents(item)["input_ids"][0].tolist()
        assert sum(token == bos for token in ids) <= 1, kind


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


def run(check: str, name: str, folder: Path) -> None:
    """Run one check on one architecture."""
    function = CHECKS[check]
    arguments = {"name": name, "folder": folder}
    wanted = function.__code__.co_varnames[: function.__code__.co_argcount]
    if "model" in wanted:
        arguments["model"] = load(name)
    function(**{argument: arguments[argument] for argument in wanted})
