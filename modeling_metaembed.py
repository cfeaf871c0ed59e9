"""MetaEmbedModel: embeddings are a backbone's last hidden states at Meta Tokens, which are ordinary tokens."""

from __future__ import annotations

import inspect
import shutil
import tempfile
import threading
import weakref
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import CommitInfo, HfApi
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModel, PreTrainedModel
from transformers.utils import ModelOutput, logging

from .configuration_metaembed import MetaEmbedConfig, check_count, of_package
from .inputs_metaembed import Item, is_single
from .loading_metaembed import (
    HUB_ARGUMENTS,
    check_loading,
    check_saves_whole,
    commit_of,
    fill_adapter,
    find_adapter,
    find_file,
    load_with_adapter,
    upcast_adapter,
    write_repository_files,
)
from .processing_metaembed import PROCESSOR_FILE, MetaEmbedProcessor, default_device_cpu
from .scoring_metaembed import Embeddings, maxsim

logger = logging.get_logger(__name__)

# For a model that encodes: how many threads do, and the mode that each of its parts goes back to after the last one.
_ENCODING: weakref.WeakKeyDictionary[nn.Module, list[Any]] = weakref.WeakKeyDictionary()
_MODES = threading.Lock()


@dataclass
class MetaEmbedOutput(ModelOutput):
    """Output of [`MetaEmbedModel`]: unit vectors [N, r, D] in Meta Token order, in float32 or float64."""

    embeddings: Tensor | None = None


class MetaEmbedModel(PreTrainedModel):
    """A vision-language backbone that embeds queries and documents as a chosen number of vectors.

    Implements MetaEmbed (Xiao et al., ICLR 2026, arXiv 2509.18095). Create one from a plain backbone with
    [`from_backbone`]; load a saved one with `from_pretrained`, or `AutoModel.from_pretrained(trust_remote_code=True)`.

    Example:
        >>> queries = model.encode_queries(["a red apple"], num_meta=4)       # [1, 4, D]
        >>> documents = model.encode_documents([Image.open("apple.png")], num_meta=16)  # [1, 16, D]
        >>> model.score(queries, documents)                                   # [1, 1]
    """

    config_class = MetaEmbedConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    _auto_class = "AutoModel"
    supports_gradient_checkpointing = True
    _supports_sdpa = True  # the backbone itself refuses what it does not support
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    _processor: MetaEmbedProcessor | None = None
    commit: str | None = None  # of the Hub repository that the model was loaded from
    _hub_arguments: dict[str, Any] | None = None  # where it was loaded from, for its card; never the Hub's token
    adapter_base: tuple[str | None, str | None] = (None, None)  # Hub id and commit that an adapter must name

    def __init__(self, config: MetaEmbedConfig, backbone: PreTrainedModel | None = None):
        if backbone is None and config.backbone_config is None:
            raise ValueError(
                f"{config._name_or_path or 'the configuration'} is not a MetaEmbed model: it has no backbone_config. "
                "To create a MetaEmbed model from a plain backbone, use MetaEmbedModel.from_backbone."
            )
        config.validate()  # fields may have been overridden since it was made
        super().__init__(config)
        self.backbone = AutoModel.from_config(config.backbone_config) if backbone is None else backbone
        self.projection = None if config.embedding_dim is None else nn.Linear(config.hidden_size, config.embedding_dim)
        dim = config.embedding_dim or config.hidden_size
        self.token_projection = nn.Linear(config.hidden_size, dim) if config.token_projection else None
        parameters = inspect.signature(self.backbone.forward).parameters
        takes_anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        self._takes_use_cache = takes_anything or "use_cache" in parameters
        self._has_head = "logits_to_keep" in parameters
        self.post_init()

    @classmethod
    def from_backbone(cls, backbone: str | Path | PreTrainedModel, **kwargs: Any) -> MetaEmbedModel:
        """Create a model to train from a backbone (Hub id, folder or model): see `backbones.create.from_backbone`."""
        return of_package("backbones.create", "from_backbone", needed=True)(cls, backbone, **kwargs)

    @classmethod
    def from_authors_checkpoint(cls, checkpoint: str | Path, **kwargs: Any) -> MetaEmbedModel:
        """Create a model from the authors' weights (Hub id or folder): see [`backbones.paper_checkpoint.convert`]."""
        return of_package("backbones.paper_checkpoint", "convert", needed=True)(cls, checkpoint, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Load a saved model and its processor, completely or not at all: see transformers' `from_pretrained`.

        Loads adapter repositories too: the base that they name, with the adapter. `is_trainable=True` trains it
        further. `trust_remote_code=True` is trust in this repository; `trusted_base="..."` adds the base's code.

        Raises:
            TypeError: If a field of the configuration is of the wrong type.
            ValueError: If weights are missing, unexpected or of another shape, or the configuration does not fit.
        """
        source, wants_info = pretrained_model_name_or_path, kwargs.pop("output_loading_info", False)
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
        trusted = kwargs.get("trust_remote_code")
        if trusted is None:  # AutoModel does not pass it on, but code of a repository runs only if it was True
            trusted = __name__.startswith("transformers_modules.")
        trust = {"trust_remote_code": trusted, "trusted_base": kwargs.pop("trusted_base", None)}
        if commit := commit_of(source, **hub):
            kwargs["revision"] = hub["revision"] = commit  # of the processor too, whatever is pushed meanwhile
        if source is not None and (adapter := find_adapter(source, **hub)) is not None:
            model = load_with_adapter(cls, source, adapter, hub, {**kwargs, **trust})
            info: dict[str, Any] = {}
        else:
            model, info = cls._load_whole(source, *model_args, **kwargs)
        # Now and not at first use: the folder may be gone by then, or a relative path mean another one.
        if source is not None and model._processor is None and find_file(source, PROCESSOR_FILE, **hub):
            model.processor = MetaEmbedProcessor.from_pretrained(source, **trust, **hub)
        model.commit = commit
        model._hub_arguments = {name: value for name, value in hub.items() if name not in ("token", "force_download")}
        return (model, info) if wants_info else model

    @classmethod
    def _load_whole(cls, source: Any, *args: Any, **kwargs: Any) -> tuple[MetaEmbedModel, dict[str, Any]]:
        """Load a model that is not an adapter, without its processor, and what transformers reports of it."""
        model, info = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)
        check_loading(source or "the state dict", info)
        if source is not None:
            lasting = str(Path(source).absolute()) if Path(source).is_dir() else str(source)  # even after a chdir
            model.name_or_path = model.config._name_or_path = lasting
            model.adapter_base = (model.name_or_path, kwargs.get("revision"))
        return model, info

    def add_adapter(self, adapter_config: Any, adapter_name: str | None = None) -> None:
        """Add a new adapter to train, such as `lora_config(model)`. Its weights are in float32 at least."""
        of_package("training.lora", "import_peft")()
        super().add_adapter(adapter_config, adapter_name)
        upcast_adapter(self)

    def load_adapter(self, peft_model_id: Any = None, adapter_name: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Load an adapter, completely or not at all (else a `ValueError`): see transformers' `load_adapter`."""
        of_package("training.lora", "import_peft")()
        conversions = self.__dict__.get("_weight_conversions")
        info = super().load_adapter(peft_model_id, adapter_name, *args, **kwargs)
        self._weight_conversions = conversions  # else a model saved after merging would get the adapter's names
        upcast_adapter(self)
        if peft_model_id is not None:
            hub = {**(kwargs.get("adapter_kwargs") or {}), **{k: kwargs[k] for k in HUB_ARGUMENTS if k in kwargs}}
            fill_adapter(self, peft_model_id, adapter_name or "default", **hub)
        return info

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Refuse a part of an adapter: peft's own `PeftModel.from_pretrained` would leave the rest random."""
        given = {name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)}
        of_package("training.lora", "check_adapter_whole")(self, given)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @property
    def processor(self) -> MetaEmbedProcessor:
        """The processor: the one saved with the model, or set since."""
        if self._processor is None:
            raise ValueError("this model has no processor, as none was saved with it: set model.processor.")
        return self._processor

    @processor.setter
    def processor(self, processor: MetaEmbedProcessor) -> None:
        processor.config = self.config  # one truth: a default set on the model's configuration holds for both
        processor.check()
        self._processor = processor

    policy = property(
        lambda self: self.processor.policy,
        lambda self, policy: setattr(self.processor, "policy", policy),
        doc="What may be read and fetched for an input, an [`InputPolicy`]. Not saved.",
    )

    def save_pretrained(self, save_directory: str | Path, *, model_card: bool = True, **kwargs: Any) -> None:
        """Save a folder that is a complete Hub repository, loadable without this package.

        If the model is sharded over several processes (FSDP), call this in all of them: the first one writes.

        Args:
            save_directory: Folder to write to.
            model_card: Whether to write a card, if the package is installed. One that a person wrote is kept.
            **kwargs: For transformers' `save_pretrained`. With `push_to_hub=True`, also for [`push_to_hub`].

        Raises:
            ValueError: If what is saved would not load (or TypeError, for a field's type): nothing is written.
        """
        folder = Path(save_directory)
        push, name = kwargs.pop("push_to_hub", False), kwargs.pop("repo_id", folder.name)
        hub = {key: kwargs.pop(key) for key in ("private", "revision", "create_pr", "commit_message") if key in kwargs}
        check_saves_whole(self, folder, publish=push)
        state, weights = kwargs.pop("state_dict", None), self.state_dict()
        wrapped = any("_orig_mod." in key or hasattr(value, "full_tensor") for key, value in weights.items())
        plain = of_package("training.saving", "plain_weights", True)(self, state) if wrapped else nullcontext(state)
        with plain as state:
            state = state and {key.replace("_orig_mod.", ""): value for key, value in state.items()}
            # Not under the older names of some backbones' checkpoints: transformers finds none inside another model.
            super().save_pretrained(folder, **{"save_original_format": False, "state_dict": state, **kwargs})
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        first = not distributed or torch.distributed.get_rank() == 0
        if first and kwargs.get("is_main_process", True):
            write_repository_files(folder, self)
            self.processor.save_pretrained(folder)
            if model_card:
                of_package("cards", "write_card")(self, folder, name)
        if push and first:
            self.push_to_hub(name, token=kwargs.get("token"), state_dict=state, **hub)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, revision: str | None = None, **kwargs: Any
    ) -> CommitInfo:
        """Save the model to a repository of the Hub, where Python files of older versions are deleted.

        Takes arguments of transformers' `push_to_hub` and of [`save_pretrained`]. The repository and the branch
        (`revision`) are created if they do not exist, the latter except for a pull request to it.

        Raises:
            ValueError: If the model cannot be saved, or is an adapter that names a folder of this machine.
        """
        check_saves_whole(self, None, publish=True)
        api = HfApi(token=kwargs.pop("token", None))
        commit: dict[str, Any] = {"commit_message": f"Upload {type(self).__name__}"}
        commit |= {name: kwargs.pop(name) for name in ("create_pr", *commit, "commit_description") if name in kwargs}
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not commit.get("create_pr") and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            if api.file_exists(repo_id, "README.md", revision=revision):  # saving keeps what a person wrote
                shutil.copy(api.hf_hub_download(repo_id, "README.md", revision=revision), folder)
            self.save_pretrained(folder, repo_id=repo_id, **kwargs)
            stale = ["*_metaembed.py", "kernels_metaembed.*"]  # what is not uploaded now
            commit |= {"revision": revision, "delete_patterns": stale}
            return api.upload_folder(repo_id=repo_id, folder_path=folder, **commit)

    def to_sentence_transformers(self, **kwargs: Any) -> Any:
        """Return this model as a sentence-transformers `MultiVectorEncoder`: see `to_multi_vector_encoder`."""
        from .sentence_metaembed import to_multi_vector_encoder

        return to_multi_vector_encoder(self, **kwargs)

    def forward(
        self, input_ids: Tensor, num_meta: int | None = None, return_dict: bool | None = None, **kwargs: Any
    ) -> MetaEmbedOutput | tuple[Tensor]:
        """Return the embeddings [N, r, D] of a batch of model inputs, whose side the input ids tell.

        `torch.export` and `torch.compile(fullgraph=True)` need `num_meta`; too few Meta Tokens give NaN then.

        Args:
            input_ids: Token ids [N, L], each row with the same number of Meta Tokens.
            num_meta: Return only the first `num_meta` vectors. None: all that the ids ask for.
            return_dict: False: return a tuple.
            **kwargs: What else the processor returned (`attention_mask`, ...), and `tokens`. True: the vectors of own
                tokens follow, [N, r + T, D], then zeros where an input has fewer; a number: pooled, without gradients.

        Raises:
            TypeError: If `num_meta` is not a whole number.
            ValueError: If the rows hold no Meta Tokens, or different numbers of them, or fewer than `num_meta`.
        """
        embeddings = self.embed(input_ids, num_meta, **kwargs)
        return (embeddings,) if return_dict is False else MetaEmbedOutput(embeddings=embeddings)

    def embed(self, input_ids: Tensor, num_meta: int | None = None, **kwargs: Any) -> Tensor:
        """Return the unit vectors [N, r, D] of the Meta Tokens of the side that the ids show: see [`forward`]."""
        tokens, (is_meta, num_meta) = kwargs.pop("tokens", False), self._meta_tokens(input_ids, num_meta)
        # A stable sort puts the Meta Tokens first, in order: [N, r], and no shape depends on data.
        positions = is_meta.int().argsort(dim=1, descending=True, stable=True)[:, :num_meta]
        for name, value in kwargs.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                kwargs[name] = value.to(self.backbone.dtype)
        hidden = self._last_hidden_state(input_ids, **kwargs)  # [N, L, hidden]
        meta = unit_vectors(hidden, positions, self.projection)
        if torch.compiler.is_compiling():
            meta = meta.masked_fill(~is_meta.gather(1, positions).unsqueeze(-1), torch.nan)
        if not tokens:
            return meta
        if self.token_projection is None:
            raise ValueError("this model gives no vectors of tokens: from_backbone made it without token_projection.")
        is_own = self._own_tokens(input_ids, kwargs.get("attention_mask"))
        longest = None if torch.compiler.is_compiling() else max(1, int(is_own.sum(dim=1).max()))
        positions = is_own.int().argsort(dim=1, descending=True, stable=True)[:, :longest]
        own = unit_vectors(hidden, positions, self.token_projection) * is_own.gather(1, positions).unsqueeze(-1)
        if tokens is not True:
            own = of_package("retrieval.pooling", "pool_padded", needed=True)(own, tokens)
        return torch.cat([meta, own], dim=1)

    def _meta_tokens(self, input_ids: Tensor, num_meta: int | None) -> tuple[Tensor, int]:
        """Return where the Meta Tokens are [N, L], the document's if there are any, else the query's, and how many."""
        sides = (self.config.query_token_ids, self.config.document_token_ids)
        query, document = ((input_ids >= ids[0]) & (input_ids <= ids[-1]) for ids in sides)
        is_meta = torch.where(document.any(), document, query)
        if num_meta is not None and torch.compiler.is_compiling():
            return is_meta, num_meta
        counts = is_meta.sum(dim=1)  # [N]
        if (counts != counts[0]).any() or counts[0] == 0:
            raise ValueError(
                f"each row of input_ids must hold the same number of Meta Tokens of one side, got {counts.tolist()}. "
                "Make the inputs with model.processor.process_queries or process_documents."
            )
        most = int(counts[0])
        return is_meta, most if num_meta is None else check_count("num_meta", num_meta, most)

    def _own_tokens(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Return where tokens [N, L] are the input's own: not padding, Meta Tokens or the ends of its template."""
        is_own = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        for ids in (self.config.query_token_ids, self.config.document_token_ids):
            is_own = is_own & ((input_ids < ids[0]) | (input_ids > ids[-1]))
        (before, after), place = self.config.template_tokens, is_own.cumsum(dim=1)
        return is_own & (place > before) & (place <= place[:, -1:] - after)

    def _last_hidden_state(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        """Run the backbone, with or without a head, on ids [N, L]; return its last hidden states [N, L, hidden]."""
        name, length = type(self.backbone).__name__, input_ids.shape[1]
        longest = getattr(self.backbone.config.get_text_config(), "max_position_embeddings", None)
        if longest and length > longest:
            advice = "Cut its text with `max_length`, or make its images smaller."
            raise ValueError(f"an input is {length} tokens long, and {name} takes at most {longest}. {advice}")
        if self._takes_use_cache:
            inputs["use_cache"] = False  # nothing is generated
        if self._has_head:
            inputs.update(output_hidden_states=True, logits_to_keep=1)  # spare the logits
        output = self.backbone(input_ids=input_ids, **inputs)
        hidden = output.hidden_states[-1] if self._has_head else output.last_hidden_state
        if hidden.shape[:2] != input_ids.shape:
            shapes = f"{tuple(hidden.shape)} for input ids of shape {tuple(input_ids.shape)}"
            raise ValueError(f"{name} returned hidden states of shape {shapes}: none for some tokens.")
        return hidden

    def encode_queries(self, inputs: Any, num_meta: int | None = None, **kwargs: Any) -> Any:
        """Encode queries as `num_meta` vectors each. While any thread encodes, the whole model is in evaluation mode.

        Args:
            inputs: One query or a list (any sequence, column or generator) of them. A query is
                - a string, which is always text, be it empty or the name of a file;
                - an image: PIL, `pathlib.Path`, `bytes`, an open file, or array or tensor [height, width(, channels)];
                - a recording as {"array": ..., "sampling_rate": ...};
                - a dict with "text", "image", "video" and/or "audio", one or a list of each, by path or URL too;
                - chat messages, `[{"role": "user", "content": [...]}]`, which may interleave all of these.
            num_meta: r, the number of vectors of each, 1..R_q. None: the configuration's default, else all.
            **kwargs: For this call, as keywords
                - `instruction`: text put before each input, on a line of its own. None: the configuration's; "": none;
                - `batch_size`: the most inputs in a forward pass, 32;
                - `batch_tokens`: the most tokens in one, padding included (by the package), and any number of inputs;
                - `workers`: threads of the package that read and process the next batches meanwhile. None: 1 or 2;
                - `devices`: a list of devices to encode on together, with a copy of the model on each, by the package;
                - `show_progress_bar`: None: if transformers' log level is INFO or lower;
                - `convert_to_numpy`: return a numpy array instead of a tensor;
                - `tokens`: return [`Embeddings`] `(meta, tokens)`, with the vectors of each input's own tokens too:
                  all (True), or pooled to so many, every first few of which are a summary (by the package);
                - `max_length`, `max_seconds`: keep only so many tokens of each input's own text, and so many seconds
                  of each recording, from the start. None: all;
                - `policy`, an [`InputPolicy`], and options of the backbone's processor (`max_pixels`, ...).

        Returns:
            Unit vectors [N, r, D], float32, on the CPU, in the inputs' order; [r, D] for one; [0, r, D] for none.

        Raises:
            TypeError: If an input or `num_meta` is of the wrong type.
            ValueError: If a number is out of range, or an input, named by its place, gives no finite embedding.

        Example:
            >>> model.encode_queries("a red apple", num_meta=4).shape
            torch.Size([4, 64])
        """
        return self._encode("query", inputs, num_meta, **kwargs)

    def encode_documents(self, inputs: Any, num_meta: int | None = None, **kwargs: Any) -> Any:
        """Encode documents as `num_meta` vectors each, 1..R_c: see [`encode_queries`], which takes the same inputs."""
        return self._encode("document", inputs, num_meta, **kwargs)

    def stream_queries(self, inputs: Any, num_meta: int | None = None, **kwargs: Any) -> Iterator[Any]:
        """Encode queries that an iterator gives: see `encoding.stream.stream` of the package."""
        return of_package("encoding.stream", "stream", needed=True)(self, "query", inputs, num_meta, **kwargs)

    def stream_documents(self, inputs: Any, num_meta: int | None = None, **kwargs: Any) -> Iterator[Any]:
        """Encode documents that an iterator gives: yield what [`encode_documents`] returns, by `chunk_size` inputs."""
        return of_package("encoding.stream", "stream", needed=True)(self, "document", inputs, num_meta, **kwargs)

    def _encode(self, side: str, inputs: Any, num_meta: int | None, *, tokens: Any = False, **kwargs: Any) -> Any:
        to_numpy = kwargs.pop("convert_to_numpy", False)
        num_meta, items = self.processor.resolve_num_meta(side, num_meta), self.processor.parse(inputs)
        with closing(self._run(side, [items], num_meta, tokens=tokens, total=len(items), **kwargs)) as results:
            encoded = self._collect(side, len(items), num_meta, results, tokens, to_numpy)
        if not is_single(inputs):
            return encoded
        return Embeddings(*(part[0] for part in encoded)) if tokens else encoded[0]

    def _run(
        self, side: str, chunks: Iterable[list[Item]], num_meta: int, *, tokens: int | bool, **kwargs: Any
    ) -> Generator[tuple[list[int], Tensor], None, None]:
        """Encode chunks of inputs: yield where the inputs of each batch are in their chunk, and rows [n, r + T, D]."""
        batch_size, total = kwargs.pop("batch_size", None), kwargs.pop("total", None)
        if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
            raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size!r}.")
        if (shows := kwargs.pop("show_progress_bar", None)) is None:
            shows = logger.getEffectiveLevel() <= logging.INFO
        ways = {name: kwargs.pop(name) for name in ("batch_tokens", "workers", "devices") if name in kwargs}

        def process(items: list[Item], indices: list[int]) -> Any:
            return self.processor.process(items, side, num_meta, indices=indices, **kwargs)

        @torch.no_grad()
        def compute(features: Any, indices: list[int], model: MetaEmbedModel = self) -> Tensor:
            with model._evaluating(), default_device_cpu():
                inputs = {**features.to(execution_device(model)), "num_meta": num_meta, "tokens": tokens}
                return check_finite(model(**inputs).embeddings.to("cpu", torch.float32), indices)

        def plainly() -> Generator[tuple[list[int], Tensor], None, None]:
            (items,), size = chunks, batch_size or 32  # several are of a stream, which is the package's
            for group in self.processor.group(items):
                group.sort(key=lambda i: (items[i].num_images, items[i].text_length), reverse=True)  # to pad little
                for places in (group[start : start + size] for start in range(0, len(group), size)):
                    yield places, compute(process([items[i] for i in places], places), places)

        run = of_package("encoding.run", "run", needed=bool(ways))
        results = run(self, chunks, process, compute, kwargs.get("policy"), batch_size, **ways) or plainly()
        with tqdm(desc=f"Encoding ({side})", total=total, disable=not shows) as bar, closing(results):
            for places, rows in results:
                bar.update(len(places))
                yield places, rows

    def _collect(
        self, side: str, count: int, num_meta: int, results: Any, tokens: int | bool = False, to_numpy: bool = False
    ) -> Tensor | np.ndarray | Embeddings:
        """Return the embeddings of `count` inputs, of which `results` gives places and rows."""
        dim = self.config.embedding_dim or self.config.hidden_size
        embeddings = torch.empty(count, num_meta, dim, dtype=torch.float32, device="cpu")
        own = [embeddings[:0, 0]] * count  # the vectors [T, D] of each input's tokens
        for places, rows in results:
            embeddings[places] = rows[:, :num_meta]
            for place, vectors in zip(places, rows[:, num_meta:], strict=True) if tokens else ():
                own[place] = vectors[: max(1, int(vectors.any(dim=1).sum()))].clone()  # or it keeps the whole batch
        # What fills up changes no score: a query's zeros match nothing, a document's own vectors again no better.
        fill = torch.arange(max(map(len, own), default=0) if tokens is True else tokens, device="cpu")
        own = [rows[fill % len(rows)] for rows in own] if side == "document" and tokens else own
        parts = [embeddings, nn.utils.rnn.pad_sequence([*own, embeddings[:0, 0]], batch_first=True)[:-1]]
        parts = [part.numpy() for part in parts] if to_numpy else parts
        return Embeddings(*parts) if tokens else parts[0]

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Put the model in evaluation mode until the last thread that encodes has ended."""
        with _MODES:
            state = _ENCODING.setdefault(self, [0, {module: module.training for module in self.modules()}])
            state[0] += 1
            self.eval()
        try:
            yield
        finally:
            with _MODES:
                state[0] -= 1
                modes = {} if state[0] else _ENCODING.pop(self)[1]
                for module, mode in modes.items():  # parents first: a frozen tower in evaluation mode stays so
                    if module.training != mode:
                        module.train(mode)

    score = staticmethod(maxsim)


def unit_vectors(hidden: Tensor, positions: Tensor, projection: nn.Module | None) -> Tensor:
    """Return hidden states [N, L, hidden] at positions [N, r], projected, as unit vectors [N, r, D]."""
    vectors = hidden.gather(1, positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
    if projection is not None:
        vectors = projection(vectors.to(projection.weight.dtype))
    # At least float32: normalising and scoring in bfloat16 costs about 5% of nDCG.
    return nn.functional.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=-1)


def check_finite(embeddings: Tensor, indices: list[int]) -> Tensor:
    """Return embeddings [N, r, D] of the inputs `indices`, or raise a `ValueError` if one holds NaN or infinity."""
    for index, whole in zip(indices, embeddings.isfinite().flatten(1).all(dim=1).tolist(), strict=True):
        if not whole:
            advice = "in the weights and in the processor's image_mean and image_std; try bfloat16 for float16"
            raise ValueError(f"input {index}: its embedding is not finite. Look for NaN {advice}.")
    return embeddings


def execution_device(model: nn.Module) -> torch.device:
    """Return the device that takes the inputs: with offloading by accelerate, that of its first hook."""
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    devices = (getattr(each, "execution_device", None) for hook in hooks for each in getattr(hook, "hooks", [hook]))
    return torch.device(next((device for device in devices if device is not None), model.device))
