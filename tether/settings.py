"""What can be set, by section: names, defaults and checks, frozen once made.

A value comes from a flag, else from the environment (`TETHER_GATEWAY_PORT` is `--port` of `tether gateway`), else from
the configuration file, else from the default here. The command line does the choosing (cli.py); what it chose is checked
here, once, and a value out of range is a `UsageError` that names the setting.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
import socket
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import platformdirs

from tether.bounds import MAX_COUNT, MAX_MODELS, MAX_NAME_CHARS, MAX_SECONDS
from tether.errors import UsageError
from tether.politeness import Politeness
from tether.records import Keep


def default_data_dir() -> Path:
    """Return the platform's folder for Tether's data (`~/.local/share/tether` on Linux)."""
    return Path(platformdirs.user_data_dir("tether", appauthor=False))


def default_config_file() -> Path:
    """Return the platform's place of the configuration file (`~/.config/tether/config.toml` on Linux)."""
    return Path(platformdirs.user_config_dir("tether", appauthor=False)) / "config.toml"


def _check(condition: bool, name: str, message: str) -> None:
    if not condition:
        raise UsageError(f"{name} {message}")


def _is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text.strip())
    except ValueError:
        return False
    return True


class NodeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What every role of a process shares: its folder, its place, its links."""

    data_dir: Path = msgspec.field(default_factory=default_data_dir)
    region: str = "local"
    name: str = msgspec.field(default_factory=socket.gethostname)
    silence_seconds: float = 3.0
    """A link that says nothing for so long is dead."""
    grace_seconds: float = 20.0
    """How long a stopping role lets running jobs finish."""
    link_buffer_bytes: int = 16 << 20
    """How much may wait to be sent on one link before it counts as full."""

    def __post_init__(self) -> None:
        _check(bool(self.name.strip()), "--name", "is not empty")
        for setting, value in (("--name", self.name), ("--region", self.region)):
            _check(len(value) <= MAX_NAME_CHARS, setting, f"has at most {MAX_NAME_CHARS} characters")
            _check(value.isprintable(), setting, "has no control characters")
        _check(self.data_dir != Path(), "--data-dir", "is empty: name a folder, or leave it out")
        _check(0.3 <= self.silence_seconds <= 600, "--silence", "is from 0.3 to 600 seconds")
        _check(0 <= self.grace_seconds <= 3600, "--grace", "is from 0 to 3600 seconds")
        _check(self.link_buffer_bytes >= 2 << 20, "link_buffer_bytes", "is 2 MiB or more: one frame has to fit")
        _check(bool(self.region) and "/" not in self.region, "--region", "is a short name without '/'")


class GatewaySettings(msgspec.Struct, frozen=True, kw_only=True):
    """The HTTP side."""

    host: str = "127.0.0.1"
    port: int = 8080
    store: str | None = None
    """Where job listings are read directly; None: an orchestrator is asked."""
    max_body_bytes: int = 256 * 1024
    max_file_bytes: int = 64 << 20
    """Of an uploaded file; all of a tenant's may have 16 times as much."""
    requests_per_minute: int = 600
    """For a tenant with no limit of its own; 0: none."""
    deadline_seconds: float = 300.0
    """For a request that names none, and the most that one may name is `max_deadline_seconds`."""
    max_deadline_seconds: float = 3600.0
    max_open_requests: int = 2000
    max_sockets: int = 1000
    max_jobs_per_socket: int = 64
    keep: Keep = "all"
    root_path: str = ""
    """Path under which a reverse proxy serves it, such as `/tether`; the proxy may take it away or pass it on."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that the API is asked for by, beside those of this machine: what a reverse proxy passes on."""
    trusted_proxies: str = "127.0.0.1"
    """Addresses and networks whose `X-Forwarded-For` and `-Proto` count, separated by commas; empty: nobody's."""
    cors_origins: tuple[str, ...] = ()
    """Origins of web pages that may call the API and open sockets; none: no page of another origin can."""
    access_log: bool = True
    keepalive_seconds: float = 15.0
    """A comment line goes out on a stream that was silent for so long, and a ping on a socket."""
    pong_seconds: float = 20.0
    """A socket's client that has not answered a ping for so long is gone."""

    def __post_init__(self) -> None:
        _check(0 <= self.port <= 65535, "--port", "is from 0 to 65535")
        _check(
            1024 <= self.max_body_bytes <= 768 * 1024,
            "--max-body",
            "is from 1024 to 786432 bytes (a frame holds 1 MiB)",
        )
        _check(1024 <= self.max_file_bytes <= 1 << 30, "--max-file", "is from 1024 to 1073741824 bytes")
        _check(
            0 <= self.requests_per_minute <= MAX_COUNT,
            "--requests-per-minute",
            f"is 0 (no limit) or more, {MAX_COUNT} at most",
        )
        longest = self.max_deadline_seconds
        _check(longest <= MAX_SECONDS, "max_deadline_seconds", f"is at most {MAX_SECONDS:g} seconds")
        _check(0 < self.deadline_seconds <= longest, "--deadline", f"is more than 0 and at most {longest:g} seconds")
        _check(self.max_open_requests >= 1, "max_open_requests", "is 1 or more")
        _check(self.max_sockets >= 1, "max_sockets", "is 1 or more")
        _check(self.max_jobs_per_socket >= 1, "max_jobs_per_socket", "is 1 or more")
        _check(
            re.fullmatch(r"(/[A-Za-z0-9._~-]+)*", self.root_path) is not None,
            "--root-path",
            f"is a path such as /tether, without a slash at its end, not {self.root_path!r}",
        )
        for address in filter(None, self.trusted_proxies.split(",")):
            _check(_is_network(address), "--trusted-proxies", f"has addresses and networks, not {address!r}")
        for origin in self.cors_origins:
            _check(
                re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s*]+", origin) is not None,
                "--cors-origin",
                f"is one page's origin such as https://chat.example.org, not {origin!r}",
            )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it; otherwise it needs API keys."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def hosts(self) -> tuple[str, ...]:
        """All names that a request may be for, in lower case."""
        return ("localhost", "127.0.0.1", "[::1]", self.host.lower(), *(name.lower() for name in self.allowed_hosts))


class OrchestratorSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The scheduling side."""

    store: str | None = None
    """None: the SQLite file in the data directory."""
    listen: tuple[str, ...] = ("/ip4/127.0.0.1/tcp/4100",)
    announce: tuple[str, ...] = ()
    """Addresses that others should dial, where they differ from those listened on."""
    max_queued: int = 1000
    max_queued_per_tenant: int | None = None
    """A bound for each tenant beside its share, which is as many places as are free still, times its weight."""
    max_attempts: int = 3
    """How many workers may fail at a job before it has failed."""
    max_lost_workers: int = 3
    """A job that so many workers went down under is taken for what takes them down."""
    lost_gateway_seconds: float | None = None
    """A job whose client waited at a gateway that was lost is cancelled after so long, unless the client comes back
    through another one; None: it finishes, and its result can be fetched."""
    retention_days: float = 30.0
    """After so long, prompts and answers are dropped from the store."""
    max_peers: int = 2000

    def __post_init__(self) -> None:
        _check(self.max_queued >= 0, "--max-queued", "is 0 or more")
        most = self.max_queued_per_tenant
        _check(most is None or most >= 1, "--max-queued-per-tenant", "is 1 or more")
        _check(1 <= self.max_attempts <= 100, "--max-attempts", "is from 1 to 100")
        _check(1 <= self.max_lost_workers <= 100, "--max-lost-workers", "is from 1 to 100")
        lost = self.lost_gateway_seconds
        _check(lost is None or 0 <= lost <= 86_400, "--lost-gateway", "is from 0 to 86400 seconds")
        _check(self.retention_days > 0, "--retention-days", "is more than 0")


_DTYPES = ("auto", "float32", "bfloat16", "float16", "int8", "int4")


class WorkerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The lending side."""

    models: tuple[str, ...] = ("demo",)
    model_version: str | None = None
    """The version to serve the models as; None: the catalogue's."""
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    slots: int | None = None
    """Jobs at once; None: by the model's size and the memory."""
    engine: str = "transformers"
    """`openai` lends the server at `base_url`, whose key is in the environment variable `api_key_env`."""
    base_url: str | None = None
    api_key_env: str | None = None
    gpu_class: str = "cpu"
    runtime_module: str = "tether.runtime"
    """The Python module that the runtime child runs; benchmarks put a scripted engine here."""
    presence_seconds: float = 5.0
    politeness: Politeness = Politeness()
    """When it takes no jobs of its own accord."""

    def __post_init__(self) -> None:
        _check(bool(self.models), "--model", "names at least one model")
        _check(len(set(self.models)) == len(self.models), "--model", "names a model twice")
        _check(len(self.models) <= MAX_MODELS, "--model", f"names at most {MAX_MODELS} models")
        names = (*self.models, self.model_version or "", self.gpu_class)
        _check(
            max(map(len, names)) <= MAX_NAME_CHARS,
            "--model, --model-version and --gpu-class",
            f"have at most {MAX_NAME_CHARS} characters each",
        )
        _check(
            all(name.isprintable() for name in names),
            "--model, --model-version and --gpu-class",
            "have no control characters",
        )
        _check(self.threads is None or self.threads >= 1, "--threads", "is 1 or more")
        _check(0.1 <= self.presence_seconds <= 10, "presence_seconds", "is from 0.1 to 10: after 20 s a state is stale")
        _check(self.slots is None or 1 <= self.slots <= 4096, "--slots", "is from 1 to 4096")
        _check(self.engine in {"transformers", "openai"}, "--engine", "is transformers or openai")
        _check(
            re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?|mps", self.device) is not None,
            "--device",
            f"is auto, cpu, cuda (or one of several, such as cuda:1) or mps, not {self.device!r}",
        )
        _check(self.dtype in _DTYPES, "--dtype", f"is one of {', '.join(_DTYPES)}, not {self.dtype!r}")
        is_remote = self.engine == "openai"
        _check(
            is_remote == (self.base_url is not None), "--base-url", "goes with `--engine openai`, and neither without"
        )
        _check(is_remote or self.api_key_env is None, "--api-key-env", "goes with `--engine openai`")
        _check(
            not is_remote or (self.dtype, self.device, self.threads) == ("auto", "auto", None),
            "--engine openai",
            "leaves --dtype, --device and --threads to the other server",
        )


COMMON = "common"
"""The section whose keys count for every command that has them."""


def load_config(path: Path, commands: dict[str, dict[str, bool]]) -> dict[str, dict[str, Any]]:
    """Return the configuration file's sections, one for each role's command and `common`, as defaults for options.

    `commands` names every section's options, and whether an option is a list; a lone value will do for a list. Raises
    `UsageError` for a file that is not TOML, and for a section or a key that does not exist, with the nearest that does.
    A missing file is an empty one.
    """
    try:
        sections = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise UsageError(f"cannot read the configuration file {path}: {exc}") from exc
    for section, values in sections.items():
        if section not in commands or not isinstance(values, dict):
            raise UsageError(f"{path}: there is no section [{section}]{_near(section, commands)}")
        for key, value in values.items():
            if key not in commands[section]:
                raise UsageError(f"{path}: [{section}] has no key {key!r}{_near(key, commands[section])}")
            is_list = commands[section][key]
            if isinstance(value, dict) or (isinstance(value, list) and not is_list):
                raise UsageError(f"{path}: [{section}] {key} is one value, not {type(value).__name__}")
            if is_list and not isinstance(value, list):
                values[key] = [value]
    return sections


def _near(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(sorted(known))}"
