"""The steps of `examples/train.py`: checks of a run, the model, the loss, and publishing the result."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets.exceptions import DatasetsError
from huggingface_hub import HfApi
from transformers import AutoConfig

from ..loading_metaembed import ADAPTER_CONFIG, find_adapter
from ..modeling_metaembed import MetaEmbedModel
from .arguments import Arguments, TrainingArguments
from .lora import lora_config, merge_adapter, module_name
from .losses import CachedMMRLoss, MMRLoss

if TYPE_CHECKING:
    from sentence_transformers import MultiVectorEncoder

    from ..evaluation.budgets import BudgetEvaluator

logger = logging.getLogger(__name__)

MODEL_OPTIONS = (
    "num_query_tokens",
    "num_document_tokens",
    "embedding_dim",
    "query_instruction",
    "document_instruction",
)
LORA_OPTIONS = ("lora_r", "lora_alpha", "lora_dropout")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print errors of a user, such as a wrong path or column, in one line, and exit with code 2."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, DatasetsError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from error


def check_run(arguments: Arguments, training: TrainingArguments) -> None:
    """Raise if options contradict each other, or the output folder has the result of another kind of run.

    Raises:
        ValueError: If so.
    """
    if training.save_strategy == "best" or training.eval_strategy != "no":
        raise ValueError(
            "every checkpoint is evaluated, and the best is kept: say when by --save_strategy steps or epoch, keep no "
            "others by --save_total_limit 1, and leave --eval_strategy out."
        )
    if not arguments.lora and (recipe := given(arguments, LORA_OPTIONS)):
        raise ValueError(f"--no_lora trains every weight and does not use --{next(iter(recipe))}: leave one out.")
    sharded = training.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if sharded and arguments.merge:
        raise ValueError("--merge needs whole weights, and FSDP shards them: merge the result, with merge_adapter.")
    for path in sorted(Path(training.output_dir).glob("*/config.json")):
        merged = arguments.merge and path.parent.name == "final"
        adapter = arguments.lora and not merged
        if (path.parent / ADAPTER_CONFIG).is_file() != adapter:
            kind, other = ("an adapter", "a whole model") if adapter else ("a whole model", "an adapter")
            raise ValueError(
                f"this run saves {kind}, and {path.parent} holds {other}, of an earlier run with another --lora or "
                "--merge. Choose another --output_dir, or remove it."
            )


def given(arguments: Arguments, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the options among `names` that the command line sets."""
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def make_model(arguments: Arguments, training: TrainingArguments) -> MetaEmbedModel:
    """Return the model to train: loaded or made from a backbone, and with an adapter for LoRA.

    Raises:
        ValueError: If a model that is trained further differs from what the command line asks for.
    """
    default = torch.bfloat16 if training.bf16 and arguments.lora else torch.float32
    options: dict[str, Any] = {"dtype": getattr(torch, arguments.dtype) if arguments.dtype else default}
    if arguments.attn_implementation:
        options["attn_implementation"] = arguments.attn_implementation
    sizes, recipe = given(arguments, MODEL_OPTIONS), given(arguments, LORA_OPTIONS)
    sizes |= {"token_projection": True} if arguments.token_terms else {}
    if not arguments.lora and options["dtype"] in (torch.bfloat16, torch.float16):
        logger.warning(
            f"--no_lora trains weights in {arguments.dtype}, which round most steps at the usual learning rates away: "
            "the model hardly changes. Leave --dtype out; --bf16 still computes in bfloat16."
        )
    source = arguments.backbone
    adapter = find_adapter(source) is not None
    if not adapter and AutoConfig.from_pretrained(source).model_type != "metaembed":
        model = MetaEmbedModel.from_backbone(source, seed=training.seed, **sizes, **options)
    else:
        trainable = {"is_trainable": arguments.lora} if adapter else {}
        model = MetaEmbedModel.from_pretrained(source, **options, **trainable)
        check_equal(source, {name: getattr(model.config, name) for name in sizes}, sizes)

    if adapter and arguments.lora:
        lora = model.peft_config[model.active_adapters()[0]]
        present = dict(lora_r=lora.r, lora_alpha=lora.lora_alpha, lora_dropout=lora.lora_dropout)
        check_equal(source, present, recipe)
    elif adapter:
        merge_adapter(model)
    elif arguments.lora:
        model.add_adapter(lora_config(model, **{name.replace("lora_r", "r"): recipe[name] for name in recipe}))
    if arguments.max_pixels is not None:
        limit_pixels(model.processor, arguments.max_pixels)
    return model


def limit_pixels(processor: Any, pixels: int) -> None:
    """Make a processor shrink larger images, which it is saved with.

    Raises:
        ValueError: If it does not bound images by their number of pixels.
    """
    images: Any = getattr(processor, "image_processor", None)
    size = dict(getattr(images, "size", None) or {})
    if "longest_edge" not in size or "shortest_edge" not in size:  # as in Qwen's: numbers of pixels
        raise ValueError(
            "--max_pixels does not fit this backbone, whose images have another kind of size: leave it out."
        )
    if pixels < size["shortest_edge"]:
        raise ValueError(f"--max_pixels {pixels} is below the {size['shortest_edge']} that an image is enlarged to.")
    images.size = {**size, "longest_edge": pixels}


def check_equal(source: str, present: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise if a model that is trained further does not have what the command line asks for.

    Raises:
        ValueError: If so.
    """
    for name, value in wanted.items():
        if present[name] != value:
            raise ValueError(
                f"--{name} {value} does not fit {source}, which was trained with {present[name]}. Leave the option "
                "out, or start from the plain backbone."
            )


def make_loss(encoder: MultiVectorEncoder, arguments: Arguments) -> MMRLoss | CachedMMRLoss:
    """Return the loss: with GradCache where a mini-batch size is given."""
    options: dict[str, Any] = dict(
        temperature=arguments.temperature,
        normalize=arguments.normalize,
        gather_across_devices=arguments.gather_across_devices,
        token_terms=bool(arguments.token_terms),
    )
    with warnings.catch_warnings():  # `make_model` said it, in terms of the command line
        warnings.filterwarnings("ignore", "the weights to train are", UserWarning)
        if arguments.mini_batch_size:
            return CachedMMRLoss(encoder, mini_batch_size=arguments.mini_batch_size, **options)
        return MMRLoss(encoder, **options)


def learning_rates(arguments: Arguments, model: MetaEmbedModel) -> dict[str, float]:
    """Return the learning rates of parameters that have one of their own, by patterns of their names."""
    rates = {}
    if arguments.meta_token_learning_rate is not None:
        name = module_name(model, model.get_input_embeddings()).split(".token_adapter")[0]
        rates[rf"{re.escape(name)}\."] = arguments.meta_token_learning_rate
    if arguments.projection_learning_rate is not None:
        rates[r"\.(token_)?projection\."] = arguments.projection_learning_rate
    return rates


def keep_the_best(training: TrainingArguments, evaluator: BudgetEvaluator) -> None:
    """Set the trainer to evaluate each checkpoint that it saves, and to end with the best."""
    training.eval_strategy, training.eval_steps = training.save_strategy, training.save_steps
    training.load_best_model_at_end = training.save_strategy != "no"
    training.metric_for_best_model, training.greater_is_better = f"eval_{evaluator.primary_metric}", True


def publish(folder: Path, training: TrainingArguments) -> str:
    """Upload the result to the Hub and return its address: as the repository given, or named after `output_dir`."""
    api = HfApi(token=training.hub_token)
    name = training.hub_model_id or Path(training.output_dir).name
    repository = api.create_repo(name, private=training.hub_private_repo, exist_ok=True).repo_id
    stale = ["*_metaembed.py", "kernels_metaembed.*"]  # of older versions, as `MetaEmbedModel.push_to_hub`
    ignored = ["training_args.bin"]
    return str(
        api.upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=ignored, delete_patterns=stale)
    )
