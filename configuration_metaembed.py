"""The configuration of a checkpoint: its backbone, its Meta Tokens, its budgets and its defaults."""

from __future__ import annotations

import importlib
import operator
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

SIDES = ("query", "document")
DEFAULT_BUDGETS = ((1, 1), (2, 4), (4, 8), (8, 16), (16, 64))  # the paper's


def check_count(name: str, value: Any, maximum: int) -> int:
    """Return `value` as an `int`, or raise if it is not a whole number (TypeError) in 1..`maximum` (ValueError)."""
    try:
        count = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = None
    if count is None:
        raise TypeError(f"{name} must be a whole number (int), got {value!r} of type {type(value).__name__}.")
    if not 1 <= count <= maximum:
        raise ValueError(f"{name} must be between 1 and {maximum}, got {count}.")
    return count


@dataclass
class BackboneTraits:
    """How a backbone treats its inputs, as measured once by [`MetaEmbedModel.from_backbone`]."""

    causal: bool = True  # no Meta Token sees a later one: encoding with r of them equals the first r rows of all
    mixes_images: bool = True  # inputs with different numbers of images can share a batch without a change of rows
    batches_images: bool = True  # inputs with equal numbers of images can
    takes_audio: bool = False  # recordings change the rows
    mixes_audio: bool = True  # as of images
    batches_audio: bool = True
    pads_left: bool = True  # padding on the left does not change the rows: it does where positions count it
    text_through_tokenizer: bool = False  # the processor refuses inputs without images: they bypass it
    nests_images: bool = True  # the processor takes the images of a batch as a list per input, not as one flat list
    processor_options: dict[str, Any] | None = None  # without these, the processor leaves out what is needed


class MetaEmbedConfig(PreTrainedConfig):
    """Configuration of a [`MetaEmbedModel`]: its fields are the arguments.

    Raises:
        TypeError: If a field is of the wrong type.
        ValueError: If a number is out of range, or the budgets or token ids do not fit the sizes.

    Example:
        >>> MetaEmbedConfig(num_query_tokens=4, num_document_tokens=8).budgets
        [[1, 1], [2, 4], [4, 8]]
    """

    model_type = "metaembed"
    sub_configs = {"backbone_config": AutoConfig}
    _auto_class = "AutoConfig"

    backbone_config: Any = None  # the backbone's configuration, or the dictionary that it is saved as
    num_query_tokens: int = 16  # R_q
    num_document_tokens: int = 64  # R_c
    budgets: Any = None  # [r_q, r_c] pairs that training covers; None: the paper's that fit
    embedding_dim: int | None = None  # D; None: the backbone's hidden size, with no projection
    token_projection: bool = False  # the model also gives its tokens as vectors, through a projection of their own
    template_tokens: Any = (0, 0)  # how many tokens every prompt begins and ends with, which are no input's own
    traits: Any = None  # BackboneTraits, or the dictionary that they are saved as
    document_sees_query_tokens: bool = False  # [input; M_q; M_c], as the paper's own code has it, not [input; M_c]
    query_token_ids: Any = None  # contiguous, in order
    document_token_ids: Any = None
    query_num_meta: int | None = None  # defaults of calls that name no `num_meta`; None: all
    document_num_meta: int | None = None
    query_instruction: str | None = None  # defaults of calls that name no `instruction`; None: no instruction
    document_instruction: str | None = None
    base_model: str | None = None  # Hub id of the backbone, for the model card: a local path is not saved

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.backbone_config, dict):
            self.backbone_config = AutoConfig.for_model(**self.backbone_config)
        if self.traits is None:  # version 0.1 saved the traits flat
            names = [field.name for field in fields(BackboneTraits)]
            self.traits = {name: kwargs.pop(name) for name in names if name in kwargs}
        super().__post_init__(**kwargs)
        self.validate()

    def validate(self) -> None:
        """Raise if the fields do not fit together; bring them to their normal form. Saving calls this too."""
        super().validate()
        if isinstance(self.traits, Mapping):
            self.traits = BackboneTraits(**self.traits)
        large = 1_000_000  # far above any use: a mistaken value is an error here and not a failed allocation
        self.num_query_tokens = check_count("num_query_tokens", self.num_query_tokens, large)
        self.num_document_tokens = check_count("num_document_tokens", self.num_document_tokens, large)
        if self.embedding_dim is not None:
            self.embedding_dim = check_count("embedding_dim", self.embedding_dim, large)
        full = [self.num_query_tokens, self.num_document_tokens]
        if self.budgets is None:
            fitting = [[q, d] for q, d in DEFAULT_BUDGETS if q <= full[0] and d <= full[1]]
            self.budgets = fitting if fitting[-1:] == [full] else [*fitting, full]
        self.budgets = of_package("training.budgets", "check_budgets")(self.budgets, *full) or self.budgets
        for side in SIDES:
            self._validate_side(side)
        if shared := set(self.query_token_ids or ()) & set(self.document_token_ids or ()):
            raise ValueError(f"query_token_ids and document_token_ids must not overlap, both hold {sorted(shared)}.")

    def _validate_side(self, side: str) -> None:
        ids, size, num_meta = self.token_ids(side), self.num_tokens(side), self.num_meta(side)
        if num_meta is not None:
            setattr(self, f"{side}_num_meta", check_count(f"{side}_num_meta", num_meta, size))
        instruction = getattr(self, f"{side}_instruction")
        if not isinstance(instruction, (str, type(None))):
            raise TypeError(f"{side}_instruction must be a string or None, got {instruction!r}.")
        if ids is not None and (not len(ids) or ids[0] < 0 or list(ids) != list(range(ids[0], ids[0] + size))):
            raise ValueError(f"{side}_token_ids must be {size} contiguous ids in order, one for a token, got {ids}.")

    def num_tokens(self, side: str) -> int:
        """Return R, the number of Meta Tokens of `side` ("query" or "document")."""
        return getattr(self, f"num_{side}_tokens")

    def token_ids(self, side: str) -> Any:
        """Return the Meta Token ids of `side` ("query" or "document"): a list, or None before there are any."""
        return getattr(self, f"{side}_token_ids")

    def num_meta(self, side: str) -> int | None:
        """Return the default `num_meta` of `side` ("query" or "document")."""
        return getattr(self, f"{side}_num_meta")

    @property
    def hidden_size(self) -> int:
        """Hidden size of the backbone's language model, which trainers and DeepSpeed ask for."""
        if self.backbone_config is None:
            raise AttributeError("hidden_size is the backbone's, and this configuration has no backbone_config.")
        return self.get_text_config().hidden_size

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """Return the configuration of the backbone's language model."""
        return self if self.backbone_config is None else self.backbone_config.get_text_config(*args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as it is saved: without paths of this machine."""
        content = {**super().to_dict(), "base_model": hub_id(self.base_model)}
        traits: Any = content["traits"]  # maybe of this class as it was before transformers loaded this file anew
        content["traits"] = traits if isinstance(traits, dict) else asdict(traits)
        _drop_paths(content["backbone_config"])
        return content


def hub_id(name: Any) -> str | None:
    """Return `name` if it can be a Hub id, and None if it is None or a path of this machine."""
    possible = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(name or "")) is not None
    return str(name) if possible and not Path(name).exists() else None


def _drop_paths(content: Any) -> None:
    """Remove where configurations were loaded from, at any depth."""
    if isinstance(content, dict):
        content.pop("_name_or_path", None)
        for value in content.values():
            _drop_paths(value)


def of_package(module: str, name: str, needed: bool = False) -> Any:
    """Return the function `metaembed.<module>.<name>` of the installed package.

    Without the package (or with a version that lacks this): one that does nothing, or an ImportError if `needed`.
    """
    try:
        return getattr(importlib.import_module(f"metaembed.{module}"), name)
    except (ImportError, AttributeError) as error:
        if needed:
            raise ImportError(f"this needs {module} of the package: pip install metaembed ({error})") from error
        return lambda *args, **kwargs: None
