"""Uploads to a stand-in for the hub on this machine's loopback."""

import base64
import contextlib
import hashlib
import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading

import pytest

from jax_unlearn.app import cli
from jax_unlearn.app.push import NotPushed, check_push, push
from jax_unlearn.app.verify import verify


class Hub:
    """What the hub was told: the repositories made, and the files of each commit."""

    def __init__(self, refuses=""):
        self.refuses, self.created, self.commits, self.stored = refuses, [], [], {}
        self.tokens = set()

    def answer(self, method, path, body):
        """(status, content) for a request."""
        if self.refuses and self.refuses in path:
            return 403, {"error": "no rights here"}
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            return 200, {"url": f"{self.endpoint}/owner/name"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.startswith("/api/models/owner/name/preupload/"):
            files = json.loads(body)["files"]
            modes = {
                file["path"]: "lfs" if file["path"].endswith(".safetensors") else "regular"
                for file in files
            }
            given = [
                {"path": path, "uploadMode": mode, "shouldIgnore": False}
                for path, mode in modes.items()
            ]
            return 200, {"files": given}
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                one | {"actions": {"upload": {"href": f"{self.endpoint}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        if method == "PUT":
            self.stored[path.removeprefix("/lfs/")] = body
            return 200, {}
        if path.startswith("/api/models/owner/name/commit/"):
            self.commits.append(self.committed(body))
            return 200, {"commitUrl": f"{self.endpoint}/owner/name/commit/1", "commitOid": "1"}
        return 404, {"error": f"the stand-in knows no {method} {path}"}

    def committed(self, body):
        files = {}
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.stored[value["oid"]]
        return files


@contextlib.contextmanager
def serving(hub):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.tokens.add(self.headers.get("Authorization"))
            status, content = hub.answer(self.command, self.path.partition("?")[0], body)
            text = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_PUT = do_HEAD = do_POST

        def log_message(self, *rest):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def environment(hub, tmp_path, **more):
    kept = {
        n: v for n, v in os.environ.items() if not n.startswith("HF_") and "proxy" not in n.lower()
    }
    given = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_stand_in",
    }
    return kept | given | more


def contents(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


PUSH = """
import pathlib, sys
from jax_unlearn.app.push import push
print(push(pathlib.Path(sys.argv[1]), sys.argv[2]))
"""


def upload(hub, folder, tmp_path, name="owner/name"):
    return subprocess.run(
        [sys.executable, "-c", PUSH, str(folder), name],
        env=environment(hub, tmp_path), capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "a model"
    (folder / "unet").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlibrary_name: diffusers\n---\n# A model\n")
    (folder / "model_index.json").write_text("{}")
    (folder / "unet" / "weights.safetensors").write_bytes(bytes(range(256)) * 40)
    return folder


def test_a_folder_becomes_one_private_commit(model, tmp_path):
    with serving(Hub()) as hub:
        found = upload(hub, model, tmp_path)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == f"{hub.endpoint}/owner/name"
    (created,) = hub.created
    assert created["name"] == "name"
    assert created["organization"] == "owner"
    assert created.get("private") is True or created.get("visibility") == "private"
    assert hub.commits == [contents(model)]
    assert hub.stored.keys() == {hashlib.sha256(bytes(range(256)) * 40).hexdigest()}
    assert "Bearer hf_stand_in" in hub.tokens


@pytest.mark.slow
@pytest.mark.parametrize("refuses", ["/create", "/preupload", "/commit/"])
def test_a_refused_upload_says_how_to_repeat_it(model, tmp_path, refuses):
    with serving(Hub(refuses)) as hub:
        found = upload(hub, model, tmp_path)
    assert found.returncode == 1
    last = found.stderr.strip().splitlines()[-1]
    assert last.startswith("jax_unlearn.app.push.NotPushed: the run is complete, but the hub")
    assert last.endswith(f"Upload it with: hf upload owner/name '{model}' . --private")
    assert hub.commits == []


@pytest.mark.slow
def test_a_run_ends_on_the_hub(tiny_model, tiny_images, tmp_path):
    """The command in a process of its own; and again where the hub refuses: nothing is lost."""
    given = ["data", "--model", str(tiny_model), "--forget", str(tiny_images["forget"])]
    given += ["--retain", str(tiny_images["retain"]), "--steps", "1", "--samples", "0"]
    given += ["--batch-size", "16", "--forget-batch-size", "8", "--evaluation-images", "16"]
    given += ["--push-to-hub", "owner/name"]

    def run(hub, out):
        return subprocess.run(
            [sys.executable, "-m", "jax_unlearn.app.cli", *given, "--out", str(tmp_path / out)],
            env=environment(hub, tmp_path), capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    with serving(Hub()) as hub:
        found = run(hub, "one")
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1] == f"pushed: {hub.endpoint}/owner/name"
    assert hub.commits == [contents(tmp_path / "one" / "model")]
    assert {"README.md", "model.sha256", "model_index.json"} <= hub.commits[0].keys()
    saved = json.loads((tmp_path / "one" / "run.json").read_text())
    assert "push_to_hub" not in saved["options"]

    with serving(Hub("/commit/")) as hub:
        found = run(hub, "two")
    assert found.returncode == 1
    last = found.stderr.strip().splitlines()[-1]
    assert last.startswith("jax-unlearn: the run is complete, but the hub did not take the model (")
    assert last.endswith(f"hf upload owner/name {tmp_path / 'two' / 'model'} . --private")
    assert "seal:" in found.stdout
    assert verify(tmp_path / "two")[0] == []


@pytest.mark.parametrize(
    ("token", "name", "line"),
    [
        ("hf_x", "a/b/c", "--push-to-hub takes OWNER/NAME on the hub: Repo id must be"),
        ("hf_x", "owner/-name", "--push-to-hub takes OWNER/NAME on the hub: Repo id must"),
        ("hf_x", "owner/na me", "--push-to-hub takes OWNER/NAME on the hub: Repo id must"),
        ("", "owner/name", "--push-to-hub needs a token: run `hf auth login`, or set HF_TOKEN."),
    ],
)
def test_what_cannot_be_pushed_is_said_first(tmp_path, monkeypatch, capsys, token, name, line):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token or None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    given = ["demo", "--formulation", "forward-kl", "--push-to-hub", name]
    assert cli.main([*given, "--out", str(tmp_path / "out")]) == 2
    (found,) = capsys.readouterr().err.splitlines()
    assert found.startswith(f"jax-unlearn: {line}")
    assert not (tmp_path / "out").exists()


def test_several_models_have_no_one_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert cli.main(["demo", "--push-to-hub", "owner/name", "--out", str(tmp_path / "out")]) == 2
    assert "--push-to-hub is for one model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_offline_is_said_first(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        check_push("owner/name")


def test_no_connection_is_said(model, monkeypatch):
    def fail(*rest, **named):
        raise ConnectionError("nobody there\nat all")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", fail)
    with pytest.raises(NotPushed, match=r"\(ConnectionError: nobody there\)\. Upload it with: hf"):
        push(pathlib.Path(model), "owner/name")


def test_no_file_starts_an_upload(tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"command": "demo", "options": {"push_to_hub": "somebody/else"}}))
    assert cli.main(["demo", "--config", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "unknown options: push_to_hub" in capsys.readouterr().err
