"""sentence-transformers' trainer, also for models that are sharded over several GPUs."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import MultiVectorEncoderTrainer
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import TrainerCallback

from ..modeling_metaembed import MetaEmbedModel
from ..sentence_metaembed import to_multi_vector_encoder

logger = logging.getLogger(__name__)


class MetaEmbedTrainer(MultiVectorEncoderTrainer):
    """sentence-transformers' trainer that can also shard a MetaEmbed model with FSDP2, save it whole, and resume it.

    Example:
        >>> MetaEmbedTrainer(model=encoder, args=args, train_dataset=dataset, loss=MMRLoss(encoder)).train()
    """

    def __init__(self, model: Any, **kwargs: Any):
        super().__init__(model=model, **kwargs)
        if self.is_fsdp_enabled:
            self.add_callback(ReduceEveryGradient)
            plugin = self.accelerator.state.fsdp_plugin
            if plugin.transformer_cls_names_to_wrap is None:
                # accelerate would ask the encoder, which does not know the layers of its model
                plugin.transformer_cls_names_to_wrap = sharded_layers(model[0].model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model. All processes gather the weights of a sharded one, and one process writes them."""
        if self.is_fsdp_enabled:
            folder = output_dir or self.args.output_dir
            (self.model if self.args.should_save else self.model[0].model).save_pretrained(folder)
        else:
            super().save_model(output_dir, _internal_call)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:  # sentence-transformers does not expect to be called in any other process
            super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, checkpoint_path: str, model: Any = None) -> None:
        if not self.is_fsdp_enabled:
            return super()._load_from_checkpoint(checkpoint_path)
        state = {}
        if self.accelerator.is_main_process:  # reads all weights, and sends the other processes their parts
            saved = MetaEmbedModel.from_pretrained(checkpoint_path)
            state = to_multi_vector_encoder(saved, device="cpu").state_dict()
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(self.model, state, options=options)

    def _load_best_model(self) -> None:
        # sentence-transformers continues with the last checkpoint if the best one cannot be loaded.
        best = self.state.best_model_checkpoint
        self.model.model_card_data.set_best_model_step(int(best.rpartition("-")[2]))
        self._load_from_checkpoint(best)


class ReduceEveryGradient(TrainerCallback):
    """Reduces the gradients of weights that a process did not use, such as a vision tower's in a batch without images.

    By default FSDP leaves them out, and processes that reduce different weights wait for each other forever.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Tell the sharded model."""
        if hasattr(model, "set_reduce_scatter_unused_params"):
            model.set_reduce_scatter_unused_params(True)
        elif args.process_index == 0:
            logger.warning(
                f"torch {torch.__version__} cannot shard weights that only some batches use: with --no_lora, "
                "use images in every mini-batch, or in none."
            )


def sharded_layers(model: MetaEmbedModel) -> list[str]:
    """Return the classes of layers that FSDP shards one by one: the backbone's blocks that every text runs through.

    All processes must gather the same layers. Others, such as a vision tower's, run only where there are images.

    Raises:
        ValueError: If the backbone does not name its blocks.
    """
    names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    used = set()
    hooks = [block.register_forward_pre_hook(lambda module, args: used.add(module)) for block in blocks]
    model.encode_documents("a")
    for hook in hooks:
        hook.remove()
    unused = {type(block).__name__ for block in blocks if block not in used}
    found = {type(block).__name__ for block in blocks} - unused
    if not found:
        raise ValueError(
            f"{type(model.backbone).__name__} does not say which of its layers FSDP can shard: name their classes as "
            "fsdp_transformer_layer_cls_to_wrap in the configuration."
        )
    return sorted(found)


def last_checkpoint(folder: str | Path) -> str | None:
    """Return the newest complete checkpoint in `folder`, or None. Its state file is written last."""
    complete = [path.parent for path in Path(folder).glob("checkpoint-*/trainer_state.json") if is_json(path)]
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None


def is_json(path: Path) -> bool:
    """Return whether a file is complete JSON."""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True
