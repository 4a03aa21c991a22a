"""The built wheel has everything that a running network needs, and the base install needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.processes import ANSWER, Machine, Process

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built as any installer would, from the checkout as it is."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(command, check=True)
    [built] = folder.glob("*.whl")
    return built


def test_the_wheel_has_migrations_queries_and_the_demo_model(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"tether/migrations/0001_initial.sql", "tether/queries/jobs.sql", "tether/py.typed"} <= names
    assert {"tether/models/demo/model.safetensors", "tether/models/demo/tokenizer.json"} <= names
    assert not any(name.startswith(("tests/", "tools/", "docs/")) for name in names)
    assert wheel.stat().st_size < 8_000_000


def test_the_wheel_installed_in_a_fresh_environment_runs_the_network(wheel: Path, machine: Machine) -> None:
    environment = machine.folder / "venv"
    venv.create(environment, with_pip=True)
    python = environment / "bin/python"
    install = [str(python), "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True)
    # The libraries are this environment's own: installing them again would test the network, not the wheel.
    site = Path(sysconfig.get_paths(vars={"base": str(environment), "platbase": str(environment)})["purelib"])
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")

    machine.environment.pop("PYTHONPATH", None)
    where = "import tether; print(tether.__file__)"
    found = subprocess.run(
        [str(python), "-c", where],
        check=True,
        capture_output=True,
        text=True,
        cwd=machine.folder,
        env=machine.environment,
    )
    assert str(environment) in found.stdout

    up = Process(["up"], machine.environment, machine.folder / "up.log", python=str(python), folder=machine.folder)
    try:
        up.wait_for("Ready.")
        assert machine.infer().json()["result"] == ANSWER
        command = [str(environment / "bin/tether"), "jobs", "list", "--json"]
        listed = subprocess.run(command, check=True, capture_output=True, env=machine.environment, cwd=machine.folder)
        assert [job["status"] for job in json.loads(listed.stdout)] == ["completed"]
        assert up.stop() == 0
    finally:
        up.kill()


def test_without_torch_a_worker_says_what_to_install_and_the_rest_runs(machine: Machine) -> None:
    hidden = machine.folder / "hidden"
    hidden.mkdir()
    # An import hook that stands for an environment in which only the base install was made.
    (hidden / "sitecustomize.py").write_text(
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {'torch', 'transformers'}:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Hidden())\n"
    )
    python_path = f"{hidden}:{ROOT}"
    refused = machine.run("worker", PYTHONPATH=python_path)
    assert refused.returncode == 1
    assert "pip install 'tether[worker]'" in refused.stderr
    assert "Traceback" not in refused.stderr
    roles = [machine.start(role, PYTHONPATH=python_path) for role in ("gateway", "orchestrator")]
    roles.append(machine.start("worker", PYTHONPATH=python_path, **machine.scripted()))
    machine.wait_ready(*roles)
    assert machine.infer("tokens=2").json()["result"] == "0 1 "
