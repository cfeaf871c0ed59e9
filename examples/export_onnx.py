"""Export a model to ONNX, run it with ONNX Runtime and OpenVINO, and compare both with torch.

    python examples/export_onnx.py CHECKPOINT outputs/onnx                       texts
    python examples/export_onnx.py CHECKPOINT outputs/onnx --image page.png      texts with one image each
    python examples/export_onnx.py --tiny outputs/onnx                           tiny models with random weights

Needs onnxscript, onnxruntime and openvino (`pip install 'metaembed[onnx]'`). One graph takes one kind of
input (texts, or texts with an image) of any number and length, for one side and one `num_meta`. The processor stays in
Python: it makes the graph's inputs. docs/export.md has the figures, and says which backbones cannot be exported.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from metaembed import MetaEmbedModel
from metaembed.evaluation.tables import markdown_table
from metaembed.modeling_metaembed import unit_vectors

Run = Callable[[dict[str, np.ndarray]], np.ndarray]  # model inputs by name -> embeddings [N, r, D]


class Encoder(nn.Module):
    """The encoding of one side, with positional inputs, in operations that ONNX Runtime has.

    Args:
        model: The model.
        names: What the tensors are, in the order of the inputs.
        side: "query" or "document".
        num_meta: r.
    """

    def __init__(self, model: MetaEmbedModel, names: Sequence[str], side: str, num_meta: int):
        super().__init__()
        self.model, self.names, self.num_meta = model, names, num_meta
        self.ids = model.config.token_ids(side)

    def forward(self, *tensors: Tensor) -> Tensor:
        """Return embeddings [N, r, D]."""
        inputs = dict(zip(self.names, tensors, strict=True))
        input_ids = inputs.pop("input_ids")
        hidden = self.model._last_hidden_state(input_ids, **inputs)  # [N, L, hidden]
        is_meta = (input_ids >= self.ids[0]) & (input_ids <= self.ids[-1])
        # ONNX has no stable sort: keys that fall with the place have no ties among the Meta Tokens.
        keys = is_meta.long() * torch.arange(input_ids.shape[1], 0, -1, device=input_ids.device)
        return unit_vectors(hidden, keys.topk(self.num_meta, dim=1).indices, self.model.projection)


def is_all_true(self):
    """Translate `aten._is_all_true`, which torch's exporter does not know."""
    from onnxscript import BOOL, INT64
    from onnxscript import opset18 as op

    numbers = op.Reshape(op.Cast(self, to=INT64.dtype), op.Constant(value_ints=[-1]))
    return op.Cast(op.ReduceMin(numbers, keepdims=0), to=BOOL.dtype)


def model_inputs(model: MetaEmbedModel, inputs: list[Any], side: str, num_meta: int) -> dict[str, Tensor]:
    """Return the tensors that the processor makes of inputs, which must be able to share a batch."""
    features = model.processor.process(inputs, side, num_meta)
    return {name: value for name, value in features.items() if isinstance(value, Tensor)}


def export_onnx(model: MetaEmbedModel, path: str | Path, example: Any, side: str, num_meta: int | None = None) -> Path:
    """Export the encoding of one kind of input to an ONNX graph, whose one output is the embeddings [N, r, D].

    Args:
        model: A model in float32, on the CPU, without an adapter.
        path: The file to write. Weights beyond 2 GB lie beside it.
        example: An input of the kind that the graph shall take: a text, or a dict with a text and an image.
        side: "query" or "document".
        num_meta: r. None: the configuration's default, else all.

    Returns:
        The path.

    Raises:
        torch.onnx.OnnxExporterError: If the backbone's forward cannot be traced: with the line to blame.
    """
    count = model.processor.resolve_num_meta(side, num_meta)
    features = model_inputs(model, [example, example], side, count)
    length, any_size = features["input_ids"].shape[1], torch.export.Dim.DYNAMIC
    sizes = [
        {0: any_size, 1: any_size} if value.ndim == 2 and value.shape[1] == length else {0: any_size}
        for value in features.values()
    ]
    program = torch.onnx.export(
        Encoder(model, list(features), side, count).eval(),
        tuple(features.values()),
        dynamic_shapes=(tuple(sizes),),
        input_names=list(features),
        output_names=["embeddings"],
        dynamo=True,
        verbose=False,
        custom_translation_table={torch.ops.aten._is_all_true.default: is_all_true},
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    program.save(path)
    return path


def with_onnxruntime(path: Path, threads: int = 0) -> Run:
    """Return what runs an exported graph with ONNX Runtime on the CPU. `threads`: 0 for its own choice."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return lambda inputs: session.run(None, {name: inputs[name] for name in names})[0]


def with_openvino(path: Path, threads: int = 0) -> Run:
    """Return what runs an exported graph with OpenVINO on the CPU, in float32. `threads`: 0 for its own choice."""
    import openvino

    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    names = [each.any_name for each in compiled.inputs]
    return lambda inputs: compiled({name: inputs[name] for name in names})[0]


def compare(
    model: MetaEmbedModel, path: Path, batches: Sequence[list[Any]], side: str, num_meta: int, repeats: int = 5
) -> list[list[str]]:
    """Run batches with torch and both engines: rows of engine, largest difference, and ms for all batches."""
    threads = torch.get_num_threads()
    engines = {"ONNX Runtime": with_onnxruntime(path, threads), "OpenVINO": with_openvino(path, threads)}

    @torch.inference_mode()
    def with_torch(inputs: dict[str, np.ndarray]) -> np.ndarray:
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
        return model(**tensors, num_meta=num_meta).embeddings.numpy()

    features = [
        {name: value.numpy() for name, value in model_inputs(model, batch, side, num_meta).items()}
        for batch in batches
    ]
    expected = [with_torch(each) for each in features]
    rows = []
    for name, run in {"torch": with_torch, **engines}.items():
        error = max(float(np.abs(run(each) - rows_).max()) for each, rows_ in zip(features, expected, strict=True))
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            for each in features:
                run(each)
            seconds.append(time.perf_counter() - start)
        rows.append([name, f"{error:.0e}", f"{1e3 * min(seconds):.1f} ms"])
    return rows


def tiny_models() -> dict[str, tuple[MetaEmbedModel, Any]]:
    """Return a Qwen3 and a vision-language model with random weights, each with an example of its input."""
    import sys

    sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
    from tiny import build

    models = {}
    for name in ("qwen3", "paligemma"):
        backbone, processor = build(name)
        models[name] = MetaEmbedModel.from_backbone(
            backbone, processor=processor, num_query_tokens=4, num_document_tokens=8
        )
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8))
    return {
        "Qwen3": (models["qwen3"], "a red apple"),
        "PaliGemma": (models["paligemma"], {"text": "a red apple", "image": picture}),
    }


def other_texts(example: Any) -> list[list[Any]]:
    """Return batches of other sizes than the example's, of its kind."""
    texts = [["cat"], ["cat", "the green pear on a blue table " * 5, "two cats"]]
    return [[{**example, "text": text} if isinstance(example, dict) else text for text in batch] for batch in texts]


def main(argv: Sequence[str] | None = None) -> None:
    """Export, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", help="folder or Hub id of a MetaEmbed model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true", help="models with random weights instead of a checkpoint")
    parser.add_argument("--image", type=Path, help="an image that each input shall have")
    parser.add_argument("--side", choices=("query", "document"), default="document")
    parser.add_argument("--num-meta", type=int)
    arguments = parser.parse_args(argv)
    if arguments.tiny == (arguments.checkpoint is not None):
        parser.error("pass either a checkpoint or --tiny")
    torch.set_num_threads(1)
    if arguments.tiny:
        models = tiny_models()
    else:
        example = {"text": "a", "image": Image.open(arguments.image)} if arguments.image else "a"
        model = MetaEmbedModel.from_pretrained(arguments.checkpoint, dtype=torch.float32).eval()
        models = {arguments.checkpoint: (model, example)}
    rows = []
    for name, (model, example) in models.items():
        path = arguments.folder / f"{Path(name).name}-{arguments.side}.onnx"
        export_onnx(model, path, example, arguments.side, arguments.num_meta)
        size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) / 1e6
        count = model.processor.resolve_num_meta(arguments.side, arguments.num_meta)
        for row in compare(model, path, other_texts(example), arguments.side, count):
            rows.append([name, "text and image" if isinstance(example, dict) else "text", f"{size:.1f} MB", *row])
    head = ["model", "input", "ONNX file", "engine", "largest difference from torch", "two batches, one thread"]
    print(markdown_table(head, rows))


if __name__ == "__main__":
    main()
