"""Embed queries and documents with a vLLM server: export a checkpoint, serve it, ask the server.

    python examples/serve_vllm.py CHECKPOINT outputs/plain            export it as a plain backbone
    vllm serve outputs/plain --runner pooling --pooler-config.task token_embed
    python examples/serve_vllm.py --ask outputs/plain --text "a red apple" --num-meta 4

The client needs numpy alone (and pillow for PIL images): copy [`VllmClient`] where you need it. examples/serve_vllm.md
says what vLLM does with such a model, and what it cannot do.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import re
import unicodedata
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np


class VllmClient:
    """Encodes queries and documents with a vLLM server of an exported model.

    The server's chat template appends the Meta Tokens; this asks for the vectors of all tokens (`token_embed`), keeps
    those of the Meta Tokens and normalises them in float32.

    Args:
        url: Address of the server, such as "http://localhost:8000".
        folder: What `export_backbone` wrote, or a copy of its `meta_tokens.json` alone in a folder.
        api_key: What the server was started with, if anything.
        parallel: Requests at a time. vLLM batches them.
        timeout: Seconds to wait for a request.

    Example:
        >>> client = VllmClient("http://localhost:8000", "outputs/plain")
        >>> client.encode_queries(["a red apple"], num_meta=4).shape
        (1, 4, 2048)
    """

    def __init__(
        self, url: str, folder: str | Path, api_key: str | None = None, parallel: int = 16, timeout: float = 600
    ):
        self.url, self.api_key, self.parallel, self.timeout = url.rstrip("/"), api_key, parallel, timeout
        self.meta = json.loads((Path(folder) / "meta_tokens.json").read_text(encoding="utf-8"))
        strings = sorted(self.meta["special_tokens"], key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, strings)) or r"(?!)")
        self._disguised = re.compile(self._special.pattern, re.IGNORECASE)

    def encode_queries(self, inputs: Sequence[Any], num_meta: int | None = None) -> np.ndarray:
        """Encode queries: texts, images, or dicts with "text" and "image" (one or a list of them).

        Args:
            inputs: The queries. An image is a path, the bytes of an image file, or a PIL image.
            num_meta: r, the number of vectors of each. None: all.

        Returns:
            Unit vectors [N, r, D], float32.

        Raises:
            TypeError: If an input or `num_meta` is of the wrong type.
            ValueError: If `num_meta` is out of range, a text holds a special token in disguise, or the server refuses
                an input: with what it said.
        """
        return self._encode("query", inputs, num_meta)

    def encode_documents(self, inputs: Sequence[Any], num_meta: int | None = None) -> np.ndarray:
        """Encode documents: see [`encode_queries`]."""
        return self._encode("document", inputs, num_meta)

    def _encode(self, side: str, inputs: Sequence[Any], num_meta: int | None) -> np.ndarray:
        if isinstance(inputs, (str, bytes, dict)):
            raise TypeError(f"inputs must be a list of queries or documents, got one {type(inputs).__name__}.")
        most = self.meta["num_tokens"][side]
        count = most if num_meta is None else num_meta
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"num_meta must be a whole number, got {num_meta!r}.")
        if not 1 <= count <= most:
            raise ValueError(f"num_meta of a {side} must be between 1 and {most}, got {count}.")
        bodies = [self._body(side, value, count) for value in inputs]  # a bad input is an error before any request
        with ThreadPoolExecutor(self.parallel) as pool:
            rows = list(pool.map(lambda body: self._rows(self._post("/pooling", body), side, count), bodies))
        return np.stack(rows) if rows else np.empty((0, count, self.meta["dim"]), np.float32)

    def _body(self, side: str, value: Any, count: int) -> dict[str, Any]:
        return {
            "task": "token_embed",
            "messages": [{"role": "user", "content": self._content(value)}],
            "chat_template_kwargs": {"task": side, "num_meta": count},
            "encoding_format": "base64",
            "use_activation": False,  # normalised here, in float32
        }

    def _content(self, value: Any) -> str | list[dict[str, Any]]:
        if isinstance(value, str):
            return self.escape(value)
        parts = dict(value) if isinstance(value, dict) else {"image": value}
        text, images = parts.pop("text", None), parts.pop("image", [])
        if parts:
            raise TypeError(f"an input has the keys 'text' and 'image', got {sorted(parts)} too.")
        images = list(images) if isinstance(images, (list, tuple)) else [images]
        content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": as_url(each)}} for each in images]
        return content + ([{"type": "text", "text": self.escape(text)}] if text is not None else [])

    def escape(self, text: str) -> str:
        """Return a user's text with a space in every special token, so that it stays text, as the package does."""
        while self._special.search(text):
            text = self._special.sub(lambda match: match[0][:1] + " " + match[0][1:], text)
        if found := self._disguised.search(unicodedata.normalize("NFKC", text)):
            raise ValueError(
                f"the text holds {found[0]!r}, which a tokenizer may take for a special token: remove it."
            )
        return text

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise ValueError(f"the server refused an input: {error.read().decode(errors='replace')}") from error

    def _rows(self, response: dict[str, Any], side: str, count: int) -> np.ndarray:
        flat = np.frombuffer(base64.b64decode(response["data"][0]["data"]), dtype="<f4")
        vectors = flat.reshape(response["usage"]["prompt_tokens"], -1)  # [L, D]
        if vectors.shape[1] != self.meta["dim"]:
            raise ValueError(f"the server gives {vectors.shape[1]} dimensions instead of {self.meta['dim']}.")
        return meta_rows(vectors, self.meta, side, count)


def meta_rows(vectors: np.ndarray, meta: dict[str, Any], side: str, count: int) -> np.ndarray:
    """Return the unit vectors [count, D] of the Meta Tokens of an input whose tokens have the vectors [L, D].

    Args:
        vectors: What vLLM returned for `token_embed`, of a prompt with `count` Meta Tokens.
        meta: The content of `meta_tokens.json`.
        side: "query" or "document".
        count: The `num_meta` of the prompt.
    """
    appended = count if meta["causal"] else meta["num_tokens"][side]
    end = len(vectors) - meta["tokens_after"]
    rows = vectors[end - appended : end][:count].astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def as_url(image: Any) -> str:
    """Return an image (a path, the bytes of a file, a PIL image) as a data URL: nothing is fetched by the server."""
    if isinstance(image, (str, Path)):
        image = Path(image).read_bytes()
    elif hasattr(image, "save"):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        image = buffer.getvalue()
    if not isinstance(image, bytes):
        raise TypeError(f"an image must be a path, bytes or a PIL image, got {type(image).__name__}.")
    return "data:image;base64," + base64.b64encode(image).decode()


def main(argv: Sequence[str] | None = None) -> None:
    """Export a checkpoint, or ask a server."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", help="folder or Hub id of a MetaEmbed model")
    parser.add_argument("folder", type=Path, help="of the export")
    parser.add_argument("--ask", action="store_true", help="embed --text with a server instead of exporting")
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--text", action="append", default=[])
    parser.add_argument("--side", choices=("query", "document"), default="query")
    parser.add_argument("--num-meta", type=int)
    arguments = parser.parse_args(argv)
    if arguments.ask:
        client = VllmClient(arguments.url, arguments.folder)
        vectors = client._encode(arguments.side, arguments.text, arguments.num_meta)
        print(f"{vectors.shape}: {np.array2string(vectors, precision=3, threshold=20)}")
        return
    if arguments.checkpoint is None:
        parser.error("name the checkpoint to export, or pass --ask")
    from metaembed import MetaEmbedModel
    from metaembed.backbones.export import export_backbone

    print(f"exported to {export_backbone(MetaEmbedModel.from_pretrained(arguments.checkpoint), arguments.folder)}")


if __name__ == "__main__":
    main()
