from types import SimpleNamespace

from metaembed.training import run


def test_publishing_deletes_the_python_files_of_older_versions(monkeypatch, tmp_path):
    uploads = []

    class Api:
        def __init__(self, token):
            assert token == "secret"

        def create_repo(self, name, **options):
            return SimpleNamespace(repo_id=f"you/{name}")

        def upload_folder(self, **options):
            uploads.append(options)
            return "https://address"

    monkeypatch.setattr(run, "HfApi", Api)
    training = SimpleNamespace(hub_token="secret", hub_model_id=None, hub_private_repo=None, output_dir="out/mine")
    assert run.publish(tmp_path, training) == "https://address"
    (upload,) = uploads
    assert upload["repo_id"] == "you/mine" and upload["folder_path"] == tmp_path
    assert upload["delete_patterns"] == ["*_metaembed.py", "kernels_metaembed.*"]
    assert upload["ignore_patterns"] == ["training_args.bin"]
