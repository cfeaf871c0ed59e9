"""The command line of `examples/train.py`: what to train, on what, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sentence_transformers import MultiVectorEncoderTrainingArguments
from transformers import HfArgumentParser


def option(default: Any, help: str) -> Any:
    """Return a field with its help text."""
    return field(default=default, metadata={"help": help})


@dataclass
class Arguments:
    """What to train, on what, and how; the rest are sentence-transformers' training arguments."""

    backbone: str = field(metadata={"help": "Hub id or folder: a plain backbone, or a MetaEmbed model to train on"})
    dataset: str = field(
        metadata={
            "help": "Hub id; .parquet, .jsonl or .csv file; folder with pairs.jsonl or metadata.jsonl and images"
        }
    )
    dataset_config: str | None = option(None, "configuration of a Hub dataset")
    train_split: str = option("train", "split to train on")
    eval_split: str | None = option(None, "split to evaluate on")
    eval_size: int = option(0, "without eval_split: number of rows kept apart to evaluate on")
    query_column: str = option("query", "name of the queries' column")
    positive_column: str = option("positive", "name of the documents' column")
    num_query_tokens: int | None = option(None, "R_q of a new model; none: 16")
    num_document_tokens: int | None = option(None, "R_c of a new model; none: 64")
    embedding_dim: int | None = option(None, "dimension of a vector; none: the hidden size")
    query_instruction: str | None = option(None, "text put before every query")
    document_instruction: str | None = option(None, "text put before every document")
    max_pixels: int | None = option(None, "of an image, now and in the saved model: larger ones are shrunk")
    dtype: str | None = option(None, "of the backbone; none: bfloat16 for LoRA with --bf16, else float32")
    attn_implementation: str | None = option(None, "sdpa, flash_attention_2, ...")
    lora: bool = option(True, "train LoRA, as the paper does; --no_lora trains every weight")
    lora_r: int | None = option(None, "rank; none: 32")
    lora_alpha: int | None = option(None, "scale, divided by the rank; none: 32")
    lora_dropout: float | None = option(None, "dropout before the low-rank layers; none: 0.1")
    merge: bool = option(False, "save the model with its LoRA merged, not the adapter")
    meta_token_learning_rate: float | None = option(
        None, "of the Meta Tokens; with --no_lora, of the whole input embedding"
    )
    projection_learning_rate: float | None = option(None, "of the projections")
    temperature: float = option(0.03, "tau")
    normalize: str = option("sum", "scores as the sum over query vectors (as in the paper), the mean, or sqrt")
    token_terms: bool = option(False, "also train the vectors of tokens, for sizes beyond num_document_tokens")
    mini_batch_size: int = option(0, "GradCache: number of inputs in memory at a time; 0: all, without GradCache")
    gather_across_devices: bool = option(False, "use the documents of all GPUs as negatives")
    resume: bool = option(False, "continue from the last checkpoint in output_dir")
    license: str | None = option(None, "of the trained model, for its card")


@dataclass
class TrainingArguments(MultiVectorEncoderTrainingArguments):
    """sentence-transformers' training arguments, in types that the parser knows."""

    max_length: str | None = option(None, "unused: inputs are never truncated")


GROUPS = {  # of --help, in this order; all other options come last
    "the ten that matter": "backbone dataset output_dir eval_size per_device_train_batch_size mini_batch_size "
    "num_train_epochs learning_rate bf16 resume",
    "data": "dataset_config train_split eval_split query_column positive_column",
    "model": "num_query_tokens num_document_tokens embedding_dim query_instruction document_instruction max_pixels "
    "dtype attn_implementation",
    "LoRA": "lora lora_r lora_alpha lora_dropout merge",
    "loss and learning rates": "temperature normalize token_terms gather_across_devices meta_token_learning_rate "
    "projection_learning_rate",
    "checkpoints and publishing": "save_strategy save_steps save_total_limit logging_steps report_to seed license "
    "push_to_hub hub_model_id hub_private_repo",
}


class Parser(HfArgumentParser):
    """A parser whose `--help` shows the options in groups, those that matter most first."""

    def format_help(self) -> str:
        """Return the text of `--help`."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        rest = list(self._actions)
        for title, names in GROUPS.items():
            shown = [action for name in names.split() for action in rest if action.dest == name]
            rest = [action for action in rest if action not in shown]
            self.add_section(formatter, title, shown)
        self.add_section(formatter, "all other training arguments of sentence-transformers and transformers", rest)
        return formatter.format_help()

    @staticmethod
    def add_section(formatter: Any, title: str, actions: list[Any]) -> None:
        """Add a group of options to a help text."""
        formatter.start_section(title)
        formatter.add_arguments(actions)
        formatter.end_section()


def parse_arguments(
    argv: Sequence[str] | None = None, description: str | None = None
) -> tuple[Arguments, TrainingArguments]:
    """Read the command line.

    Args:
        argv: The options. None: the process's.
        description: Text for `--help`.

    Returns:
        What is asked for, and sentence-transformers' training arguments.
    """
    parser = Parser(
        (Arguments, TrainingArguments),
        usage="%(prog)s --backbone BACKBONE --dataset DATASET [--output_dir OUTPUT_DIR] [other options]",
        description=description,
    )
    return parser.parse_args_into_dataclasses(argv)
