"""What is downloaded for an id of the hub: safetensors, the hub's own conversion to them, or pickles."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

MAIN, OLDER, CONVERTED, FOREIGN = (digit * 40 for digit in "abcd")
TITLE = "Adding `safetensors` variant of this model"
OLD = {"config.json": b"{}", "pytorch_model.bin": b"pickle", "pytorch_model.fp16.bin": b"variant", "vocab.json": b"{}"}
NEW = {"config.json": b"{}", "model.safetensors": b"tensors", "vocab.json": b"{}"}


def pull(num, author="SFconvertbot", title=TITLE, status="open", parent=MAIN):
    files = (NEW, CONVERTED if author == "SFconvertbot" else FOREIGN)
    return {"num": num, "author": author, "title": title, "status": status, "parent": parent, "files": files}


# {repository: (files of main, its pull requests)}
REPOSITORIES = {
    "safe/model": (OLD | NEW, []),
    "converted/model": (OLD, [pull(3, author="someone"), pull(4)]),
    "by-another/model": (OLD, [pull(1, author="someone")]),
    "closed/model": (OLD, [pull(1, status="closed")]),
    "titled/model": (OLD, [pull(1, title="Add safetensors")]),
    "outdated/model": (OLD, [pull(1, parent=OLDER)]),
    "adapter/model": ({"adapter_config.json": b"{}", "adapter_model.bin": b"pickle", "optimizer.bin": b""}, []),
    "empty/model": ({"config.json": b"{}", "tf_model.h5": b""}, []),
}


class Hub(BaseHTTPRequestHandler):
    """The answers of the hub that a download asks for."""

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if self.path == "/":  # asked for to see whether the hub answers
            return self.answer(b"")
        is_api = parts[0] == "api"
        repository, (kind, *rest) = "/".join(parts[2:4] if is_api else parts[:2]), parts[4:] if is_api else parts[2:]
        files, pulls = REPOSITORIES[repository]
        commits = {f"refs/pr/{each['num']}": (each["files"][1], each["parent"]) for each in pulls} | {"main": (MAIN,)}
        trees = {MAIN: files} | {each["files"][1]: each["files"][0] for each in pulls}
        if not is_api:
            return self.answer(trees[rest[0]]["/".join(rest[1:])], commit=rest[0])
        if kind == "discussions":
            rows = [
                {
                    **{key: each[key] for key in ("num", "title", "status")},
                    "author": {"name": each["author"]},
                    "createdAt": "2023-01-01T00:00:00.000Z",
                    "repo": {"name": repository, "type": "model"},
                    "isPullRequest": True,
                }
                for each in pulls
            ]
            return self.answer(json.dumps({"count": len(rows), "start": 0, "discussions": rows}).encode())
        revision = "/".join(rest)
        if kind == "commits":
            date, message = "2023-01-01T00:00:00.000Z", {"title": "", "message": "", "authors": []}
            listed = [{"id": commit, "date": date, **message} for commit in commits[revision]]
            return self.answer(json.dumps(listed).encode())
        if kind == "tree":
            tree = [{"type": "file", "path": p, "size": len(c), "oid": p} for p, c in trees[revision].items()]
            return self.answer(json.dumps(tree).encode())
        assert kind == "revision", self.path
        self.answer(json.dumps({"id": repository, "sha": commits[revision][0]}).encode())

    def answer(self, content: bytes, commit: str = ""):
        self.send_response(200)
        if commit:
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{content.hex()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


SCRIPT = """
import json, logging, sys
from rlhf_jax.models.hub import local_folder
logging.basicConfig(level="INFO", format="%(message)s")
found = {}
for name in sys.argv[1:]:
    try:
        folder = local_folder(name)
        found[name] = folder.name, sorted(path.name for path in folder.iterdir())
    except ValueError as error:
        found[name] = "refused", str(error)
print(json.dumps(found))
"""


def download(home, endpoint, *, offline):
    environment = {**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": str(int(offline))}
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, *REPOSITORIES], capture_output=True, text=True, env=environment, check=True
    )
    return json.loads(ran.stdout), ran.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What a run downloads, what a second one without network finds in its cache, and the messages of both."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home, endpoint = tmp_path_factory.mktemp("hub"), f"http://127.0.0.1:{server.server_port}"
    online = download(home, endpoint, offline=False)
    server.shutdown()
    server.server_close()
    return online, download(home, endpoint, offline=True)


def test_safetensors_of_main_come_first_and_without_pickles(runs):
    for found, _ in runs:
        assert found["safe/model"] == [MAIN, sorted(NEW)]


def test_the_open_conversion_by_the_hubs_bot_is_used_and_named_also_without_network(runs):
    for found, _ in runs:
        assert found["converted/model"] == [CONVERTED, sorted(NEW)]
    for (_, messages), revision in zip(runs, ["refs/pr/4", CONVERTED], strict=True):
        assert f"converted/model has no safetensors: those of SFconvertbot's pull request, {revision}, are" in messages


@pytest.mark.parametrize("name", ["by-another", "closed", "titled", "outdated"])
def test_pickles_of_main_are_read_where_the_conversion_is_not_the_bots_open_one_of_main(runs, name):
    for found, messages in runs:
        assert found[f"{name}/model"] == [MAIN, ["config.json", "pytorch_model.bin", "vocab.json"]]
        assert f"{name}/model has no safetensors: its pickles are read, without running any code of them" in messages


def test_an_adapter_comes_as_a_pickle_and_a_repository_without_weights_is_rejected(runs):
    for found, _ in runs:
        assert found["adapter/model"] == [MAIN, ["adapter_config.json", "adapter_model.bin"]]
    assert "empty/model has neither safetensors nor pytorch_model.bin nor" in runs[0][0]["empty/model"][1]
    assert "empty/model is in the cache without its weights, and HF_HUB_OFFLINE is set" in runs[1][0]["empty/model"][1]
