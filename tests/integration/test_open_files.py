from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
import resource, sys
from tether import open_files
soft, hard = (int(each) for each in sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
print(open_files.raise_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def _raised(soft: int, hard: int) -> list[int]:
    """What is said, and what holds, in a process that begins with these limits."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(soft), str(hard)], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return [int(each) for each in done.stdout.split()]


def test_a_process_may_open_as_many_files_as_its_hard_limit_says() -> None:
    assert _raised(100, 300) == [300, 300, 300]
    assert _raised(300, 300) == [300, 300, 300]
