"""How this machine is now: who uses it, its load, battery and memory. Says nothing of what a platform does not tell."""

from __future__ import annotations

import contextlib
import ctypes
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tether.politeness import Facts

_IDLE_TIME = re.compile(rb'"HIDIdleTime" = (\d+)')


class Machine:
    """Looks at the machine again and again; its load is that since the look before."""

    def __init__(self) -> None:
        self._at = time.monotonic()
        self._busy_seconds, self._own_seconds = _busy_seconds(), _own_seconds()

    def look(self) -> Facts:
        """Return how the machine is; it blocks for some milliseconds."""
        now = time.localtime()
        memory = psutil.virtual_memory()
        return Facts(
            minute_of_day=now.tm_hour * 60 + now.tm_min,
            idle_seconds=_idle_seconds(),
            others_share=self._others_share(),
            on_battery=_on_battery(),
            free_memory_share=memory.available / memory.total if memory.total else None,
        )

    def _others_share(self) -> float | None:
        at, busy, own = time.monotonic(), _busy_seconds(), _own_seconds()
        seconds = (at - self._at) * (psutil.cpu_count() or 1)
        others = (busy - self._busy_seconds) - max(0.0, own - self._own_seconds)
        self._at, self._busy_seconds, self._own_seconds = at, busy, own
        return min(1.0, max(0.0, others / seconds)) if seconds > 0 else None


def _busy_seconds() -> float:
    """Return what all processors together have worked since the machine started."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


def _own_seconds() -> float:
    """Return what this process and its children, the runtimes, have worked."""
    process = psutil.Process()
    total = 0.0
    for each in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            times = each.cpu_times()
            total += times.user + times.system
    return total


def _on_battery() -> bool | None:
    """Return whether the machine runs on its battery; None where it has none, or does not say."""
    sensors = getattr(psutil, "sensors_battery", None)
    battery = sensors() if sensors is not None else None
    return None if battery is None or battery.power_plugged is None else not battery.power_plugged


def _idle_seconds() -> float | None:
    """Return for how long nobody has touched the machine; None where that is not to be known."""
    if sys.platform == "win32":
        return _idle_on_windows()
    found = _idle_of_terminals()
    if sys.platform == "darwin" and (seconds := _idle_on_macos()) is not None:
        found.append(seconds)
    return min(found, default=None)


def _idle_of_terminals() -> list[float]:
    """Return for how long nobody typed into each terminal of a user who is logged in."""
    found: list[float] = []
    for terminal in [user.terminal for user in psutil.users() if user.terminal is not None]:
        with contextlib.suppress(OSError):
            found.append(max(0.0, time.time() - Path("/dev", terminal).stat().st_atime))
    return found


def _idle_on_macos() -> float | None:
    try:
        told = subprocess.run(["/usr/sbin/ioreg", "-c", "IOHIDSystem"], capture_output=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = _IDLE_TIME.search(told.stdout)
    return int(found.group(1)) / 1e9 if found is not None else None


def _idle_on_windows() -> float | None:
    class LastInput(ctypes.Structure):
        _fields_ = (("size", ctypes.c_uint), ("ticks", ctypes.c_uint))

    library = getattr(ctypes, "windll", None)
    last = LastInput(ctypes.sizeof(LastInput), 0)
    if library is None or not library.user32.GetLastInputInfo(ctypes.byref(last)):
        return None
    return float((library.kernel32.GetTickCount() - last.ticks) & 0xFFFFFFFF) / 1000
