"""Pushed repositories load by id and revision, in a fresh process with an empty cache and without this package.

The Hub is a small server on 127.0.0.1 with the endpoints that these calls use; huggingface_hub is the real one.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from fresh import FreshProcesses
from tiny_models import ROOT, save_tiny_backbone

from metaembed.loading_metaembed import TRAVELLING

pytestmark = pytest.mark.slow
HERE = os.path.dirname(__file__)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The address of a Hub, which runs in its own process."""
    log = tmp_path_factory.mktemp("hub") / "log"
    with open(log, "w") as stream:
        command = [sys.executable, os.path.join(HERE, "local_hub.py")]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stream, text=True)
        yield server.stdout.readline().strip()
        server.terminate()
        server.wait()
        server.stdout.close()
    assert log.read_text() == ""


@pytest.fixture(scope="module")
def process(hub, tmp_path_factory):
    """Runs code in a fresh process that knows this Hub only."""
    known = {"HF_ENDPOINT": hub, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_test"}
    processes = FreshProcesses(tmp_path_factory.mktemp("processes"), **known)
    yield processes
    processes.close()


class Machine:
    """A machine with its own folder and its own cache."""

    def __init__(self, folder, process):
        self.folder, self.process = folder, process
        folder.mkdir()

    def run(self, code):
        """Run `code` in a fresh process and return the last line that it prints, read as JSON."""
        done = self.process("-c", code, cwd=self.folder, home=self.folder / "cache", path=[HERE])
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])


MAKE = """
import json, torch
from tiny_models import picture
from metaembed import MetaEmbedModel
from metaembed.sentence_metaembed import to_multi_vector_encoder
QUERIES, DOCUMENTS = ["red apple"], ["a cat", picture(3), {"text": "boat", "image": picture(4, 48, 32)}]
def embeddings(model):
    return [model.encode_queries(QUERIES, num_meta=3).tolist(), model.encode_documents(DOCUMENTS, num_meta=5).tolist()]
"""

# A machine without the package: importing it fails, wherever it is installed.
LOAD = """
import json, sys
sys.modules["metaembed"] = None
import torch
from transformers import AutoModel, AutoProcessor
from sentence_transformers import MultiVectorEncoder
from tiny_pictures import picture
QUERIES, DOCUMENTS = ["red apple"], ["a cat", picture(3), {"text": "boat", "image": picture(4, 48, 32)}]
def embeddings(model):
    return [model.encode_queries(QUERIES, num_meta=3).tolist(), model.encode_documents(DOCUMENTS, num_meta=5).tolist()]
def by_sentence_transformers(model):
    sides = model.encode_query(QUERIES, num_meta=3), model.encode_document(DOCUMENTS, num_meta=5)
    return [[embedding.tolist() for embedding in side] for side in sides]
"""


@pytest.fixture(scope="module")
def trainer(process, tmp_path_factory):
    """A machine that creates models; the plain backbone is on the Hub."""
    machine = Machine(tmp_path_factory.mktemp("machines") / "trainer", process)
    save_tiny_backbone(machine.folder / "backbone")
    machine.run("""
import json
from huggingface_hub import HfApi
HfApi().create_repo("lab/backbone")
HfApi().upload_folder(repo_id="lab/backbone", folder_path="backbone")
print(json.dumps("done"))
""")
    return machine


@pytest.fixture
def user(process, tmp_path):
    """A machine with an empty cache."""
    return Machine(tmp_path / "user", process)


def close(actual, expected):
    for left, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(torch.tensor(left), torch.tensor(right), atol=1e-6, rtol=0)


@pytest.mark.parametrize("entry_point", ["AutoModel", "MultiVectorEncoder"])
def test_a_pushed_model_loads_by_id_and_revision(trainer, user, entry_point):
    push = {
        "AutoModel": 'model.push_to_hub("lab/{0}")',
        "MultiVectorEncoder": 'to_multi_vector_encoder(model).push_to_hub("lab/{0}", exist_ok=True)',
    }[entry_point].format(entry_point)
    first, second, commit = trainer.run(f"""{MAKE}
model = MetaEmbedModel.from_backbone("lab/backbone", num_query_tokens=4, num_document_tokens=8, embedding_dim=24)
first = embeddings(model)
{push}
from huggingface_hub import HfApi
commit = HfApi().model_info("lab/{entry_point}").sha
torch.nn.init.normal_(model.projection.weight)
{push}
print(json.dumps([first, embeddings(model), commit]))
""")
    found = user.run(f"""{LOAD}
old = dict(revision="{commit}", trust_remote_code=True)
new = dict(trust_remote_code=True)
processor = AutoProcessor.from_pretrained("lab/{entry_point}", **old)
assert processor.process_queries(["a"], num_meta=2)["input_ids"].shape[0] == 1
assert AutoModel.from_pretrained("lab/{entry_point}", **old).commit == "{commit}"
print(json.dumps([
    embeddings(AutoModel.from_pretrained("lab/{entry_point}", **old)),
    by_sentence_transformers(MultiVectorEncoder("lab/{entry_point}", **old)),
    embeddings(AutoModel.from_pretrained("lab/{entry_point}", **new)),
    by_sentence_transformers(MultiVectorEncoder("lab/{entry_point}", **new)),
]))
""")
    for actual, expected in zip(found, [first, first, second, second], strict=True):
        close(actual, expected)


def test_a_push_to_a_new_branch_creates_it(trainer, user):
    """From every entry point, twice; the main branch is unchanged."""
    files = trainer.run(f"""{MAKE}
from huggingface_hub import HfApi
model = MetaEmbedModel.from_backbone("lab/backbone", num_query_tokens=4, num_document_tokens=8, embedding_dim=24)
encoder = to_multi_vector_encoder(model)
for _ in range(2):
    model.push_to_hub("lab/branches", revision="model")
    model.processor.push_to_hub("lab/branches", revision="processor")
    encoder.push_to_hub("lab/branches", revision="encoder", exist_ok=True)
print(json.dumps(HfApi().list_repo_files("lab/branches")))
""")
    assert files == []
    sizes = user.run(f"""{LOAD}
where = dict(pretrained_model_name_or_path="lab/branches", trust_remote_code=True)
processor = AutoProcessor.from_pretrained(**where, revision="processor")
print(json.dumps([
    len(AutoModel.from_pretrained(**where, revision="model").encode_queries(QUERIES)[0]),
    len(MultiVectorEncoder("lab/branches", revision="encoder", trust_remote_code=True).encode_query(QUERIES)[0]),
    processor.process_queries(QUERIES)["input_ids"].shape[0],
]))
""")
    assert sizes == [4, 4, 1]


def test_a_push_updates_our_card_and_keeps_a_persons(trainer, user):
    first, second, third, fourth = trainer.run(f"""{MAKE}
from huggingface_hub import HfApi, ModelCard
def model(dim):
    return MetaEmbedModel.from_backbone("lab/backbone", num_query_tokens=4, num_document_tokens=8, embedding_dim=dim)
def pushed():
    card = ModelCard.load("lab/card", ignore_metadata_errors=True).content
    return [part for part in ("16 dim", "24 dim", 'AutoModel.from_pretrained("lab/card"', "mine") if part in card]
model(16).push_to_hub("lab/card")
cards = [pushed()]
model(24).push_to_hub("lab/card")
cards.append(pushed())
HfApi().upload_file(path_or_fileobj=b"# mine", path_in_repo="README.md", repo_id="lab/card")
model(16).push_to_hub("lab/card")
cards.append(pushed())
to_multi_vector_encoder(model(16)).push_to_hub("lab/card", exist_ok=True)
to_multi_vector_encoder(model(16)).push_to_hub("lab/original")
print(json.dumps([*cards, pushed()]))
""")
    name = 'AutoModel.from_pretrained("lab/card"'
    assert first == ["16 dim", name] and second == ["24 dim", name] and third == fourth == ["mine"]
    text = trainer.run("""
import json
from huggingface_hub import ModelCard
from sentence_transformers import MultiVectorEncoder
MultiVectorEncoder("lab/original", trust_remote_code=True).push_to_hub("you/copy")
print(json.dumps(ModelCard.load("you/copy").text))
""")
    assert text.count('("you/copy"') == 2 and "lab/original" not in text and "lab/backbone" in text
    kept, expected = user.run(f"""{LOAD}
from huggingface_hub import ModelCard
MultiVectorEncoder("lab/original", trust_remote_code=True).push_to_hub("you/kept")
AutoModel.from_pretrained("you/kept", trust_remote_code=True).push_to_hub("you/kept")
print(json.dumps([ModelCard.load(name).text for name in ("you/kept", "lab/original")]))
""")
    assert kept == expected, "without the package, the card is not changed"


def test_a_push_deletes_the_python_files_of_an_older_version(trainer, user):
    trainer.run(f"""{MAKE}
from huggingface_hub import HfApi
model = MetaEmbedModel.from_backbone("lab/backbone", num_query_tokens=4, num_document_tokens=8, embedding_dim=24)
model.push_to_hub("lab/older")
for name in ("adapter_metaembed.py", "kernels_metaembed.cpp", "kernels_metaembed.h", "mine.py", "notes.txt"):
    HfApi().upload_file(path_or_fileobj=b"# old", path_in_repo=name, repo_id="lab/older")
print(json.dumps("done"))
""")
    files = user.run(f"""{LOAD}
from huggingface_hub import HfApi
AutoModel.from_pretrained("lab/older", trust_remote_code=True).push_to_hub("lab/older")
print(json.dumps(HfApi().list_repo_files("lab/older")))
""")
    assert {name for name in files if name.endswith((".py", ".cpp", ".h", ".txt"))} == {
        *TRAVELLING,
        "mine.py",
        "notes.txt",
    }


def test_nothing_of_this_machine_is_published(trainer):
    """Neither a local path of the backbone, nor an adapter whose base is a local path."""
    config, error, files = trainer.run(f"""{MAKE}
from huggingface_hub import HfApi, hf_hub_download
from metaembed.training.lora import lora_config
model = MetaEmbedModel.from_backbone("backbone", num_query_tokens=4, num_document_tokens=8)
model.push_to_hub("lab/private")
config = open(hf_hub_download("lab/private", "config.json")).read()
model.add_adapter(lora_config(model, r=4))
try:
    model.push_to_hub("lab/adapter-of-a-folder")
except ValueError as error:
    print(json.dumps([config, str(error), HfApi().repo_exists("lab/adapter-of-a-folder")]))
""")
    assert str(trainer.folder) not in config and '"base_model": null' in config and "_name_or_path" not in config
    assert "names a folder of this machine" in error and not files


def test_a_pushed_processor_loads_by_id(trainer, user):
    expected = trainer.run(f"""{MAKE}
model = MetaEmbedModel.from_backbone("lab/backbone", num_query_tokens=4, num_document_tokens=8)
model.processor.push_to_hub("lab/processor")
print(json.dumps(model.processor.process_documents(DOCUMENTS, num_meta=3)["input_ids"].tolist()))
""")
    actual = user.run(f"""{LOAD}
processor = AutoProcessor.from_pretrained("lab/processor", trust_remote_code=True)
print(json.dumps(processor.process_documents(DOCUMENTS, num_meta=3)["input_ids"].tolist()))
""")
    assert actual == expected


def test_a_pushed_adapter_is_self_contained(trainer, user):
    """It names the backbone on the Hub and its commit, so a later change of the backbone has no effect."""
    expected = trainer.run(f"""{MAKE}
from metaembed.training.lora import lora_config
model = MetaEmbedModel.from_backbone("lab/backbone", num_query_tokens=4, num_document_tokens=8, embedding_dim=24)
model.add_adapter(lora_config(model, r=4, init_lora_weights=False))
for name, parameter in model.named_parameters():
    if parameter.requires_grad:
        torch.nn.init.normal_(parameter, std=0.1)
model.eval()
to_multi_vector_encoder(model).push_to_hub("lab/adapter")
print(json.dumps(embeddings(model)))
""")
    trainer.run("""
import json
from huggingface_hub import HfApi
from tiny_models import build_backbone, tiny_processor
build_backbone(tiny_processor(), hidden_size=32, layers=2, seed=5).save_pretrained("other")
HfApi().upload_folder(repo_id="lab/backbone", folder_path="other")
print(json.dumps("the backbone has changed"))
""")
    trainer.folder.rename(trainer.folder.with_name("gone"))
    try:
        found = user.run(f"""{LOAD}
from huggingface_hub import snapshot_download
import json
folder = snapshot_download("lab/adapter", local_dir="adapter")
config = json.load(open(folder + "/adapter_config.json"))
assert config["base_model_name_or_path"] == "lab/backbone" and len(config["revision"]) == 40, config
print(json.dumps([
    by_sentence_transformers(MultiVectorEncoder("lab/adapter", trust_remote_code=True)),
    embeddings(AutoModel.from_pretrained(folder, trust_remote_code=True)),
]))
""")
        again = user.run("""
import json
from tiny_models import picture
from metaembed import MetaEmbedModel
from peft import PeftModel
QUERIES, DOCUMENTS = ["red apple"], ["a cat", picture(3), {"text": "boat", "image": picture(4, 48, 32)}]
def embeddings(model):
    return [model.encode_queries(QUERIES, num_meta=3).tolist(), model.encode_documents(DOCUMENTS, num_meta=5).tolist()]
whole = MetaEmbedModel.from_pretrained("lab/adapter")
name, commit = whole.adapter_base
sizes = dict(num_query_tokens=4, num_document_tokens=8, embedding_dim=24, revision=commit)
plain = MetaEmbedModel.from_backbone(name, **sizes)
plain.load_adapter("lab/adapter")
wrapped = PeftModel.from_pretrained(MetaEmbedModel.from_backbone(name, **sizes), "lab/adapter").eval()
print(json.dumps([embeddings(whole), embeddings(plain), embeddings(wrapped)]))
""")
    finally:
        trainer.folder.with_name("gone").rename(trainer.folder)
    for actual in [*found, *again]:
        close(actual, expected)


def test_training_publishes_its_result(trainer, user):
    """`train.py --push_to_hub`, from a backbone and to a repository on the Hub."""
    trainer.run(f"""
import json, sys
sys.path.append(r"{ROOT}/examples")
import train
from datasets import Dataset
from tiny_models import WORDS
Dataset.from_dict({{"query": WORDS, "positive": WORDS[::-1]}}).to_json("pairs.jsonl")
command = ["--backbone", "lab/backbone", "--dataset", "pairs.jsonl"]
command += ["--output_dir", "out", "--num_query_tokens", "4", "--num_document_tokens", "8", "--eval_size", "4"]
command += ["--num_train_epochs", "1", "--report_to", "none", "--use_cpu", "--push_to_hub", "--license", "mit"]
train.main([*command, "--hub_model_id", "lab/trained"])
print(json.dumps("done"))
""")
    card, files, shape = user.run(f"""{LOAD}
from huggingface_hub import HfApi, ModelCard
model = MultiVectorEncoder("lab/trained", trust_remote_code=True)
card = ModelCard.load("lab/trained")
assert 'MultiVectorEncoder("lab/trained"' in card.text and "eval: 4 queries" in card.text, card.text
print(json.dumps([card.data.to_dict(), HfApi().list_repo_files("lab/trained"), model.encode_query("cat").shape]))
""")
    assert card["base_model"] == "lab/backbone" and card["base_model_relation"] == "adapter"
    assert card["license"] == "mit" and shape == [4, 32]
    assert "adapter_model.safetensors" in files and "training_args.bin" not in files
