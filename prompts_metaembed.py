"""From chat messages to the backbone's prompt, in which a user's text is text and nothing else."""

from __future__ import annotations

import re
from typing import Any

from transformers import AddedToken, PreTrainedTokenizerBase

from .inputs_metaembed import Message, shorten


def tokenizer_of(processor: Any) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a processor, which may be one itself."""
    return processor if isinstance(processor, PreTrainedTokenizerBase) else processor.tokenizer


def special_token_pattern(processor: Any) -> re.Pattern | None:
    """Return what matches any string that means structure and not text to a processor or its tokenizer."""
    tokenizer = tokenizer_of(processor)
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens.update(tokenizer.all_special_tokens)
    # Placeholders that a processor searches for as strings; not all of them are in the vocabulary.
    places = (value for name, value in vars(processor).items() if name.endswith("_token"))
    tokens.update(place for place in places if isinstance(place, (str, AddedToken)))
    strings = (str(token) for token in tokens)
    breakable = sorted((token for token in strings if len(token.strip()) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, breakable))) if breakable else None


def escape(text: str, special_token: re.Pattern | None) -> str:
    """Break every special token that stands literally in a user's text, so that it stays text.

    A space goes after the token's first letter: `<|image_pad|>` becomes `< |image_pad|>`. Otherwise a text that
    quotes a Meta Token or an image placeholder would change the structure of the sequence.
    """
    while special_token and special_token.search(text):
        text = special_token.sub(_broken, text)
    return text


def _broken(match: re.Match) -> str:
    return re.sub(r"^(\s*\S)", r"\1 ", match[0])


def join_texts(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the parts of a message with neighbouring texts as one, in which no token can hide by being split."""
    joined: list[dict[str, Any]] = []
    for part in parts:
        if joined and part["type"] == joined[-1]["type"] == "text":
            part = {"type": "text", "text": joined.pop()["text"] + part["text"]}
        joined.append(part)
    return joined


def cut_text(messages: list[Message], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Message]:
    """Cut the text of one input to its first `max_length` tokens, counted over all its parts.

    Args:
        messages: The messages of one input. Not changed.
        tokenizer: Counts the tokens.
        max_length: Number of tokens of text to keep.

    Returns:
        The messages with the same images and videos and, where the text was longer, less text.
    """
    cut = []
    for message in messages:
        content = []
        for part in message["content"]:
            if part["type"] == "text":
                text, used = _first_tokens(part["text"], tokenizer, max_length)
                max_length -= used
                part = {"type": "text", "text": text}
            content.append(part)
        cut.append({"role": message["role"], "content": content})
    return cut


def _first_tokens(text: str, tokenizer: PreTrainedTokenizerBase, count: int) -> tuple[str, int]:
    if not tokenizer.is_fast:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return (text, len(ids)) if len(ids) <= count else (tokenizer.decode(ids[:count]), count)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    if len(offsets) <= count:
        return text, len(offsets)
    return text[: offsets[count - 1][1]] if count else "", count


def render(processor: Any, messages: list[Message]) -> str:
    """Render messages to the backbone's prompt, through its chat template where it has one.

    Args:
        processor: The backbone's processor or tokenizer.
        messages: Messages whose content is a list of parts. Images and videos become the backbone's placeholders.

    Returns:
        The prompt.

    Raises:
        ValueError: If the chat template leaves out what the messages say.
    """
    owner = processor if getattr(processor, "chat_template", None) else tokenizer_of(processor)
    as_strings = [{**message, "content": _plain(processor, message)} for message in messages]
    if not owner.chat_template:
        return "\n".join(message["content"] for message in as_strings)
    texts = [part["text"].strip() for message in messages for part in message["content"] if part["type"] == "text"]
    media = any(part["type"] != "text" for message in messages for part in message["content"])
    # Templates for text alone expect strings, and render a list of parts as nothing, or as Python writes a list.
    forms = (messages, as_strings) if media or owner is processor else (as_strings, messages)
    for form in forms:
        prompt = owner.apply_chat_template(form, tokenize=False)
        if all(text in prompt for text in texts) and not any(
            str(message["content"]) in prompt for message in messages
        ):
            return prompt
    raise ValueError(
        f"the chat template of {type(owner).__name__} leaves out what the messages say: {shorten(repr(prompt), 1000)}."
    )


def _plain(processor: Any, message: Message) -> str:
    return "".join(
        part["text"] if part["type"] == "text" else getattr(processor, f"{part['type']}_token", "")
        for part in message["content"]
    )
