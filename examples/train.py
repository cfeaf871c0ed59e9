"""Fine-tune a MetaEmbed model on your own pairs: any backbone, text and images, LoRA or in full, one GPU or many.

    python examples/train.py --backbone Qwen/Qwen2.5-VL-3B-Instruct --dataset you/your-pairs --output_dir outputs/train
        --per_device_train_batch_size 256 --mini_batch_size 8 --bf16 --gradient_checkpointing --learning_rate 1e-4

    accelerate launch --config_file examples/fsdp.yaml examples/train.py ...    several GPUs, sharded
    torchrun --nproc-per-node 8 examples/train.py ... --gather_across_devices   several GPUs, a whole model on each
    python examples/train.py ... --resume                                       go on after a kill
    python examples/train.py ... --push_to_hub --hub_model_id you/your-model    publish the result

The dataset has the columns `query`, `positive` and any number of `negative`, `negative_1`, ..., or `negatives` with a
list in each row; each holds text or images, and `query_image`, `positive_image`, ... add images to the text of the
same name (in JSON: paths, relative to the file). Takes what `python examples/train.py --help` lists, among it
everything that sentence-transformers' training arguments know.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.compute
import torch
from datasets import Dataset, DatasetDict, load_dataset
from huggingface_hub import HfApi
from PIL import Image
from sentence_transformers import MultiVectorEncoderTrainer, MultiVectorEncoderTrainingArguments
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import AutoConfig, HfArgumentParser, TrainerCallback, set_seed

from metaembed import MetaEmbedModel
from metaembed.cards.card import write_eval_results
from metaembed.evaluation.budgets import BudgetEvaluator, budget_table
from metaembed.sentence_metaembed import to_multi_vector_encoder
from metaembed.training.lora import (
    ADAPTER_CONFIG,
    find_adapter,
    lora_config,
    merge_adapter,
    module_name,
)
from metaembed.training.losses import CachedMMRLoss, MMRLoss

logger = logging.getLogger("train")


@dataclass
class Arguments:
    """What to train, on what, and how; the rest are sentence-transformers' training arguments."""

    backbone: str = field(metadata={"help": "Hub id or folder: a plain backbone, or a MetaEmbed model to train on"})
    dataset: str = field(metadata={"help": "Hub id, .parquet or .jsonl file, image folder, or a folder of these"})
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of a dataset of the Hub"})
    train_split: str = field(default="train", metadata={"help": "split to train on"})
    eval_split: str | None = field(default=None, metadata={"help": "split to evaluate on"})
    eval_size: int = field(default=0, metadata={"help": "without eval_split: rows kept apart to evaluate on"})
    query_column: str = field(default="query", metadata={"help": "name of the queries' column"})
    positive_column: str = field(default="positive", metadata={"help": "name of the documents' column"})
    num_query_tokens: int | None = field(default=None, metadata={"help": "R_q of a new model; none: 16"})
    num_document_tokens: int | None = field(default=None, metadata={"help": "R_c of a new model; none: 64"})
    embedding_dim: int | None = field(default=None, metadata={"help": "dimension of a vector; none: the hidden size"})
    query_instruction: str | None = field(default=None, metadata={"help": "text put before every query"})
    document_instruction: str | None = field(default=None, metadata={"help": "text put before every document"})
    dtype: str | None = field(default=None, metadata={"help": "of the backbone; none: bfloat16 for LoRA with --bf16"})
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, flash_attention_2, ..."})
    lora: bool = field(default=True, metadata={"help": "the paper's recipe; --no_lora trains every weight"})
    lora_r: int | None = field(default=None, metadata={"help": "rank; none: 32"})
    lora_alpha: int | None = field(default=None, metadata={"help": "scale, over the rank; none: 32"})
    lora_dropout: float | None = field(
        default=None, metadata={"help": "dropout before the low-rank layers; none: 0.1"}
    )
    meta_token_learning_rate: float | None = field(
        default=None, metadata={"help": "of the Meta Tokens; with --no_lora, of the embedding that they are rows of"}
    )
    projection_learning_rate: float | None = field(default=None, metadata={"help": "of the projection"})
    temperature: float = field(default=0.03, metadata={"help": "tau"})
    normalize: str = field(default="sqrt", metadata={"help": "of the logits: sum (the paper's), mean or sqrt"})
    mini_batch_size: int = field(default=0, metadata={"help": "GradCache: inputs in memory at a time; 0: all, plain"})
    gather_across_devices: bool = field(default=False, metadata={"help": "negatives from all GPUs"})
    resume: bool = field(default=False, metadata={"help": "go on from the last checkpoint in output_dir"})
    license: str | None = field(default=None, metadata={"help": "of the trained model, for its card"})
    merge: bool = field(default=False, metadata={"help": "save the model with its LoRA merged, not the adapter"})


@dataclass
class TrainingArguments(MultiVectorEncoderTrainingArguments):
    """sentence-transformers' training arguments, in types that the parser knows."""

    max_length: str | None = field(default=None, metadata={"help": "unused: inputs are never cut"})


def load_rows(arguments: Arguments) -> tuple[Dataset, Dataset | None]:
    """Load the rows to train on and to evaluate on."""
    path = Path(arguments.dataset)
    loaders = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
    if path.suffix in loaders and path.is_file():
        data = load_dataset(loaders[path.suffix], data_files=str(path))
    else:  # a Hub id, or a folder: images with a metadata.jsonl, or files named after their splits
        data = load_dataset(arguments.dataset, arguments.dataset_config)
    assert isinstance(data, DatasetDict)
    for split in filter(None, (arguments.train_split, arguments.eval_split)):
        if split not in data:
            raise ValueError(f"{arguments.dataset} has no split {split!r}; it has {sorted(data)}.")
    train = data[arguments.train_split]
    if arguments.eval_split:
        return train, data[arguments.eval_split]
    if arguments.eval_size:
        parts = train.train_test_split(test_size=arguments.eval_size, seed=0)
        return parts["train"], parts["test"]
    return train, None


def find_columns(rows: Dataset, arguments: Arguments) -> list[str]:
    """Return the inputs of a row: the query, the positive, and the hard negatives that there are."""
    names = rows.column_names
    roots = {name.removesuffix("_image") for name in names}
    wanted = [arguments.query_column, arguments.positive_column]
    if missing := [name for name in wanted if name not in roots and name not in names]:
        raise ValueError(f"the dataset has no column {missing[0]!r}; it has {names}. See --query_column.")
    negatives = sorted(name for name in roots if re.fullmatch(r"negative(_\d+)?", name))
    used = {*wanted, *negatives, "negatives"}
    if unused := [name for name in names if name.startswith("negative") and name.removesuffix("_image") not in used]:
        raise ValueError(
            f"the column {unused[0]!r} would not be used. Hard negatives are read from `negative`, `negative_1`, ... "
            "or from `negatives`, with a list in each row: rename the column, or remove it."
        )
    return [*wanted, *negatives, *(f"negatives_{number + 1}" for number in range(count_negatives(rows)))]


def count_negatives(rows: Dataset) -> int:
    """Return how many hard negatives the lists in `negatives` hold, which must be as many in every row."""
    counts = set()
    for name in {"negatives", "negatives_image"} & set(rows.column_names):
        try:  # of the lists only: no image is read
            counts |= set(pyarrow.compute.list_value_length(rows.data.column(name)).to_pylist())
        except NotImplementedError as error:
            raise ValueError(f"{name!r} must hold a list in each row; a single one goes into `negative`.") from error
    if len(counts) > 1 or None in counts:
        raise ValueError(
            "`negatives` and `negatives_image` must hold a list in each row, all as long; the lengths are "
            f"{sorted(counts, key=str)}. Cut the longer ones, or fill up the shorter ones."
        )
    return counts.pop() if counts else 0


def spread(rows: dict[str, list]) -> dict[str, list]:
    """Return rows with their lists of `negatives` as columns of their own: `negatives_1`, `negatives_2`, ..."""
    columns: dict[str, list] = {}
    for name, values in rows.items():
        if name in ("negatives", "negatives_image"):
            suffix = name.removeprefix("negatives")
            parts = enumerate(zip(*values, strict=True))
            columns.update((f"negatives_{number + 1}{suffix}", list(part)) for number, part in parts)
        else:
            columns[name] = values
    return columns


def combine(rows: dict[str, list], columns: list[str], folder: Path) -> dict[str, list]:
    """Join text and images of a batch of rows into inputs of the model.

    Args:
        rows: Columns of values.
        columns: The inputs wanted.
        folder: What paths in image columns are relative to.
    """
    count = len(next(iter(rows.values())))
    batch: dict[str, list] = {}
    for column in columns:
        batch[column] = []
        images = rows.get(f"{column}_image", [None] * count)
        for text, image in zip(rows.get(column, [None] * count), images, strict=True):
            if text is None and image is None:
                raise ValueError(f"a row holds neither text nor an image in {column!r}.")
            image = read_paths(image, folder)
            both = text is not None and image is not None
            batch[column].append({"text": text, "image": image} if both else image if text is None else text)
    return batch


def read_paths(image: Any, folder: Path) -> Any:
    """Return `image` with strings, as they stand in JSON, as paths: of one image, or of a list of them."""
    if isinstance(image, list):
        return [read_paths(item, folder) for item in image]
    return folder / image if isinstance(image, str) else image


def prepare(rows: Dataset, columns: list[str], folder: Path) -> Dataset:
    """Return a data set with one column an input, joined as they are read: images are not copied."""
    numbers = Dataset.from_dict({column: range(len(rows)) for column in columns})
    return numbers.with_transform(lambda batch: combine(spread(rows[next(iter(batch.values()))]), list(batch), folder))


def identity(item: Any) -> str:
    """Return a name for an input, equal for equal inputs."""
    if isinstance(item, Image.Image):
        return hashlib.sha1(f"{item.mode}{item.size}".encode() + item.tobytes()).hexdigest()
    if isinstance(item, dict):
        return "+".join(identity(value) for value in item.values())
    if isinstance(item, (list, tuple)):
        return "+".join(map(identity, item))
    return str(item)


def make_evaluator(rows: Dataset, columns: list[str], model: MetaEmbedModel, batch_size: int) -> BudgetEvaluator:
    """Return an evaluator over the documents of `rows`: each query must find its own among all, negatives included."""
    queries, corpus, relevant = {}, {}, {}
    for index, row in enumerate(rows):
        query, *documents = (row[column] for column in columns)
        queries[f"q{index}"] = query
        corpus.update((identity(document), document) for document in documents)
        relevant[f"q{index}"] = {identity(documents[0])}
    cuts = dict(ndcg_at_k=[5, 10], mrr_at_k=[10], accuracy_at_k=[1], precision_recall_at_k=[1, 5], map_at_k=[100])
    budgets = model.config.budgets
    return BudgetEvaluator(queries, corpus, relevant, budgets, name="eval", batch_size=batch_size, **cuts)


def given(arguments: Arguments, *names: str) -> dict[str, Any]:
    """Return those of the options that the command line names."""
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def check_has(source: str, present: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise if a model that is trained further has something else than the command line asks for."""
    for name, value in wanted.items():
        if present[name] != value:
            raise ValueError(
                f"--{name} {value} cannot be had: {source} has {present[name]}, and is trained with that. Leave the "
                "option out, or start from the plain backbone."
            )


def make_model(arguments: Arguments, training: TrainingArguments) -> MetaEmbedModel:
    """Load or make the model, and add the adapter."""
    default = torch.bfloat16 if training.bf16 and arguments.lora else torch.float32
    options: dict[str, Any] = {"dtype": getattr(torch, arguments.dtype) if arguments.dtype else default}
    if arguments.attn_implementation:
        options["attn_implementation"] = arguments.attn_implementation
    names = ("num_query_tokens", "num_document_tokens", "embedding_dim", "query_instruction", "document_instruction")
    sizes, recipe = given(arguments, *names), given(arguments, "lora_r", "lora_alpha", "lora_dropout")
    if recipe and not arguments.lora:
        raise ValueError(f"--no_lora trains every weight: it has no use for --{next(iter(recipe))}.")
    adapter = find_adapter(arguments.backbone) is not None
    if adapter or AutoConfig.from_pretrained(arguments.backbone).model_type == "metaembed":
        model = MetaEmbedModel.from_pretrained(
            arguments.backbone, **options, **({"is_trainable": arguments.lora} if adapter else {})
        )
        check_has(arguments.backbone, {name: getattr(model.config, name) for name in names}, sizes)
    else:
        model = MetaEmbedModel.from_backbone(arguments.backbone, seed=training.seed, **sizes, **options)
    if adapter and arguments.lora:
        lora = model.peft_config[model.active_adapters()[0]]
        present = dict(lora_r=lora.r, lora_alpha=lora.lora_alpha, lora_dropout=lora.lora_dropout)
        check_has(arguments.backbone, present, recipe)
    elif adapter:
        merge_adapter(model)
    elif arguments.lora:
        model.add_adapter(lora_config(model, **{name.replace("lora_r", "r"): recipe[name] for name in recipe}))
    return model


def learning_rates(arguments: Arguments, model: MetaEmbedModel) -> dict[str, float]:
    """Return the learning rates of parameters that have their own, by patterns of their names."""
    rates = {}
    if arguments.meta_token_learning_rate is not None:
        name = module_name(model, model.get_input_embeddings()).split(".token_adapter")[0]
        rates[rf"{re.escape(name)}\."] = arguments.meta_token_learning_rate
    if arguments.projection_learning_rate is not None:
        rates[r"\.projection\."] = arguments.projection_learning_rate
    return rates


def last_checkpoint(folder: str) -> str | None:
    """Return the newest checkpoint in `folder` that was written whole: its state is what is written last."""
    whole = [path.parent for path in Path(folder).glob("checkpoint-*/trainer_state.json") if is_json(path)]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def is_json(path: Path) -> bool:
    """Return whether a JSON file was written to its end."""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def check_output(folder: str, arguments: Arguments) -> None:
    """Raise if `folder` holds a run that saved another kind of thing: to save beside it fails, after the training."""
    for path in sorted(Path(folder).glob("*/config.json")):
        final = path.parent.name == "final"
        adapter = arguments.lora and not (final and arguments.merge)
        if (path.parent / ADAPTER_CONFIG).is_file() != adapter:
            kind, other = ("an adapter", "a whole model") if adapter else ("a whole model", "an adapter")
            raise ValueError(
                f"this run saves {kind}, and {path.parent} holds {other}, of an earlier run with another --lora or "
                "--merge. Choose another --output_dir, or remove it."
            )


def sharded_layers(model: MetaEmbedModel) -> list[str]:
    """Return the classes of layers that FSDP shards one by one: the backbone's blocks that a text runs through.

    All processes must gather the same layers, and others, such as a vision tower's, run only where there are images.
    """
    names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    used = set()
    hooks = [block.register_forward_pre_hook(lambda module, args: used.add(module)) for block in blocks]
    model.encode_documents("a")
    for hook in hooks:
        hook.remove()
    found = {type(block).__name__ for block in blocks} - {
        type(block).__name__ for block in blocks if block not in used
    }
    if not found:
        raise ValueError(
            f"{type(model.backbone).__name__} does not say which of its layers FSDP can shard: name their classes as "
            "fsdp_transformer_layer_cls_to_wrap in the configuration."
        )
    return sorted(found)


class ReduceEveryGradient(TrainerCallback):
    """Reduces the gradients of weights that a process did not use, such as a vision tower's in a batch without images.

    FSDP leaves them out by default, and processes that reduce different weights wait for each other forever.
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


class Trainer(MultiVectorEncoderTrainer):
    """sentence-transformers' trainer, for models that are sharded over several GPUs too."""

    def __init__(self, model: Any, **kwargs: Any):
        super().__init__(model=model, **kwargs)
        if self.is_fsdp_enabled:
            self.add_callback(ReduceEveryGradient)
            plugin = self.accelerator.state.fsdp_plugin
            if plugin.transformer_cls_names_to_wrap is None:
                # accelerate would ask the encoder, which does not know its model's layers.
                plugin.transformer_cls_names_to_wrap = sharded_layers(model[0].model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model: all processes gather a sharded one's weights, and one writes."""
        if self.is_fsdp_enabled:
            (self.model if self.args.should_save else self.model[0].model).save_pretrained(
                output_dir or self.args.output_dir
            )
        else:
            super().save_model(output_dir, _internal_call)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:  # sentence-transformers expects to be called in no other process
            super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, checkpoint_path: str, model: Any = None) -> None:
        if not self.is_fsdp_enabled:
            return super()._load_from_checkpoint(checkpoint_path)
        first = self.accelerator.is_main_process  # reads the weights, and hands out the others' parts
        saved = (
            to_multi_vector_encoder(MetaEmbedModel.from_pretrained(checkpoint_path), device="cpu") if first else None
        )
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(self.model, saved.state_dict() if saved else {}, options=options)

    def _load_best_model(self) -> None:
        # sentence-transformers goes on with the last checkpoint where the best one cannot be loaded.
        best = self.state.best_model_checkpoint
        self.model.model_card_data.set_best_model_step(int(best.rpartition("-")[2]))
        self._load_from_checkpoint(best)


def main(arguments: Arguments, training: TrainingArguments) -> None:
    """Train, evaluate, save and publish."""
    set_seed(training.seed)
    push, training.push_to_hub = training.push_to_hub, False  # the result is published, not every checkpoint
    if training.save_strategy == "best" or training.eval_strategy != "no":
        raise ValueError(
            "every checkpoint is evaluated, and the best is kept: say when by --save_strategy steps or epoch, keep no "
            "others by --save_total_limit 1, and leave --eval_strategy out."
        )
    check_output(training.output_dir, arguments)
    final = Path(training.output_dir) / "final"

    # 1. Load the rows.
    train_rows, eval_rows = load_rows(arguments)
    columns = find_columns(train_rows, arguments)
    logger.info(f"{len(train_rows)} rows of {columns}")
    path = Path(arguments.dataset)
    folder = path.parent if path.is_file() else path if path.is_dir() else Path()

    # 2. Make the model. It trains all vectors, whatever it is set to return by default.
    model = make_model(arguments, training)
    defaults = model.config.query_num_meta, model.config.document_num_meta
    model.config.query_num_meta = model.config.document_num_meta = None
    encoder = to_multi_vector_encoder(model)

    # 3. Choose the loss: one term for every budget; cached where the batch does not fit.
    options = dict(
        temperature=arguments.temperature,
        normalize=arguments.normalize,
        gather_across_devices=arguments.gather_across_devices,
    )
    if arguments.mini_batch_size:
        loss = CachedMMRLoss(encoder, mini_batch_size=arguments.mini_batch_size, **options)
    else:
        loss = MMRLoss(encoder, **options)

    # 4. Evaluate at every budget whenever a checkpoint is saved, and keep the best.
    evaluator = None
    if eval_rows is not None:
        eval_columns = find_columns(eval_rows, arguments)
        prepared = prepare(eval_rows, eval_columns, folder)
        evaluator = make_evaluator(prepared, eval_columns, model, training.per_device_eval_batch_size)
        training.eval_strategy, training.eval_steps = training.save_strategy, training.save_steps
        training.load_best_model_at_end = training.save_strategy != "no"
        training.metric_for_best_model, training.greater_is_better = f"eval_{evaluator.primary_metric}", True

    # 5. Train.
    training.learning_rate_mapping = learning_rates(arguments, model)
    trainer = Trainer(
        model=encoder,
        args=training,
        train_dataset=prepare(train_rows, columns, folder),
        loss=loss,
        evaluator=evaluator,
    )
    if trainer.is_fsdp_enabled and arguments.merge:
        raise ValueError("--merge needs whole weights, and FSDP shards them: merge the result, with merge_adapter.")
    trainer.train(resume_from_checkpoint=last_checkpoint(training.output_dir) if arguments.resume else None)

    # 6. Evaluate what will be saved: merged, and without the autocast of the training (FSDP's cannot be switched off).
    trainer.accelerator.unwrap_model(encoder, keep_fp32_wrapper=False)
    if arguments.merge and arguments.lora:
        merge_adapter(model)
    quality = {}
    if evaluator is not None:
        quality = evaluator.budget_metrics(evaluator(encoder))

    # 7. Save, and publish.
    model.config.query_num_meta, model.config.document_num_meta = defaults
    encoder.model_card_data.license = arguments.license
    trainer.save_model(str(final))
    if not trainer.is_world_process_zero():
        return
    if quality:
        print(budget_table(quality, ["ndcg@10", "recall@1", "recall@5", "mrr@10"]))
        if not Path(arguments.dataset).exists():  # a data set of the Hub: its page can show the results
            task = f"{arguments.dataset_config or 'default'} {arguments.eval_split or arguments.train_split}"
            notes = "" if arguments.eval_split else f"on {len(eval_rows)} rows held out of the split"
            write_eval_results(final, arguments.dataset, task, quality, "ndcg@10", notes)
    if push:
        api = HfApi(token=training.hub_token)
        name = training.hub_model_id or Path(training.output_dir).name
        repository = api.create_repo(name, private=training.hub_private_repo, exist_ok=True).repo_id
        print(api.upload_folder(repo_id=repository, folder_path=final, ignore_patterns=["training_args.bin"]))
    logger.info(f"saved to {final}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    main(*HfArgumentParser((Arguments, TrainingArguments)).parse_args_into_dataclasses())
