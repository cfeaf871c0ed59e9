"""Exports a model as its plain backbone, for engines and libraries that must not run code of ours.

The Meta Tokens are ordinary tokens, so the backbone's own class and a chat template that appends them are enough. The
folder loads with transformers' `AutoModel`, is served by vLLM, and is a `MultiVectorEncoder` of stock modules of
sentence-transformers.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import nn
from transformers import MODEL_MAPPING, PreTrainedModel
from transformers.utils import logging

from ..configuration_metaembed import SIDES
from ..loading_metaembed import SENTENCE_CONFIG
from ..modeling_metaembed import MetaEmbedModel
from ..processing_metaembed import meta_token_names, render

logger = logging.get_logger(__name__)

META_FILE = "meta_tokens.json"

# What stands before a backbone's own template: puts the side's instruction into the first message of the user.
INSTRUCTION = """\
{%- set instruction = (QUERY if task == 'query' else DOCUMENT) -%}
{%- set built = namespace(messages=[], pending=instruction != '') -%}
{%- for message in messages -%}
{%- if built.pending and message['role'] == 'user' -%}
{%- set built.pending = false -%}
{%- if message['content'] is string -%}
{%- set content = instruction + '\\n' + message['content'] -%}
{%- else -%}
{%- set content = [{'type': 'text', 'text': instruction + '\\n'}] + message['content'] -%}
{%- endif -%}
{%- set built.messages = built.messages + [{'role': message['role'], 'content': content}] -%}
{%- else -%}
{%- set built.messages = built.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = built.messages -%}"""

# The template of a backbone that has none: what `render` makes of messages then.
PLAIN = """\
{%- for message in messages -%}
{%- if not loop.first -%}{{ '\\n' }}{%- endif -%}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ IMAGE }}
{%- elif part['type'] == 'video' -%}{{ VIDEO }}
{%- else -%}{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}"""

# What follows a backbone's own template: the Meta Tokens of the side, the first `num_meta` or, where the backbone is
# not causal, all of them.
META_TOKENS = """\
{{ '' }}{%- if task is defined and task not in ['query', 'document', none] -%}
{{ raise_exception("task must be 'query' or 'document'") }}
{%- endif -%}
{%- set is_query = task is defined and task == 'query' -%}
{%- set all = NUM_QUERY if is_query else NUM_DOCUMENT -%}
{%- set count = num_meta | default(DEFAULT_QUERY if is_query else DEFAULT_DOCUMENT) -%}
{%- if count not in range(1, 1 + all) -%}
{{ raise_exception('num_meta must be a whole number from 1 to the number of Meta Tokens') }}
{%- endif -%}
{%- if not is_query -%}{%- for i in range(SEEN) -%}{{ '<|meta_query_' ~ i ~ '|>' }}{%- endfor -%}{%- endif -%}
{%- for i in range(count if CAUSAL else all) -%}
{{ '<|meta_' ~ ('query' if is_query else 'document') ~ '_' ~ i ~ '|>' }}
{%- endfor -%}
{{ AFTER }}"""


def export_backbone(
    model: MetaEmbedModel, folder: str | Path, *, vllm: bool = True, sentence_transformers: bool = True
) -> Path:
    """Save a model as its plain backbone with a tokenizer that holds the Meta Tokens: no code is needed to load it.

    The folder's chat template appends the Meta Tokens: of the documents, or with `task="query"` of the queries, and
    only the first few with `num_meta=4` (where the backbone is not causal, all are appended: keep the first 4 rows).
    Its `meta_tokens.json` says what a client of an engine must know.

    Args:
        model: The model. An adapter must be merged first.
        folder: Folder to write to. It must be empty or not exist.
        vllm: Require that vLLM can serve it: it runs generative backbones, which are causal.
        sentence_transformers: Also write what `MultiVectorEncoder` reads, with stock modules only.

    Returns:
        The folder.

    Raises:
        ValueError: If the model has an adapter, or needs code of its own, or cannot be expressed as asked, or its
            chat template would not give the token ids that the model was trained with.

    Example:
        >>> folder = export_backbone(model, "plain")
        >>> backbone, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        >>> ids = tokenizer.apply_chat_template([{"role": "user", "content": "a red apple"}], task="query", num_meta=4)
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder: export to a new one.")
    check_exportable(model, vllm, sentence_transformers)
    processor = with_meta_template(model)
    check_same_ids(model, processor)
    save_native(model.backbone, folder)
    processor.save_pretrained(folder)
    (folder / META_FILE).write_text(json.dumps(describe(model), indent=2) + "\n", encoding="utf-8")
    if sentence_transformers or model.projection is not None:  # vLLM too finds the projection through modules.json
        write_sentence_modules(model, processor, folder)
    return folder


def check_exportable(model: MetaEmbedModel, vllm: bool, sentence_transformers: bool) -> None:
    """Raise a `ValueError` that says why a model cannot be exported for these uses."""
    traits, name = model.config.traits, type(model.backbone).__name__
    takes_images = model.processor.image_processor is not None
    wrapped = model._hf_peft_config_loaded or any("lora_A" in key for key, _ in model.named_parameters())
    needs_code = not type(model.backbone).__module__.startswith("transformers.")
    for problem, wrong in {
        "the model has an adapter. Merge it first: metaembed.merge_adapter(model).": wrapped,
        f"{name} is no class of transformers, so the export would need the backbone's own code.": needs_code,
        f"vLLM runs {name} as a causal model, and its Meta Tokens see later ones: the embeddings would differ. Serve "
        "it with the package's own server (metaembed serve), or pass vllm=False to export it for other uses.": vllm
        and not traits.causal,
        f"inputs with images would change other inputs of a batch with {name}, and stock modules of "
        "sentence-transformers do not batch them apart. Pass sentence_transformers=False, and encode one "
        "input at a time.": sentence_transformers
        and takes_images
        and not (traits.mixes_images and traits.batches_images),
    }.items():
        if wrong:
            raise ValueError(problem)
    if model.token_projection is not None:
        logger.warning("The export holds no token_projection: it gives the vectors of Meta Tokens only.")


def describe(model: MetaEmbedModel) -> dict[str, Any]:
    """Return what a client must know: `num_tokens` and `tokens_after` them of each side, `dim` and `special_tokens`.

    Special tokens are those that must be broken in a user's text, so that they stay text.
    """
    config, tokenizer = model.config, model.processor.tokenizer
    pattern, _ = model.processor._special
    return {
        "num_tokens": {side: config.num_tokens(side) for side in SIDES},
        "tokens_after": len(ends_of(tokenizer, starts_with_bos(model.processor))[1]),
        "dim": config.embedding_dim or config.hidden_size,
        "causal": config.traits.causal,
        "special_tokens": [] if pattern is None else sorted(special_strings(pattern.pattern)),
    }


def special_strings(pattern: str) -> set[str]:
    """Return the strings of a pattern of alternatives, each escaped."""
    return {re.sub(r"\\(.)", r"\1", part) for part in re.findall(r"(?:\\.|[^|\\])+", pattern)}


def with_meta_template(model: MetaEmbedModel) -> Any:
    """Return a copy of the backbone's processor whose chat template appends the Meta Tokens, as `process` does."""
    config, wrapper = model.config, model.processor
    processor = copy.deepcopy(wrapper.backbone_processor)
    tokenizer = getattr(processor, "tokenizer", processor)
    tokenizer.padding_side = "right"  # equal rows whatever the position embedding is
    template = wrapper.chat_template
    if isinstance(template, dict):
        template = template["default"]
    if template is None:
        places = {kind.upper(): str(getattr(processor, f"{kind}_token", "")) for kind in ("image", "video")}
        template = fill_in(PLAIN, places)
    before, after = ends_of(tokenizer, starts_with_bos(wrapper))
    values: dict[str, int | str | bool] = {"AFTER": "".join(after), "CAUSAL": config.traits.causal}
    values["SEEN"] = config.num_query_tokens if config.document_sees_query_tokens else 0
    for side in SIDES:
        values[f"NUM_{side.upper()}"] = config.num_tokens(side)
        values[f"DEFAULT_{side.upper()}"] = wrapper.resolve_num_meta(side, None)
    suffix = fill_in(META_TOKENS, values)
    prefix = fill_in("{{- BEFORE -}}", {"BEFORE": "".join(before)}) if before else ""
    instructions = {side.upper(): getattr(config, f"{side}_instruction") or "" for side in SIDES}
    if any(instructions.values()):
        prefix += fill_in(INSTRUCTION, instructions)
    for owner in {id(each): each for each in (processor, tokenizer)}.values():
        owner.chat_template = prefix + template.removesuffix("\n") + suffix
    return processor


def fill_in(template: str, values: Mapping[str, int | str | bool]) -> str:
    """Return a template with values in the place of their names, in one pass: a value may hold a name."""
    return re.sub(rf"\b({'|'.join(values)})\b", lambda name: json.dumps(values[name[0]], ensure_ascii=False), template)


def starts_with_bos(processor: Any) -> bool:
    """Whether the backbone's own chat template begins with its first token, so that the tokenizer must add none."""
    bos = processor.tokenizer.bos_token
    text = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    return bool(bos) and render(processor.backbone_processor, text).startswith(bos)


def ends_of(tokenizer: Any, has_bos: bool) -> tuple[list[str], list[str]]:
    """Return the tokens that a tokenizer adds before and after a text, none if the template writes them itself."""
    if has_bos:
        return [], []
    inner = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next(i for i in range(len(whole)) if whole[i : i + len(inner)] == inner)
    ends = whole[:start], whole[start + len(inner) :]
    return tuple(tokenizer.convert_ids_to_tokens(ids) for ids in ends)


def check_same_ids(model: MetaEmbedModel, processor: Any) -> None:
    """Raise a `ValueError` unless the chat template gives the ids of `model.processor`, for every kind of input."""
    inputs: list[Any] = ["a red apple", [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]]
    if model.processor.image_processor is not None:
        picture = Image.new("RGB", (64, 48), "red")
        inputs += [{"image": picture, "text": "a red apple"}, picture]
    for side in SIDES:
        for value in inputs:
            for num_meta in (None, 1):
                expected = model.processor.process([value], side, num_meta)["input_ids"][0].tolist()
                item = model.processor.parse([value])[0]
                forms = forms_of(item.messages, list(item.images))
                found = [rendered_ids(processor, form, side, num_meta) for form in forms]
                if expected not in found:
                    raise ValueError(
                        f"the exported chat template gives a {side} other token ids than the model's processor. "
                        f"Expected {expected}, got {found[0]}: its template or tokenizer cannot be exported."
                    )


def forms_of(messages: list[dict[str, Any]], images: list[Image.Image]) -> list[list[dict[str, Any]]]:
    """Return messages as lists of parts with their images, and, where they are text alone, as strings."""
    pending = iter(images)
    filled = [{**message, "content": [fill(part, pending) for part in message["content"]]} for message in messages]
    if images:
        return [filled]
    texts = ["".join(part["text"] for part in message["content"]) for message in messages]
    return [filled, [{**message, "content": text} for message, text in zip(messages, texts, strict=True)]]


def fill(part: dict[str, Any], images: Iterator[Image.Image]) -> dict[str, Any]:
    """Return a part of a message, with the next image where it is the place of one."""
    return {**part, "image": next(images)} if part["type"] == "image" else part


def rendered_ids(processor: Any, messages: list[dict[str, Any]], side: str, num_meta: int | None) -> list[int] | str:
    """Return the ids that transformers makes of messages by the chat template, or the error that it raises."""
    options = {"task": side} if num_meta is None else {"task": side, "num_meta": num_meta}
    try:
        features = processor.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    except Exception as error:  # a template may refuse one form of content with any error
        return repr(error)
    ids = features["input_ids"]
    ids = ids.tolist() if isinstance(ids, torch.Tensor) else ids
    return ids[0] if isinstance(ids[0], list) else ids


def save_native(backbone: PreTrainedModel, folder: Path) -> None:
    """Save a backbone under the names of its generative class, which engines know, without that class's head."""
    cls = generative_class(backbone)
    if cls is None or isinstance(backbone, cls):
        backbone.save_pretrained(folder)
        return
    with torch.device("meta"):
        whole = cls(copy.deepcopy(backbone.config))
    name = next((name for name, module in whole.named_modules() if type(module) is type(backbone)), None)
    if name is None:
        backbone.save_pretrained(folder)
        return
    whole.set_submodule(name, backbone)
    state = {key: value for key, value in whole.state_dict().items() if value.device.type != "meta"}
    whole.config.dtype = backbone.dtype
    whole.save_pretrained(folder, state_dict=state)


def generative_class(backbone: PreTrainedModel) -> type[PreTrainedModel] | None:
    """Return transformers' class that generates text with this backbone, or None if there is none."""
    kind = type(backbone.config)
    for mapping in (transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, transformers.MODEL_FOR_CAUSAL_LM_MAPPING):
        if kind in mapping and type(backbone) is MODEL_MAPPING.get(kind, None):
            return mapping[kind]
    return None


def write_sentence_modules(model: MetaEmbedModel, processor: Any, folder: Path) -> None:
    """Write what makes the folder a `MultiVectorEncoder` of stock modules.

    `MultiVectorMask` keeps only given ids for documents. For queries it can only skip words: all but the Meta Tokens.
    """
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    tokenizer, names = getattr(processor, "tokenizer", processor), {}
    for side in SIDES:
        names[side] = meta_token_names(side, model.config.num_tokens(side))
    others = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])]
    skipped = [token for token in others if token not in set(names["query"])]
    modules: list[nn.Module] = []
    if model.projection is not None:
        linear = model.projection
        options = {"module_input_name": "token_embeddings", "activation_function": nn.Identity()}
        modules.append(Dense(linear.in_features, linear.out_features, **options))
        modules[-1].linear = linear
    keep = tokenizer.convert_tokens_to_ids(names["document"])
    modules.append(MultiVectorMask(skipped, skiplist_tasks=["query"], keep_only_token_ids=keep))
    modules.append(Normalize("token_embeddings"))
    transformer = Transformer(str(folder), model_kwargs={"device_map": "meta"})
    transformer.save_config(str(folder))
    entries = []
    for index, module in enumerate([transformer, *modules]):
        path = f"{index}_{type(module).__name__}" if index else ""
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        entries.append({"idx": index, "name": str(index), "path": path, "type": kind})
        if index:
            (folder / path).mkdir()
            module.save(str(folder / path))
    settings = {"modules.json": entries, "config_sentence_transformers.json": SENTENCE_CONFIG}
    for name, content in settings.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
