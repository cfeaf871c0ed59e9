"""How a model is loaded, saved and published: whole or not at all, with its processor, through every door."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from .adapter_metaembed import (
    check_adapter_whole,
    check_saves_whole,
    commit_of,
    fill_adapter,
    find_adapter,
    import_peft,
    lasting_name,
    load_with_adapter,
    name_base,
    upcast_adapter,
)
from .card_metaembed import is_ours, write_repository_files
from .loading_metaembed import HUB_ARGUMENTS, check_loading
from .processing_metaembed import MetaEmbedProcessor


def gather_weights(model: nn.Module) -> dict[str, Any] | None:
    """Return the whole weights of a model that is sharded over several processes (FSDP2), or None where it is not.

    Args:
        model: The model, in every process.

    Returns:
        The weights on the CPU in the first process, and nothing in the others.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.tensor import DTensor

    # Of the state dictionary: after an evaluation, the parameters themselves may be whole for the moment.
    if not any(isinstance(value, DTensor) for value in model.state_dict().values()):
        return None
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


class HubModel(PreTrainedModel):
    """A `PreTrainedModel` that loads and saves whole: with processor and adapter, and what else a repository holds."""

    _processor: MetaEmbedProcessor | None = None
    _hub_arguments: dict[str, Any] | None = None  # where the model came from, and its processor will come from
    adapter_base: tuple[str | None, str | None] = (None, None)  # Hub id and commit that an adapter must name

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
        import_peft()  # says what to install where transformers and peft do not fit
        super().add_adapter(adapter_config, adapter_name)
        upcast_adapter(self)

    def load_adapter(self, peft_model_id: str | None = None, adapter_name: str | None = None, *args, **kwargs):
        """Load an adapter onto this model, whole or not at all. Takes what transformers' `load_adapter` takes.

        Raises:
            ValueError: If a trained part is missing from the adapter, or not in the model.
        """
        import_peft()
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
