"""MetaEmbedModel: from model inputs that hold Meta Tokens to embeddings, for any backbone.

The Meta Tokens are ordinary tokens of the vocabulary. The backbone runs untouched on ordinary `input_ids`, and the
embedding is what its last layer says where the ids are Meta Tokens.

transformers carries a checkpoint's files along by lines such as the next one, wherever they stand:
from .sentence_metaembed import MetaEmbedTransformer
"""

from __future__ import annotations

import inspect
import tempfile
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import CommitInfo, HfApi
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModel, PreTrainedModel
from transformers.utils import ModelOutput, cached_file, logging

from .cards.card import is_ours, write_repository_files
from .configuration_metaembed import MetaEmbedConfig, check_count
from .inputs_metaembed import InputPolicy, Item, is_single
from .loading_metaembed import (
    HUB_ARGUMENTS,
    check_adapter_whole,
    check_loading,
    check_saves_whole,
    commit_of,
    fill_adapter,
    find_adapter,
    gather_weights,
    lasting_name,
    load_with_adapter,
    name_base,
    upcast_adapter,
)
from .processing_metaembed import MetaEmbedProcessor, default_device_cpu
from .scoring_metaembed import maxsim

logger = logging.get_logger(__name__)

# How many threads encode with a model now, and the mode that each of its parts goes back to when the last one ends.
_ENCODING: weakref.WeakKeyDictionary[nn.Module, tuple[int, dict[nn.Module, bool]]] = weakref.WeakKeyDictionary()
_MODES = threading.Lock()


@dataclass
class MetaEmbedOutput(ModelOutput):
    """Output of [`MetaEmbedModel`].

    Args:
        embeddings: Unit vectors [N, r, D] in Meta Token order; float32, or float64 where the model is.
    """

    embeddings: Tensor | None = None


class MetaEmbedModel(PreTrainedModel):
    """A vision-language backbone that embeds queries and documents as a chosen number of vectors.

    Implements MetaEmbed (Xiao et al., ICLR 2026, arXiv 2509.18095). Make one of a plain backbone with
    [`from_backbone`]; load a saved one with `from_pretrained`, or with `AutoModel.from_pretrained(...,
    trust_remote_code=True)`.

    Args:
        config: The configuration.
        backbone: The backbone to use. None: one is built from the configuration.

    Example:
        >>> model = AutoModel.from_pretrained("you/your-metaembed", trust_remote_code=True)
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
    _hub_arguments: dict[str, Any] | None = None  # where the model came from, and its processor will come from
    adapter_base: tuple[str | None, str | None] = (None, None)  # Hub id and commit that an adapter must name

    def __init__(self, config: MetaEmbedConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config)
        self.backbone = AutoModel.from_config(config.backbone_config) if backbone is None else backbone
        self.projection = None if config.embedding_dim is None else nn.Linear(config.hidden_size, config.embedding_dim)
        self.post_init()

    # -- Making, loading and saving

    @classmethod
    def from_backbone(
        cls,
        backbone: str | Path | PreTrainedModel,
        *,
        processor: Any = None,
        num_query_tokens: int = 16,
        num_document_tokens: int = 64,
        embedding_dim: int | None = None,
        budgets: list | None = None,
        document_sees_query_tokens: bool = False,
        query_instruction: str | None = None,
        document_instruction: str | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> MetaEmbedModel:
        """Make a MetaEmbed model of a plain backbone: new Meta Tokens, ready to be trained.

        Adds the Meta Tokens to a copy of the tokenizer and to the backbone's input embedding, and measures what the
        backbone does with its inputs. A retriever that is trained already (ColPali, ColQwen2, an embedding model) is a
        backbone too: its weights are kept, and so is its projection where `embedding_dim` is the projection's.

        Args:
            backbone: Hub id or folder of the backbone, or a loaded model (changed in place; then give `processor`).
            processor: The backbone's processor (or tokenizer), where `backbone` is a loaded model.
            num_query_tokens: R_q.
            num_document_tokens: R_c.
            embedding_dim: Dimension D of the vectors. None: the backbone's hidden size, with no projection.
            budgets: `(r_q, r_c)` pairs that training covers. None: the paper's, cut to the sizes.
            document_sees_query_tokens: True for the layout of the paper's own code.
            query_instruction: Instruction put before every query where a call names none.
            document_instruction: Instruction put before every document where a call names none.
            seed: Seed of the first values of the Meta Tokens and the projection.
            **kwargs: For `AutoModel.from_pretrained` (`dtype`, `revision`, `attn_implementation`, `device_map`,
                `trust_remote_code`, ...).

        Returns:
            The model, in evaluation mode, with its processor as `model.processor`.

        Raises:
            TypeError: If `backbone` is neither a name nor a model, or a keyword means nothing.
            ValueError: If a weight is missing from the checkpoint, or has a place neither in the backbone nor in a
                head, there is no processor or it takes no new tokens, the sizes and budgets do not fit, or such a
                model cannot be a backbone: with the reason.

        Example:
            >>> model = MetaEmbedModel.from_backbone("Qwen/Qwen2.5-VL-3B-Instruct", dtype=torch.bfloat16)
        """
        from .backbones.create import from_backbone

        return from_backbone(
            cls,
            backbone,
            processor=processor,
            num_query_tokens=num_query_tokens,
            num_document_tokens=num_document_tokens,
            embedding_dim=embedding_dim,
            budgets=budgets,
            document_sees_query_tokens=document_sees_query_tokens,
            query_instruction=query_instruction,
            document_instruction=document_instruction,
            seed=seed,
            **kwargs,
        )

    @classmethod
    def from_authors_checkpoint(cls, checkpoint: str | Path, **kwargs: Any) -> MetaEmbedModel:
        """Make a model of weights trained with the paper's own code.

        Args:
            checkpoint: Hub id or folder of their weights: a full state dict, or a PEFT adapter.
            **kwargs: See [`backbones.paper_checkpoint.convert`]: `base`, `adapter`, `num_query_tokens`, `revision`,
                `base_revision`, ...

        Returns:
            The model, in their layout: a document's Meta Tokens follow the query ones.

        Raises:
            TypeError: If a keyword means nothing.
            ValueError: If a weight of theirs finds no place or is not what it should be, or a weight of the backbone
                is missing.

        Example:
            >>> model = MetaEmbedModel.from_authors_checkpoint("their/adapter", base="Qwen/Qwen2.5-VL-3B-Instruct")
        """
        from .backbones.paper_checkpoint import convert

        return convert(cls, checkpoint, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Load a saved model, whole or not at all. Takes what transformers' `from_pretrained` takes.

        Loads adapter repositories too: the backbone that they name, and the adapter on it. With `is_trainable=True`,
        to train it further.

        Raises:
            ValueError: If a weight is missing from the checkpoint, of another shape, or without a place in the model.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        source = pretrained_model_name_or_path
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
        if source is not None and (adapter := find_adapter(source, **hub)) is not None:
            model, info = load_with_adapter(cls, source, adapter, hub, **kwargs), {}
        else:
            model, info = super().from_pretrained(source, *model_args, output_loading_info=True, **kwargs)
            check_loading(source, info)
            model.adapter_base = (lasting_name(source), commit_of(source, **hub))
        trusted = kwargs.get("trust_remote_code")
        if trusted is None:  # AutoModel keeps the answer to itself; but where a repository's code runs, it was yes
            trusted = __name__.startswith("transformers_modules.")
        model._hub_arguments = {**hub, "revision": commit_of(source, **hub), "trust_remote_code": trusted}
        return (model, info) if wants_info else model

    def add_adapter(self, adapter_config: Any, adapter_name: str | None = None) -> None:
        """Add a fresh adapter to train, such as [`lora_config`]'s. Its weights are in float32 at least."""
        super().add_adapter(adapter_config, adapter_name)
        upcast_adapter(self)

    def load_adapter(self, peft_model_id: str | None = None, adapter_name: str | None = None, *args, **kwargs):
        """Load an adapter onto this model, whole or not at all. Takes what transformers' `load_adapter` takes.

        Raises:
            ValueError: If a trained part is missing from the adapter, or not in the model.
        """
        conversions = self.__dict__.get("_weight_conversions")
        info = super().load_adapter(peft_model_id, adapter_name, *args, **kwargs)
        self._weight_conversions = conversions  # else a model saved after merging would get the adapter's names
        upcast_adapter(self)
        if peft_model_id is not None:
            hub = {**(kwargs.get("adapter_kwargs") or {}), **{k: kwargs[k] for k in HUB_ARGUMENTS if k in kwargs}}
            fill_adapter(self, peft_model_id, adapter_name or "default", **hub)
        return info

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        """Refuse a part of an adapter: peft's own `PeftModel.from_pretrained` would leave the rest at random."""
        check_adapter_whole(self, {name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @property
    def commit(self) -> str | None:
        """The commit of the Hub repository that the model was loaded from, or None where it was not."""
        return (self._hub_arguments or {}).get("revision")

    @property
    def earlier_card(self) -> str | None:
        """The model card of where the model was loaded from, or None where there is none, or not any more."""
        if self._hub_arguments is None:
            return None
        hub = {name: value for name, value in self._hub_arguments.items() if name in HUB_ARGUMENTS}
        try:
            path = cached_file(
                self.config._name_or_path, "README.md", _raise_exceptions_for_missing_entries=False, **hub
            )
        except OSError:
            return None
        return None if path is None else Path(path).read_text(encoding="utf-8")

    @property
    def processor(self) -> MetaEmbedProcessor:
        """The processor, loaded at first use from where the model came from: the same repository and commit."""
        if self._processor is None:
            where = self.config._name_or_path
            if not where:
                raise ValueError("this model was not loaded from anywhere, so has no processor: set model.processor.")
            processor = MetaEmbedProcessor.from_pretrained(where, **(self._hub_arguments or {}))
            self.processor = processor
            return processor
        return self._processor

    @processor.setter
    def processor(self, processor: MetaEmbedProcessor) -> None:
        processor.config = self.config  # one truth: a default set on the model's configuration holds for both
        self._processor = processor

    @property
    def policy(self) -> InputPolicy:
        """What may be read and fetched for an input: see [`InputPolicy`]. Not saved."""
        return self.processor.policy

    @policy.setter
    def policy(self, policy: InputPolicy) -> None:
        self.processor.policy = policy

    def save_pretrained(self, save_directory: str | Path, *, model_card: bool = True, **kwargs: Any) -> None:
        """Save a folder that is a complete Hub repository, loadable without this package.

        Writes the weights (safetensors), the configuration, the processor, the Python files, the files of
        sentence-transformers, and a model card where there is none that a person wrote. Of a model that is sharded
        over several processes (FSDP), call it in all of them: they gather the weights, and the first one writes.

        Args:
            save_directory: Folder to write to.
            model_card: Whether to write the card.
            **kwargs: For transformers' `save_pretrained`. With `push_to_hub=True`, also for [`push_to_hub`].
        """
        folder = Path(save_directory)
        push, name = kwargs.pop("push_to_hub", False), kwargs.pop("repo_id", folder.name)
        hub = {key: kwargs.pop(key) for key in ("private", "revision", "create_pr", "commit_message") if key in kwargs}
        check_saves_whole(self, folder)
        if kwargs.get("state_dict") is None:
            kwargs["state_dict"] = gather_weights(self)
        # Under the names of the modules: transformers would write the older names that some backbones have in their
        # own checkpoints, and does not find them again inside another model.
        super().save_pretrained(folder, **{"save_original_format": False, **kwargs})
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        first = not distributed or torch.distributed.get_rank() == 0
        if first and kwargs.get("is_main_process", True):
            if self._hf_peft_config_loaded:
                self.config.save_pretrained(folder)
                name_base(folder, self.adapter_base)
            self.processor.save_pretrained(folder)
            write_repository_files(folder, self, repository=name if model_card else None)
        if push and first:
            self.push_to_hub(name, token=kwargs.get("token"), state_dict=kwargs["state_dict"], **hub)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | bool | None = None,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        commit_description: str | None = None,
        **kwargs: Any,
    ) -> CommitInfo:
        """Save the model, whole, to a repository of the Hub. A model card that a person wrote is kept.

        Args:
            repo_id: Where to; made if it does not exist.
            token: Of the Hub.
            private: Whether a new repository is private.
            revision: Branch; made if it does not exist, but for a pull request to it.
            create_pr: Whether to open a pull request instead.
            commit_message: Title of the commit.
            commit_description: Its text.
            **kwargs: For [`save_pretrained`].

        Returns:
            The commit.
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        keep = None
        if api.file_exists(repo_id, "README.md", revision=revision):
            card = Path(api.hf_hub_download(repo_id, "README.md", revision=revision))
            keep = None if is_ours(card.read_text(encoding="utf-8")) else ["README.md"]
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, repo_id=repo_id, **kwargs)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                ignore_patterns=keep,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                commit_description=commit_description,
            )

    def get_input_embeddings(self) -> nn.Module:
        """Return the backbone's input embedding, which holds the Meta Tokens."""
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the backbone's input embedding."""
        self.backbone.set_input_embeddings(value)

    # -- From model inputs to embeddings -------------------------------------------------------------------------

    def forward(self, input_ids: Tensor, num_meta: int | None = None, **kwargs: Any) -> MetaEmbedOutput:
        """Embed a batch of model inputs. Which side it is, the input ids say.

        Args:
            input_ids: Token ids [N, L], each row holding the same number of Meta Tokens.
            num_meta: Keep only the first `num_meta` vectors. None: all that the ids ask for.
            **kwargs: Whatever else the processor returned (`attention_mask`, `pixel_values`, ...).

        Returns:
            The embeddings [N, r, D].

        Raises:
            TypeError: If `num_meta` is not a whole number.
            ValueError: If the rows hold no Meta Tokens, or different numbers of them, or fewer than `num_meta`.
        """
        kwargs.pop("return_dict", None)
        embeddings = self.embed(input_ids=input_ids, **kwargs)  # [N, R, D]
        if num_meta is not None:
            embeddings = embeddings[:, : check_count("num_meta", num_meta, embeddings.shape[1])]  # [N, r, D]
        return MetaEmbedOutput(embeddings=embeddings)

    def embed(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        """Return the unit vectors [N, R, D] of all Meta Tokens of the side that the ids show."""
        positions = self._meta_positions(input_ids)  # [N, R]
        for name, value in kwargs.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                kwargs[name] = value.to(self.backbone.dtype)
        hidden = last_hidden_state(self.backbone, input_ids, **kwargs)  # [N, L, hidden]
        meta = hidden.gather(1, positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))  # [N, R, hidden]
        if self.projection is not None:
            meta = self.projection(meta.to(self.projection.weight.dtype))  # [N, R, D]
        # At least float32: normalising and scoring in bfloat16 costs about 5% of nDCG.
        meta = meta.to(torch.promote_types(meta.dtype, torch.float32))
        return nn.functional.normalize(meta, dim=-1)

    def _meta_positions(self, input_ids: Tensor) -> Tensor:
        """Find the Meta Tokens [N, R] of the side: the document's if there are any, else the query's."""
        for ids in (self.config.document_token_ids, self.config.query_token_ids):
            is_meta = (input_ids >= ids[0]) & (input_ids <= ids[-1])  # [N, L]
            counts = is_meta.sum(dim=1)  # [N]
            if counts.any():
                break
        if (counts != counts[0]).any() or counts[0] == 0:
            raise ValueError(
                f"each row of input_ids must hold the same number of Meta Tokens of one side, got {counts.tolist()}. "
                "Make the inputs with model.processor.process_queries or process_documents."
            )
        return is_meta.nonzero()[:, 1].reshape(len(input_ids), -1)  # in order: nonzero goes row by row

    # -- From anything to embeddings -----------------------------------------------------------------------------

    def encode_queries(
        self,
        inputs: Any,
        num_meta: int | None = None,
        *,
        instruction: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        convert_to_numpy: bool = False,
        **kwargs: Any,
    ) -> Tensor | np.ndarray:
        """Encode queries as `num_meta` vectors each.

        Args:
            inputs: One query or a list (any sequence, column or generator) of them. A query is
                - a string, which is always text, be it empty or the name of a file;
                - an image: a PIL image, a `pathlib.Path`, `bytes`, an open file, or an array or tensor [height,
                  width(, channels)];
                - a dict with "text", "image" and/or "video", one or a list of each, where images and videos may also
                  be paths and URLs as strings: `{"image": "https://...", "text": "..."}`;
                - chat messages, `[{"role": "user", "content": [...]}]`, which may interleave all of these.
            num_meta: r, the number of vectors of each, 1..R_q. None: the configuration's default, else all.
            instruction: Text put before each input, on a line of its own. None: the configuration's default; "": none.
            batch_size: Number of inputs in a forward pass.
            show_progress_bar: Whether to show one. None: if transformers' log level is INFO or lower.
            convert_to_numpy: Return a numpy array instead of a tensor.
            **kwargs: `max_length`, to keep only so many tokens of each input's own text, from its start (None: nothing
                is cut); `policy`, an [`InputPolicy`] for this call; and options of the backbone's processor, for this
                call only (`max_pixels`, ...).

        Returns:
            Unit vectors [N, r, D], float32, on the CPU, in the order of the inputs; [r, D] for one input; [0, r, D]
            for an empty list.

        Raises:
            TypeError: If an input or `num_meta` is of the wrong type.
            ValueError: If an input cannot be read or its embedding is not finite (the error names it by its place), or
                a number is out of range.

        Several threads may encode at once. Until the last one ends, the whole model is in evaluation mode.

        Example:
            >>> model.encode_queries("a red apple", num_meta=4).shape
            torch.Size([4, 64])
        """
        return self._encode(
            inputs, "query", num_meta, instruction, batch_size, show_progress_bar, convert_to_numpy, **kwargs
        )

    def encode_documents(
        self,
        inputs: Any,
        num_meta: int | None = None,
        *,
        instruction: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        convert_to_numpy: bool = False,
        **kwargs: Any,
    ) -> Tensor | np.ndarray:
        """Encode documents as `num_meta` vectors each, 1..R_c: see [`encode_queries`], which takes the same inputs."""
        return self._encode(
            inputs, "document", num_meta, instruction, batch_size, show_progress_bar, convert_to_numpy, **kwargs
        )

    @torch.no_grad()
    def _encode(
        self,
        inputs: Any,
        side: str,
        num_meta: int | None,
        instruction: str | None,
        batch_size: int,
        show_progress_bar: bool | None,
        convert_to_numpy: bool,
        **kwargs: Any,
    ) -> Tensor | np.ndarray:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size!r}.")
        if show_progress_bar is None:
            show_progress_bar = logger.getEffectiveLevel() <= logging.INFO
        num_meta = self.processor.resolve_num_meta(side, num_meta)
        items = self.processor.parse(inputs)
        dim = self.config.embedding_dim or self.config.hidden_size
        embeddings = torch.empty(len(items), num_meta, dim, dtype=torch.float32, device="cpu")
        device = execution_device(self)
        with self._evaluating(), default_device_cpu():
            batches = list(self._batches(items, batch_size))
            for indices in tqdm(batches, desc=f"Encoding ({side})", disable=not show_progress_bar):
                features = self.processor.process(
                    [items[i] for i in indices], side, num_meta, instruction=instruction, indices=indices, **kwargs
                )
                output = self(**features.to(device)).embeddings  # [batch, r, D]
                embeddings[indices] = check_finite(output.to("cpu", torch.float32), indices)
        embeddings = embeddings[0] if is_single(inputs) else embeddings
        return embeddings.numpy() if convert_to_numpy else embeddings

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Put the model in evaluation mode until the last thread that encodes has ended."""
        with _MODES:
            count, modes = _ENCODING.get(self) or (0, {module: module.training for module in self.modules()})
            _ENCODING[self] = (count + 1, modes)
            if not count:
                self.eval()
        try:
            yield
        finally:
            with _MODES:
                count, modes = _ENCODING.pop(self)
                if count > 1:
                    _ENCODING[self] = (count - 1, modes)
                else:
                    for module, mode in modes.items():  # parents first: a frozen tower in evaluation mode stays so
                        if module.training != mode:
                            module.train(mode)

    def _batches(self, items: list[Item], batch_size: int) -> Iterator[list[int]]:
        """Yield index lists: longest first within each number of images, so that a batch pads little."""
        order = sorted(range(len(items)), key=lambda i: (items[i].num_images, items[i].text_length), reverse=True)
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            for group in self.processor.group([items[i] for i in chunk]):
                yield [chunk[i] for i in group]

    score = staticmethod(maxsim)


def check_finite(embeddings: Tensor, indices: list[int]) -> Tensor:
    """Return embeddings [N, r, D] of inputs `indices`.

    Raises:
        ValueError: If one holds NaN or infinity.
    """
    for index, whole in zip(indices, embeddings.isfinite().flatten(1).all(dim=1).tolist(), strict=True):
        if not whole:
            raise ValueError(
                f"input {index}: its embedding is not finite. Look for NaN in the weights, and in image_mean and "
                "image_std of the processor; float16 overflows in many backbones, where bfloat16 does not."
            )
    return embeddings


def execution_device(model: nn.Module) -> torch.device:
    """Return the device that takes the inputs: with offloading by accelerate, that of its first hook."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", [hook]):
            if (device := getattr(each, "execution_device", None)) is not None:
                return torch.device(device)
    return model.device


def last_hidden_state(backbone: PreTrainedModel, input_ids: Tensor, **inputs: Any) -> Tensor:
    """Run a backbone, with a head or without one, and return what its last layer says.

    Args:
        backbone: The model.
        input_ids: Token ids [N, L].
        **inputs: Whatever else the processor returned.

    Returns:
        Hidden states [N, L, hidden].

    Raises:
        ValueError: If the input is longer than the backbone was made for, or has not one hidden state for each id.
    """
    longest = getattr(backbone.config.get_text_config(), "max_position_embeddings", None)
    if longest and input_ids.shape[1] > longest:
        raise ValueError(
            f"an input is {input_ids.shape[1]} tokens long, and {type(backbone).__name__} was made for at most "
            f"{longest}. Cut its text with `max_length`, or make its images smaller."
        )
    parameters = inspect.signature(backbone.forward).parameters
    takes_anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if "use_cache" in parameters or takes_anything:
        inputs["use_cache"] = False  # nothing is generated
    if "logits_to_keep" in parameters:  # a class with a head: spare the logits
        output = backbone(input_ids=input_ids, output_hidden_states=True, logits_to_keep=1, **inputs)
        hidden = output.hidden_states[-1]
    else:
        hidden = backbone(input_ids=input_ids, **inputs).last_hidden_state
    if hidden.shape[:2] != input_ids.shape:
        raise ValueError(
            f"{type(backbone).__name__} returned hidden states of shape {tuple(hidden.shape)} for input ids of shape "
            f"{tuple(input_ids.shape)}: it has no hidden state for each token, so none for the Meta Tokens."
        )
    return hidden
