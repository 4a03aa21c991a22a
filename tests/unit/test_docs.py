"""The docs say what is true: each module has its line, each word of the tables exists, the README's commands are real."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_architecture_has_one_line_for_each_module() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    listed = re.findall(r"^\| `([a-z_0-9]+\.py)` \|", text, flags=re.MULTILINE)
    modules = sorted(path.name for path in (ROOT / "tether").glob("*.py") if not path.name.startswith("__"))
    assert sorted(listed) == modules


@pytest.mark.parametrize(
    ("library", "owners"),
    [
        ("libp2p", ["addresses.py", "host.py", "topics.py", "transport.py"]),
        ("multiaddr", ["addresses.py", "transport.py"]),
        ("fastapi", ["gateway.py"]),
        ("pyrqlite", ["database.py"]),
        ("rich", ["console.py"]),
    ],
)
def test_each_heavy_library_has_its_importers(library: str, owners: list[str]) -> None:
    pattern = re.compile(rf"^\s*(?:from|import) {library}\b", re.MULTILINE)
    importers = [path.name for path in (ROOT / "tether").glob("*.py") if pattern.search(path.read_text())]
    assert sorted(importers) == owners


def test_the_command_line_imports_nothing_heavy() -> None:
    code = "import sys, tether.cli; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"torch", "transformers", "libp2p", "fastapi", "uvicorn", "trio", "pyrqlite"} & set(loaded)


def test_every_command_that_the_readme_names_exists() -> None:
    text = (ROOT / "README.md").read_text()
    commands = set(re.findall(r"^tether ([a-z]+(?: [a-z]+)?)", text, flags=re.MULTILINE))
    assert {"status", "jobs list", "invite create"} <= commands
    for command in commands:
        words = command.split()
        done = subprocess.run([sys.executable, "-m", "tether", *words, "--help"], capture_output=True, check=False)
        assert done.returncode == 0, command


def test_links_between_docs_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
