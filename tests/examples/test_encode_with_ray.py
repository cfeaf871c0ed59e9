"""Encoding on a cluster gives what a single process gives, whatever is killed on the way."""

import argparse
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

ray = pytest.importorskip("ray", reason="ray is not installed")
pytest.importorskip("ray.data", reason="ray.data needs pyarrow and pandas")

EXAMPLES = str(Path(__file__).parents[2] / "examples")


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes on this machine, of two CPUs and of one."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_worker_niceness", "0")  # else workers starve while other programs run

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    environment = {"PYTHONPATH": EXAMPLES, "RAY_DATA_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
    ray.init(address=nodes.address, runtime_env={"env_vars": environment}, log_to_driver=False)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


@pytest.mark.skipif(not os.environ.get("METAEMBED_TEST_RAY"), reason="takes minutes: make test-ray")
def test_two_nodes_and_a_killed_worker_give_what_a_single_process_gives(cluster, qwen, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from encode_with_ray import Encoder, Shards, parse, run

    words = ["red", "apple", "cat", "table", "rocket"]
    texts = [f"a {first} and {second}" for first in words for second in words][:24]
    ids = [f"d{i}" for i in range(24)]
    table = pa.table({"id": ids, "title": texts, "page": list(range(24))})
    (tmp_path / "data").mkdir()
    for i in range(4):
        pq.write_table(table.slice(6 * i, 6), tmp_path / "data" / f"part-{i}.parquet")
    qwen.save_pretrained(tmp_path / "model")
    marker, seen = tmp_path / "killed", tmp_path / "seen"
    seen.mkdir()

    class Killed(Encoder):
        """Dies once, at the worst moment: what it wrote is in the store, and not in the ledger."""

        def __call__(self, batch):
            (seen / f"{batch['id'][0]} {os.getpid()}").touch()
            add = self.ledger.add

            def die_once(done):
                if "d9" in done and not marker.exists():
                    marker.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                add(done)

            self.ledger.add = die_once
            return super().__call__(batch)

    Killed.__module__ = "__main__"  # so that it is sent by value
    options = parse(
        f"--model {tmp_path}/model --data {tmp_path}/data --text title --metadata page --to {tmp_path}/out "
        "--shards 3 --actors 2 --batch-size 6 --vectors 4 --blocks 4".split()
    )
    with pytest.raises(ValueError, match="3 actors and reading need more than the 3 CPUs"):
        run(argparse.Namespace(**vars(options) | {"actors": 3}))
    run(options, Killed)
    assert marker.exists()
    assert len({path.name.split()[1] for path in seen.iterdir()}) > 1  # more than one process took part
    shards = Shards(str(tmp_path / "out"))
    assert len(shards) == 24 and sum(len(store) > 0 for store in shards.stores) == 3
    assert sorted(i for store in shards.stores for i in store.ids) == sorted(ids)
    single = qwen.encode_documents([{"text": text} for text in texts], num_meta=4)
    for i, embedding in zip(ids, single, strict=True):
        (document,) = next(store.get([i]) for store in shards.stores if i in store)
        torch.testing.assert_close(document.embedding, embedding.float(), atol=1e-5, rtol=0)
        assert document.metadata == {"page": int(i[1:])}
    found = shards.search(single[5], k=3)
    assert found.ids[0][0] == "d5" and found.metadata[0][0] == {"page": 5}
    # Started again, it encodes nothing.
    before = len(list(seen.iterdir()))
    assert run(options) == 0 and len(shards) == 24 and len(list(seen.iterdir())) == before


def test_arguments_that_do_not_fit_are_an_error(capsys):
    from encode_with_ray import parse

    for arguments, message in (
        (["--text", "t", "--to", "http://host/pages"], "needs --ledger"),
        (["--to", "out"], "--text, --image or both"),
    ):
        with pytest.raises(SystemExit):
            parse(["--model", "m", "--data", "d", *arguments])
        assert message in capsys.readouterr().err
    assert sys.modules["encode_with_ray"].is_folder("out")
