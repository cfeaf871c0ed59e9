"""What the recipes share: presets of backbones, the command line, training through `examples/train.py`.

A recipe prepares a folder of pairs, trains on it, and evaluates. Options that it does not know go to
`examples/train.py` and win over its preset.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

EXAMPLES = Path(__file__).parent.parent
sys.path.append(str(EXAMPLES))

import train  # noqa: E402

STEPS = ("prepare", "train", "evaluate")
DATASET = "pairs"  # the folder of what is prepared, in the output folder


@dataclass(frozen=True)
class Preset:
    """A backbone, and how it is trained.

    Args:
        backbone: Hub id or folder.
        pixels: Of a token of an image: the area that the backbone sees as one.
        batch_size: Pairs of a step on one GPU.
        mini_batch_size: Inputs in memory at a time (GradCache).
        learning_rate: Of LoRA.
    """

    backbone: str
    pixels: int = 28 * 28
    batch_size: int = 256
    mini_batch_size: int = 8
    learning_rate: float = 1e-4

    def options(self) -> list[str]:
        """Return what `examples/train.py` is told."""
        return [
            *("--backbone", self.backbone, "--learning_rate", str(self.learning_rate)),
            *("--per_device_train_batch_size", str(self.batch_size), "--mini_batch_size", str(self.mini_batch_size)),
            *("--num_train_epochs", "1", "--warmup_steps", "50", "--logging_steps", "10", "--save_steps", "200"),
            *("--dataloader_num_workers", "4", "--dataloader_drop_last"),
        ]


# The last two are warm starts: they are embedding models already, so their rate is lower.
PRESETS = {
    "qwen2.5-vl-3b": Preset("Qwen/Qwen2.5-VL-3B-Instruct"),
    "qwen2.5-vl-7b": Preset("Qwen/Qwen2.5-VL-7B-Instruct", mini_batch_size=4),
    "qwen3-vl-embedding-2b": Preset("Qwen/Qwen3-VL-Embedding-2B", pixels=32 * 32, learning_rate=5e-5),
    "qwen3-vl-embedding-8b": Preset("Qwen/Qwen3-VL-Embedding-8B", 32 * 32, mini_batch_size=4, learning_rate=5e-5),
}
ON_A_GPU = ("--bf16", "--gradient_checkpointing")


def parser(description: str) -> argparse.ArgumentParser:
    """Return the command line that every recipe has."""
    made = argparse.ArgumentParser(description=description, epilog="Other options go to examples/train.py.")
    made.add_argument("--preset", choices=PRESETS, default="qwen2.5-vl-3b")
    made.add_argument("--output_dir", type=Path, required=True, help="of the pairs, checkpoints, model and results")
    made.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, help="which to run; default: all")
    made.add_argument("--gpus", type=int, default=1, help="processes that train, each with a whole model")
    made.add_argument("--cpu", action="store_true", help="train in float32 on the CPU, to try the recipe")
    made.add_argument("--image_tokens", type=int, default=768, help="of an image at most; larger ones are shrunk")
    made.add_argument("--eval_batch_size", type=int, default=8)
    return made


def pixels(arguments: argparse.Namespace) -> int:
    """Return the number of pixels of an image at most."""
    return arguments.image_tokens * PRESETS[arguments.preset].pixels


def shrink(image: Image.Image, pixels: int) -> Image.Image:
    """Return an image in RGB of at most so many pixels, in the same proportions."""
    scale = min(1.0, (pixels / (image.width * image.height)) ** 0.5)
    size = max(1, int(image.width * scale)), max(1, int(image.height * scale))
    return image.convert("RGB") if scale == 1.0 else image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def run_training(arguments: argparse.Namespace, more: Sequence[str]) -> None:
    """Train on what was prepared, on one GPU in this process or on several by accelerate."""
    preset, output = PRESETS[arguments.preset], arguments.output_dir
    options = ["--dataset", str(output / DATASET), "--output_dir", str(output), *preset.options()]
    options += ["--max_pixels", str(pixels(arguments))]  # searched images must be as large as those trained on
    options += ["--use_cpu"] if arguments.cpu else ON_A_GPU
    if arguments.gpus == 1:
        train.main([*options, *more])
    else:
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(arguments.gpus)]
        launch += ["--cpu", "--mixed_precision=no"] if arguments.cpu else ["--multi_gpu", "--mixed_precision=bf16"]
        command = [*launch, str(EXAMPLES / "train.py"), *options, "--gather_across_devices", *more]
        subprocess.run(command, check=True)
