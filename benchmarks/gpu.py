"""What a GPU does with this package: run it once, and attach the Markdown file that it writes to an issue.

    python benchmarks/gpu.py                                   a Qwen2.5-VL of 3B with random weights, on the GPU
    python benchmarks/gpu.py --model Qwen/Qwen2.5-VL-7B-Instruct
    python benchmarks/gpu.py --device cpu --tiny               the same code in seconds, to see that it works

Five sections: scoring (torch against the fused kernel), encoding at each budget, attention implementations and
quantization, a training step with GradCache, and one step sharded with FSDP over all GPUs (NCCL). A section that fails
is written down with its error, and the others still run; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "examples" / "recipes")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from cost import SHAPES, Shape  # noqa: E402
from PIL import Image  # noqa: E402
from tiny_backbone import build_backbone, build_processor  # noqa: E402
from torch.nn.functional import normalize  # noqa: E402
from transformers import AutoModel, BitsAndBytesConfig, TorchAoConfig  # noqa: E402

from metaembed import MetaEmbedModel, lora_config, maxsim  # noqa: E402
from metaembed.configuration_metaembed import DEFAULT_BUDGETS  # noqa: E402
from metaembed.evaluation.tables import markdown_table  # noqa: E402
from metaembed.sentence_metaembed import to_multi_vector_encoder  # noqa: E402
from metaembed.training.losses import CachedMMRLoss, MMRLoss  # noqa: E402
from metaembed.training.trainer import sharded_layers  # noqa: E402

WORDS = ["red", "apple", "green", "pear", "blue", "table", "two", "cats", "under", "one", "chair"]
PACKAGES = ("torch", "transformers", "sentence-transformers", "peft", "late-interaction-kernels", "flash-attn")
PACKAGES += ("torchao", "bitsandbytes")


def synchronize(device: str) -> None:
    """Wait for the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def measure(work: Callable[[], Any], device: str, repeats: int = 3) -> tuple[float, str]:
    """Return the seconds of the fastest of so many calls, after one that warms up, and the peak memory in GB."""
    work()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    best = float("inf")
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best, f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if device == "cuda" else "-"


class Setting:
    """What the sections share: the device, the sizes and the model.

    Args:
        arguments: Of the command line.
    """

    def __init__(self, arguments: argparse.Namespace):
        self.device, self.tiny = arguments.device, arguments.tiny
        self.dtype = torch.float32 if self.device == "cpu" else torch.bfloat16
        self.folder = Path(tempfile.mkdtemp())
        self.processor = build_processor([" ".join(WORDS)], **({} if self.tiny else {"patch_size": 14}))
        self.name = arguments.model or ("a tiny Qwen2.5-VL" if self.tiny else "a Qwen2.5-VL of 3B, random weights")
        self.model = self.make(arguments.model)
        side = 48 if self.tiny else 896
        rng = np.random.default_rng(0)
        count = 4 if self.tiny else 32
        pixels = rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
        self.pages = [Image.fromarray(each) for each in pixels]
        self.texts = [" ".join(rng.choice(WORDS, 8 if self.tiny else 256)) for _ in range(count)]
        self.batch_size = 2 if self.tiny else 8

    def make(self, name: str | None) -> MetaEmbedModel:
        """Return a model on the device: of a backbone of the Hub, or with random weights."""
        if name:
            model = MetaEmbedModel.from_backbone(name, dtype=self.dtype)
        else:
            backbone = build_backbone(self.processor) if self.tiny else self.of_shape(SHAPES["qwen2.5-vl-3b"])
            model = MetaEmbedModel.from_backbone(backbone, processor=self.processor)
        model.is_untrained = False  # it is measured, not used
        return model.to(self.device).eval()

    def of_shape(self, shape: Shape) -> Any:
        """Return a Qwen2.5-VL with random weights of a given shape."""
        config = build_backbone(self.processor).config
        text, vision = config.text_config, config.vision_config
        text.update(
            {
                "hidden_size": shape.hidden,
                "intermediate_size": shape.wide,
                "num_hidden_layers": shape.layers,
                "num_attention_heads": shape.heads,
                "num_key_value_heads": shape.kv_heads,
                "max_position_embeddings": 32768,
                "rope_parameters": {**text.rope_parameters, "mrope_section": [16, 24, 24]},
                "layer_types": None,
            }
        )
        text.layer_types = ["full_attention"] * shape.layers
        vision.update({"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16})
        vision.update({"out_hidden_size": shape.hidden, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]})
        with torch.device(self.device):
            return AutoModel.from_config(config, dtype=self.dtype).eval()


def scoring(setting: Setting) -> list[str]:
    """Time MaxSim of one query and 32 against documents in bfloat16, with torch and the kernel for the device."""
    n, dim = (200, 32) if setting.tiny else (20_000, 2048)
    kernel = "compiled" if setting.device == "cpu" else "fused"
    generator = torch.Generator(setting.device).manual_seed(0)
    documents = torch.empty(n, 64, dim, dtype=torch.bfloat16, device=setting.device)
    for part in documents.split(1000):
        values = torch.randn(part.shape, device=setting.device, generator=generator)
        part.copy_(normalize(values, dim=-1))
    rows = []
    for count in (1, 32):
        queries = normalize(torch.randn(count, 16, dim, device=setting.device, generator=generator), dim=-1)
        for budget in DEFAULT_BUDGETS:
            reference = maxsim(queries, documents, budget, backend="torch")
            cells = []
            for backend in ("torch", kernel):
                try:
                    error = (maxsim(queries, documents, budget, backend=backend) - reference).abs().max().item()
                    seconds, memory = measure(
                        lambda b=budget, q=queries, k=backend: maxsim(q, documents, b, backend=k), setting.device
                    )
                    cells += [f"{1e3 * seconds:.2f}", memory] + ([f"{error:.0e}"] if backend == kernel else [])
                except RuntimeError as error:
                    cells += [str(error)]
            rows.append([count, str(budget), *cells])
    head = ["queries", "budget", "torch, ms", "GB", f"{kernel}, ms", "GB", "largest difference"]
    title = f"{n:,} documents of 64 vectors of {dim} dimensions, bfloat16:"
    return [title, "", markdown_table(head, [row + [""] * (len(head) - len(row)) for row in rows])]


def encoding(setting: Setting) -> list[str]:
    """Time the encoding of pages and texts with the numbers of Meta Tokens of each budget."""
    rows = []
    for name, inputs in (("pages", setting.pages), ("texts", setting.texts)):
        for _, r_c in DEFAULT_BUDGETS:
            seconds, memory = measure(
                lambda i=inputs, r=r_c: setting.model.encode_documents(i, r, batch_size=setting.batch_size),
                setting.device,
            )
            rows.append([name, r_c, f"{len(inputs) / seconds:.2f}", memory])
    size = "x".join(map(str, setting.pages[0].size))
    title = f"{setting.name}, {setting.dtype}, pages of {size} pixels, batches of {setting.batch_size}:"
    return [title, "", markdown_table(["inputs", "Meta Tokens", "a second", "GB"], rows)]


def variants(setting: Setting) -> list[str]:
    """Encode with each attention implementation and quantization: the time, and how far embeddings move."""
    path = setting.folder / "whole"
    setting.model.save_pretrained(path, model_card=False)
    options: dict[str, dict[str, Any]] = {
        name: {"attn_implementation": name} for name in ("eager", "sdpa", "flash_attention_2", "flash_attention_3")
    }
    options["4-bit (bitsandbytes)"] = {
        "quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=setting.dtype)
    }
    for name in ("Int8WeightOnlyConfig", "Float8DynamicActivationFloat8WeightConfig"):
        options[f"torchao {name}"] = {"quantization_config": name}
    reference = setting.model.encode_documents(setting.pages, batch_size=setting.batch_size)
    rows = []
    for name, kwargs in options.items():
        try:
            if isinstance(kwargs.get("quantization_config"), str):
                import torchao.quantization

                own = getattr(torchao.quantization, kwargs["quantization_config"])()
                kwargs = {"quantization_config": TorchAoConfig(own)}
            model = MetaEmbedModel.from_pretrained(path, dtype=setting.dtype, device_map=setting.device, **kwargs)
            found = model.encode_documents(setting.pages, batch_size=setting.batch_size)
            seconds, memory = measure(
                lambda m=model: m.encode_documents(setting.pages, batch_size=setting.batch_size), setting.device, 1
            )
            size = sum(each.nbytes for each in model.state_dict().values()) / 1e9
            cosine = (found * reference).sum(dim=-1).min().item()
            rows.append([name, f"{len(setting.pages) / seconds:.2f}", memory, f"{size:.3g}", f"{cosine:.5f}"])
        except Exception as error:  # a library that is missing, or a GPU that is too old, raises any error
            rows.append([name, f"not run: {first_line(error)}", "", "", ""])
    return [
        markdown_table(["variant", "pages a second", "GB", "GB of weights", "least cosine to the model itself"], rows)
    ]


def training(setting: Setting) -> list[str]:
    """Time a training step with GradCache and LoRA."""
    model = setting.make(None) if setting.tiny else setting.model
    model.add_adapter(lora_config(model))
    if not setting.tiny:
        model.gradient_checkpointing_enable()
    encoder = to_multi_vector_encoder(model, device=setting.device).train()
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    rows = []
    for size, mini in ((4, 2),) if setting.tiny else ((32, 8), (128, 8)):
        loss = CachedMMRLoss(encoder, mini_batch_size=mini)
        queries = [setting.texts[i % len(setting.texts)][:80] for i in range(size)]
        pages = [setting.pages[i % len(setting.pages)] for i in range(size)]
        columns = [encoder.preprocess(queries, task="query"), encoder.preprocess(pages, task="document")]

        def step(loss=loss, columns=columns):
            moved = [{k: on(v, setting.device) for k, v in column.items()} for column in columns]
            value = torch.stack(list(loss(moved).values())).sum()
            value.backward()
            optimizer.step()
            optimizer.zero_grad()

        seconds, memory = measure(step, setting.device, 1)
        rows.append([size, mini, f"{seconds:.2f}", memory])
    trained = sum(each.numel() for each in parameters) / 1e6
    title = f"LoRA of rank 32 and the Meta Tokens, {trained:.1f} million weights, five budgets, gradient checkpointing"
    title += " off:" if setting.tiny else ":"
    return [title, "", markdown_table(["pairs of a query and a page", "at a time", "seconds a step", "GB"], rows)]


def on(value: Any, device: str) -> Any:
    """Return a tensor on a device, and anything else as it is."""
    return value.to(device) if isinstance(value, torch.Tensor) else value


def one_step(model: MetaEmbedModel, device: str) -> float:
    """Train all weights for one step on two pairs of texts, and return the loss before it."""
    encoder = to_multi_vector_encoder(model, device=device).train()
    loss = MMRLoss(encoder)
    columns = [
        encoder.preprocess([f"{word} apple" for word in ("red", "green")], task="query"),
        encoder.preprocess([f"one {word} chair" for word in ("red", "blue")], task="document"),
    ]
    columns = [{k: on(v, device) for k, v in column.items()} for column in columns]
    value = torch.stack(list(loss(columns).values())).sum()
    value.backward()
    torch.optim.SGD(model.parameters(), lr=1e-2).step()
    model.eval()
    return value.item()


def sharding(setting: Setting) -> list[str]:
    """Train one step sharded over all devices, save, and compare with the same step of one process."""
    whole = setting.folder / "start"
    count = 2 if setting.device == "cpu" else torch.cuda.device_count()
    small = MetaEmbedModel.from_backbone(build_backbone(setting.processor), processor=setting.processor)
    small.save_pretrained(whole, model_card=False)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command += [__file__, "--device", setting.device, "--worker", str(setting.folder)]
    finished = subprocess.run(
        command, capture_output=True, text=True, timeout=1800, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if finished.returncode:
        raise RuntimeError(finished.stderr[-1500:])
    before = small.to(setting.device).eval().encode_documents(setting.texts[:4])
    loss = one_step(small, setting.device)
    sharded = MetaEmbedModel.from_pretrained(setting.folder / "sharded").to(setting.device).eval()
    a, b = (model.encode_documents(setting.texts[:4]) for model in (small, sharded))
    theirs = float((setting.folder / "loss.txt").read_text())
    backend = "gloo" if setting.device == "cpu" else "nccl"
    moved, apart = ((each - a).abs().max().item() for each in (before, b))
    row = [count, backend, f"{loss:.6f}", f"{theirs:.6f}", f"{moved:.0e}", f"{apart:.0e}"]
    head = ["processes", "backend", "loss of one process", "loss, sharded", "embeddings moved by", "and are apart by"]
    return ["One step of all weights, a tiny model in float32, FSDP2:", "", markdown_table(head, [row])]


def work(folder: Path, device: str) -> None:
    """Be one process of `sharding`."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank = int(os.environ["LOCAL_RANK"])
    if device == "cuda":
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group("gloo" if device == "cpu" else "nccl")
    model = MetaEmbedModel.from_pretrained(folder / "start").to(device)
    names = sharded_layers(model)
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    for module in list(model.modules()):
        if type(module).__name__ in names:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss = one_step(model, device)
    model.save_pretrained(folder / "sharded", model_card=False)
    if rank == 0:
        (folder / "loss.txt").write_text(str(loss))
    torch.distributed.destroy_process_group()


def first_line(error: BaseException) -> str:
    """Return an error in one line of a table."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}".replace("|", "/") if lines else type(error).__name__


def describe(device: str) -> str:
    """Return the machine and the versions."""
    what = torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.processor() or platform.machine()})"
    if device == "cuda":
        what = f"{torch.cuda.device_count()} x {what}, CUDA {torch.version.cuda}"
    versions = []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} not installed")
    return f"{what}; Python {platform.python_version()}; {', '.join(versions)}."


SECTIONS = {
    "Scoring": scoring,
    "Encoding": encoding,
    "Attention and quantization": variants,
    "Training": training,
    "Sharding": sharding,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the sections, print them, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--model", help="a backbone of the Hub, instead of random weights")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--output", type=Path, default=Path("gpu-report.md"))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker:
        return work(arguments.worker, arguments.device)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU. To see that the script works, pass --device cpu --tiny")
    if arguments.device == "cpu" and not arguments.tiny:
        parser.error("a CPU takes hours: pass --tiny")
    setting = Setting(arguments)
    lines, failed = ["# Report of benchmarks/gpu.py", "", describe(arguments.device)], []
    for name in arguments.sections:
        lines += ["", f"## {name}", ""]
        try:
            lines += SECTIONS[name](setting)
        except Exception as error:  # the other sections still say something
            failed.append(name)
            lines.append(f"**Failed**: {first_line(error)}")
            print(f"{name}: {error}", file=sys.stderr)
        print("\n".join(lines[-3:]), flush=True)
    arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"wrote {arguments.output}: attach it to an issue")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
