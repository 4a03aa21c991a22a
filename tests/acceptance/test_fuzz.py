"""Whatever fits or breaks the served OpenAPI document: no mistake of ours, and each answer as the document says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import Machine

MIN_CASES = 2000
EXAMPLES = os.environ.get("TETHER_FUZZ_EXAMPLES", "20")
"""For each operation and phase. `make fuzz` has more of them, and another seed each time."""
SEED = os.environ.get("TETHER_FUZZ_SEED", "1")
CONFIGURATION = Path(__file__).parent.parent / "schemathesis.toml"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Machine]:
    with Machine(tmp_path / "served") as machine:
        up = machine.start("up", "--log-format", "json", **machine.scripted(slots=16))
        machine.wait_ready(up)
        yield machine
        assert up.is_alive
        assert "Traceback" not in up.output
        assert machine.infer("tokens=1").status_code == 200


def words_of(machine: Machine) -> list[str]:
    """Return what makes a request meet something: the model, a script that it follows, and what there is already."""
    chat = {"model": "demo", "messages": [{"role": "user", "content": "tokens=2"}]}
    line = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": chat}
    job = machine.http.post("/v1/chat/completions", json=chat)
    response = machine.http.post("/v1/responses", json={"model": "demo", "input": "tokens=2"})
    file = machine.http.post(
        "/v1/files", data={"purpose": "batch"}, files={"file": ("batch.jsonl", json.dumps(line).encode())}
    )
    asked = {"input_file_id": file.json()["id"], "endpoint": line["url"], "completion_window": "24h"}
    batch = machine.http.post("/v1/batches", json=asked)
    found = [answer.json()["id"] for answer in (response, file, batch)]
    return ["demo", "1.0", "tokens=2", "user", job.headers["x-tether-job-id"], *found]


def configured(machine: Machine) -> Path:
    """Return the configuration, with words of this network."""
    own = (
        f"[dictionaries.words]\nvalues = {json.dumps(words_of(machine))}\n\n"
        '[generation.dictionaries.string]\ndictionary = "words"\nprobability = 0.4\n'
    )
    path = machine.folder / "schemathesis.toml"
    path.write_text(f"{CONFIGURATION.read_text()}\n{own}")
    return path


def test_every_answer_to_anything_is_as_the_openapi_document_says_and_none_is_a_500(served: Machine) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(configured(served)), "--no-color", "run"),
            *(f"{served.url}/openapi.json", "--checks", "all", "--max-examples", EXAMPLES, "--seed", SEED),
            *("--generation-database", "none", "--workers", "1", "--request-timeout", "30"),
        ],
        cwd=served.folder,
        env=served.environment,
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr
    cases = re.search(r"(\d+) generated", done.stdout)
    assert cases is not None, done.stdout
    print(f"{cases[1]} cases")  # noqa: T201 - shown with -s, and by `make fuzz`
    assert int(cases[1]) >= MIN_CASES
