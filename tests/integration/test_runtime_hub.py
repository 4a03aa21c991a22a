"""Models of the hub: fetched with progress, kept for offline use, and refused in one line; from a hub on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tether import catalog
from tether.runtime_messages import Event, Fatal, Loading, Ready, decode_event

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """The few routes of the hub that a model's loading asks for; it has one open and one gated repository."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        folder = catalog.resolve("demo").folder
        assert folder
        self.files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}
        # The same weights again in another form, as many repositories have them: not to be fetched.
        self.files["pytorch_model.bin"] = b"x" * 1000
        self.files["consolidated.safetensors"] = b"x" * 1000
        self.fetched: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: object) -> None:
        """Keep quiet."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        match urlsplit(self.path).path.strip("/").split("/"):
            case ["api", "models", "acme", "tiny" | "gated" as name, "revision", "main"]:
                files = [{"rfilename": file, "size": len(data)} for file, data in self.server.files.items()]
                self.reply_json(
                    {"id": f"acme/{name}", "sha": COMMIT, "gated": "manual" if name == "gated" else False,
                     "siblings": files, "safetensors": {"parameters": {"F16": 984192}, "total": 984192}}
                )  # fmt: skip
            case ["api", "models", "acme", "big", "revision", "main"]:
                self.reply_json(
                    {"id": "acme/big", "sha": COMMIT, "gated": False, "siblings": [],
                     "safetensors": {"parameters": {"BF16": 10**13}, "total": 10**13}}
                )  # fmt: skip
            case ["api", "models", "acme", "gated", "auth-check"]:
                self.refuse(403, "GatedRepo")
            case ["api", "models", "acme", "tiny", "revision", _]:
                self.refuse(404, "RevisionNotFound")
            case ["api", "models", "acme", "tiny", "tree", _]:
                self.reply_json(
                    [
                        {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                        for file, data in self.server.files.items()
                    ]
                )
            case ["acme", "tiny", "resolve", _, file] if file in self.server.files:
                self.reply(self.server.files[file], hashlib.sha1(self.server.files[file]).hexdigest())
                if self.command == "GET":
                    self.server.fetched.append(file)
            case ["api", "models", "acme", "down", *_]:
                self.refuse(500, "")
            case _:
                self.refuse(404, "RepoNotFound")

    def reply_json(self, value: object) -> None:
        self.reply(json.dumps(value).encode(), "x")

    def reply(self, body: bytes, etag: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


def run(model: str, home: Path, **env: str) -> tuple[int, list[Event]]:
    """Start a runtime and close its stdin when it is ready."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    with subprocess.Popen(
        [sys.executable, "-m", "tether.runtime", "--stream", "--model", model],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**clean, "HF_HOME": str(home), **env},
    ) as process:
        assert process.stdin
        assert process.stdout
        events = []
        for line in process.stdout:
            events.append(decode_event(line))
            if isinstance(events[-1], Ready):
                process.stdin.close()
    return process.returncode, events


def test_a_model_is_fetched_with_progress_and_then_served_without_a_network(hub: Hub, tmp_path: Path) -> None:
    code, events = run("acme/tiny", tmp_path, HF_ENDPOINT=hub.url)
    downloads = [event.fraction for event in events if isinstance(event, Loading) and event.stage == "download"]
    ready = events[-1]
    assert isinstance(ready, Ready), events
    assert code == 0
    assert downloads == sorted(downloads)
    assert downloads[-1] == 1.0
    assert (ready.model.name, ready.model.revision) == ("acme/tiny", COMMIT)
    assert not set(hub.fetched) & {"pytorch_model.bin", "consolidated.safetensors"}

    hub.fetched.clear()
    code, events = run("acme/tiny", tmp_path, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    assert isinstance(events[-1], Ready), events
    assert code == 0
    assert events[-1].model == ready.model
    assert hub.fetched == []


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (
            "acme/gated",
            "`acme/gated` is gated: accept its licence at https://huggingface.co/acme/gated, then set HF_TOKEN",
        ),
        ("acme/nothing", "there is no model `acme/nothing` on Hugging Face (a private one needs HF_TOKEN)"),
        ("microsoft/phi2", "did you mean `microsoft/phi-2` (phi-2)?"),
        ("acme/tiny@nowhere", "`acme/tiny` has no revision `nowhere`"),
        ("acme/big", "`acme/big` needs 20000.4 GB of memory as bfloat16"),
        ("acme/down", "`acme/down` is not on this machine and Hugging Face does not answer"),
    ],
)
def test_what_the_hub_does_not_give_is_refused_before_anything_is_loaded(
    hub: Hub, tmp_path: Path, model: str, says: str
) -> None:
    code, events = run(model, tmp_path, HF_ENDPOINT=hub.url)
    (fatal,) = events
    assert isinstance(fatal, Fatal)
    assert code == 1
    assert says in fatal.error.message
    assert "\n" not in fatal.error.message
    assert hub.fetched == []
