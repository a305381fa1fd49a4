"""`abscot push` against a hub of this machine: what is made there, what is uploaded, and what is refused."""

import base64
import json
import os
import pty
import threading
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from forked import abscot
from tiny import make_checkpoint

from abscot_trl.card import save_origin
from abscot_trl.errors import Refused
from abscot_trl.serving.push import PushArguments, push

MADE = {"base_model": "someone/base", "license": "mit", "trained": ["BottleneckSFTTrainer"]}
TOKEN = "hf_of_the_tests"


class Hub(ThreadingHTTPServer):
    """The hub's API as far as an upload goes. `public`: repositories that are there; `fails`: path to status."""

    def __init__(self, public=(), fails=None):
        self.repos = dict.fromkeys(public, False)  # each with whether it is private
        self.fails, self.made, self.asked, self.objects, self.commits = fails or {}, [], [], {}, []
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def reply(self, content, status=200, **headers):
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def handle_any(self):
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for part, status in hub.fails.items():
            if part in path:
                return self.reply({"error": "not today <b>"}, status)
        if self.command == "PUT":
            assert sha256(body).hexdigest() == path.rpartition("/")[2]
            hub.objects[path.rpartition("/")[2]] = body
            return self.reply({})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply({"error": "Invalid username or password."}, 401)
        if path == "/api/whoami-v2":
            return self.reply({"name": "me", "type": "user"})
        if self.command == "GET" and path.startswith("/api/models/"):
            repo = path.removeprefix("/api/models/")
            if repo not in hub.repos:
                return self.reply({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return self.reply({"id": repo, "private": hub.repos[repo]})
        asked = json.loads(body) if not path.endswith("/commit/main") else None
        if path == "/api/repos/create":
            hub.made.append(asked)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            hub.repos[name] = asked.get("visibility") == "private" or asked.get("private") is True
            return self.reply({"url": f"{hub.url}/{name}"})
        if path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        if path.endswith("/preupload/main"):
            modes = {
                file["path"]: "lfs" if file["path"].endswith("safetensors") else "regular" for file in asked["files"]
            }
            return self.reply(
                {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]}
            )
        if path.endswith("/info/lfs/objects/batch"):
            objects = [{**o, "actions": {"upload": {"href": f"{hub.url}/store/{o['oid']}"}}} for o in asked["objects"]]
            return self.reply({"transfer": "basic", "objects": objects})
        assert path.endswith("/commit/main"), path
        files = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = hub.objects[value["oid"]]
        hub.commits.append((path.split("/api/models/")[1].removesuffix("/commit/main"), files))
        return self.reply({"success": True, "commitOid": "c0", "commitUrl": f"{hub.url}/me/x/commit/c0"})

    do_GET = do_POST = do_PUT = handle_any


@pytest.fixture
def model(tmp_path):
    """A trained checkpoint with what may stand beside one."""
    folder = tmp_path / "model"
    make_checkpoint(folder)
    save_origin(folder, MADE)
    (folder / "checkpoint-5").mkdir()
    for name in ("checkpoint-5/optimizer.pt", "optimizer.pt", "training_log.json", "manifest.json", ".env", "my.log"):
        (folder / name).write_text("{}")
    (folder / "model-00009-of-00009.safetensors").write_bytes(b"left by another")
    return folder


def run(hub: Hub | None, model: Path, *arguments: str, token: str | None = TOKEN, terminal: str | None = None):
    """`abscot push` in a process of its own: its exit code, stdout and stderr."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    env |= {"HF_ENDPOINT": hub.url if hub else "http://127.0.0.1:9", "HF_HOME": str(model.parent / "home")}
    env |= {"HF_HUB_DISABLE_XET": "1"} | ({"HF_TOKEN": token} if token else {})
    said = [model.parent / name for name in ("stdout", "stderr")]
    for path in said:
        path.write_text("")
    process = abscot(["push", "--model", model, *arguments], *said, env, terminal)
    process.join(120)
    return SimpleNamespace(returncode=process.exitcode, stdout=said[0].read_text(), stderr=said[1].read_text())


@pytest.mark.slow
def test_the_models_files_go_to_a_new_private_repository(model):
    hub = Hub()
    done = run(hub, model, "--repo", "mine", "--yes", "true")
    assert done.returncode == 0, done.stderr
    [made] = hub.made
    assert (made["name"], made.get("visibility")) == ("mine", "private") and hub.repos == {"me/mine": True}
    [(repo, files)] = hub.commits
    wanted = {"README.md", "origin.json", "abstract_vocabulary.json", "config.json", "generation_config.json"}
    wanted |= {"model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert repo == "me/mine" and files == {name: (model / name).read_bytes() for name in wanted}
    assert f"{model} to {hub.url}/me/mine, new, private:" in done.stdout and "9 files" in done.stdout
    for name in ("checkpoint-5/", "optimizer.pt", "training_log.json", "my.log", ".env"):
        assert name in done.stdout.split("not uploaded: ")[1]
    assert done.stdout.rstrip().endswith("/commit/c0")


@pytest.mark.slow
def test_a_public_repository_takes_a_word_more(model):
    hub = Hub(public=["team/model"])
    refused = run(hub, model, "--repo", "team/model", "--yes", "true")
    assert refused.returncode == 1 and "team/model is there and public" in refused.stderr and not hub.commits
    done = run(hub, model, "--repo", "team/model", "--yes", "true", "--private", "false")
    assert done.returncode == 0 and "which is there, PUBLIC" in done.stdout and not hub.made
    assert [repo for repo, _ in hub.commits] == ["team/model"]


@pytest.mark.slow
def test_it_asks_and_without_a_terminal_refuses(model):
    hub = Hub()
    alone = run(hub, model, "--repo", "mine")
    assert alone.returncode == 1 and "--yes true uploads without asking" in alone.stderr
    assert "new, private" in alone.stdout
    for answer, code in (("", 1), ("n", 1), ("y", 0)):
        assert not hub.made and not hub.commits
        ours, theirs = pty.openpty()
        os.write(ours, f"{answer}\n".encode())
        assert run(hub, model, "--repo", "mine", terminal=os.ttyname(theirs)).returncode == code
    assert hub.repos == {"me/mine": True} and len(hub.commits) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fails", "token", "words"),
    [
        ({}, "hf_another", ["HTTP 401", "hf auth login", "HF_TOKEN"]),
        ({}, None, ["there is none", "hf auth login", "HF_TOKEN"]),
        ({"/api/repos/create": 403}, TOKEN, ["HTTP 403", "hf auth login", "not today <b>"]),
        ({"/api/whoami": 503}, TOKEN, ["HTTP 503", "run the same command again"]),
        ({"/commit/main": 500}, TOKEN, ["HTTP 500", "run the same command again"]),
        ({"/store/": 403}, TOKEN, ["model.safetensors", "403", "run the same command again"]),
        (None, TOKEN, ["cannot be reached", "HF_ENDPOINT"]),
    ],
)
def test_what_the_hub_refuses_is_one_line_with_a_remedy(model, fails, token, words):
    hub = None if fails is None else Hub(fails=fails)
    done = run(hub, model, "--repo", "mine", "--yes", "true", token=token)
    assert done.returncode == 1 and "Traceback" not in done.stderr and not (hub and hub.commits)
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("abscot push: ") and all(word in line for word in words), done.stderr
    assert not list(model.parent.glob("*.error.txt"))


def test_what_is_no_trained_checkpoint_of_ours_is_refused(model, tmp_path):
    def refused(folder, words):
        with pytest.raises(Refused, match=words):
            push(PushArguments(str(folder), "me/x", yes=True))

    refused(tmp_path, "not an extended checkpoint")
    save_origin(model, MADE | {"trained": []})
    refused(model, "says that it is not trained; push a trained model, or say --untrained true")
    (model / "origin.json").unlink()
    refused(model, "has no origin.json, which says whether")
    save_origin(model, MADE)
    (model / "model.safetensors").write_bytes(b"cut")
    refused(model, "weights")
    (model / "pruned.json").write_text('{"digest": ""}')
    refused(model, "its weights were removed")
    (model / "pruned.json").unlink()
    (model / "adapter_config.json").write_text("{}")
    refused(model, "is an adapter; run `abscot merge")
