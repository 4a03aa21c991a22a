"""The command line's options, each once: its flag, its environment variable, what it is for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from tether.errors import UsageError

DataDir = Annotated[
    Path,
    typer.Option(
        "--data-dir",
        envvar="TETHER_DATA_DIR",
        help="Keys, network and SQLite store.",
        show_default="the platform's folder",
    ),
]
Region = Annotated[
    str, typer.Option("--region", envvar="TETHER_REGION", help="Where this node is; jobs may prefer a region.")
]
NodeName = Annotated[
    str, typer.Option("--name", envvar="TETHER_NAME", help="What people call this node.", show_default="host name")
]
Silence = Annotated[
    float, typer.Option("--silence", envvar="TETHER_SILENCE", help="Seconds after which a silent peer is dead.")
]
Grace = Annotated[
    float,
    typer.Option(
        "--grace",
        envvar="TETHER_GRACE",
        help="Seconds that running jobs have when this node stops or pauses; an orchestrator's also when their worker is drained.",
    ),
]
StoreUrl = Annotated[
    str | None,
    typer.Option(
        "--store",
        envvar="TETHER_STORE",
        help="sqlite:///path or rqlite://host:4001[,host2:4001].",
        show_default="tether.db in the data directory",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Verbose = Annotated[
    int, typer.Option("--verbose", "-v", count=True, help="Log more; twice: libraries too.", show_default=False)
]
LogFormat = Annotated[str, typer.Option("--log-format", envvar="TETHER_LOG_FORMAT", help="auto, plain or json.")]

Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        envvar="TETHER_URL",
        help="The gateway to ask.",
        show_default="http://localhost:8080, or the port in TETHER_GATEWAY_PORT",
    ),
]
Key = Annotated[
    str | None,
    typer.Option("--key", envvar="TETHER_API_KEY", help="An API key, where the network has keys.", show_default=False),
]


def not_empty(word: str | None) -> str | None:
    """Return a word that names something; raise `UsageError` for an empty one, such as a script's unset variable."""
    if word is not None and not word.strip():
        raise UsageError("an id or a name is empty: is a variable of your script not set?")
    return word


def gateway_url(url: str | None) -> str:
    """Return the gateway that a command asks: the one that is named, or this machine's."""
    return url or f"http://127.0.0.1:{os.environ.get('TETHER_GATEWAY_PORT') or 8080}"


Host = Annotated[str, typer.Option("--host", envvar="TETHER_GATEWAY_HOST", help="Address of the HTTP API.")]
Port = Annotated[
    int, typer.Option("--port", envvar="TETHER_GATEWAY_PORT", help="Port of the HTTP API; 0: any free one.")
]
MaxBody = Annotated[
    int, typer.Option("--max-body", envvar="TETHER_GATEWAY_MAX_BODY", help="Largest request body, in bytes.")
]
MaxFile = Annotated[
    int, typer.Option("--max-file", envvar="TETHER_GATEWAY_MAX_FILE", help="Largest file for a batch, in bytes.")
]
RequestsPerMinute = Annotated[
    int,
    typer.Option(
        "--requests-per-minute", envvar="TETHER_GATEWAY_REQUESTS_PER_MINUTE", help="For each tenant; 0: no limit."
    ),
]
Deadline = Annotated[
    float, typer.Option("--deadline", envvar="TETHER_GATEWAY_DEADLINE", help="Seconds for a request that names none.")
]
KeepTexts = Annotated[
    str, typer.Option("--keep", envvar="TETHER_GATEWAY_KEEP", help="Texts kept after a job: all, result or nothing.")
]
RootPath = Annotated[
    str,
    typer.Option("--root-path", envvar="TETHER_GATEWAY_ROOT_PATH", help="Path under which a reverse proxy serves it."),
]
AllowedHosts = Annotated[
    list[str] | None,
    typer.Option(
        "--allowed-host", envvar="TETHER_GATEWAY_ALLOWED_HOST", help="A name that a proxy asks for it by; repeat it."
    ),
]
TrustedProxies = Annotated[
    str,
    typer.Option(
        "--trusted-proxies",
        envvar="TETHER_GATEWAY_TRUSTED_PROXIES",
        help="Addresses or networks, with commas, whose X-Forwarded-* counts.",
    ),
]
CorsOrigins = Annotated[
    list[str] | None,
    typer.Option(
        "--cors-origin",
        envvar="TETHER_GATEWAY_CORS_ORIGIN",
        help="A web page's origin, e.g. https://chat.example.org, that may call it; repeat it.",
    ),
]
AccessLog = Annotated[
    bool, typer.Option("--access-log/--no-access-log", envvar="TETHER_GATEWAY_ACCESS_LOG", help="Log each request.")
]

Listen = Annotated[
    list[str],
    typer.Option(
        "--listen", envvar="TETHER_ORCHESTRATOR_LISTEN", help="Where peers dial in; /ip4/0.0.0.0/tcp/4100 for all."
    ),
]
Announce = Annotated[
    list[str] | None,
    typer.Option(
        "--announce", envvar="TETHER_ORCHESTRATOR_ANNOUNCE", help="Addresses to tell others, where they differ."
    ),
]
MaxQueued = Annotated[
    int, typer.Option("--max-queued", envvar="TETHER_ORCHESTRATOR_MAX_QUEUED", help="Jobs that may wait for a slot.")
]
MaxQueuedPerTenant = Annotated[
    int | None,
    typer.Option(
        "--max-queued-per-tenant",
        envvar="TETHER_ORCHESTRATOR_MAX_QUEUED_PER_TENANT",
        help="The same for one tenant.",
        show_default="as many as places are free",
    ),
]
MaxAttempts = Annotated[
    int,
    typer.Option("--max-attempts", envvar="TETHER_ORCHESTRATOR_MAX_ATTEMPTS", help="Workers that may fail at a job."),
]
MaxLostWorkers = Annotated[
    int,
    typer.Option(
        "--max-lost-workers",
        envvar="TETHER_ORCHESTRATOR_MAX_LOST_WORKERS",
        help="Workers that may go down under a job before it fails as poison.",
    ),
]
LostGateway = Annotated[
    float | None,
    typer.Option(
        "--lost-gateway",
        envvar="TETHER_ORCHESTRATOR_LOST_GATEWAY",
        help="Seconds until jobs are cancelled whose clients waited at a gateway that was lost, and did not come back.",
        show_default="they finish",
    ),
]
RetentionDays = Annotated[
    float,
    typer.Option("--retention-days", envvar="TETHER_ORCHESTRATOR_RETENTION_DAYS", help="Days that texts are kept."),
]

Models = Annotated[
    list[str],
    typer.Option(
        "--model",
        "-m",
        envvar="TETHER_WORKER_MODEL",
        help="A catalogue name, a Hugging Face id or a folder; repeat it.",
    ),
]
ModelVersion = Annotated[
    str | None,
    typer.Option(
        "--model-version",
        envvar="TETHER_WORKER_MODEL_VERSION",
        help="Version to serve as.",
        show_default="the catalogue's",
    ),
]
Dtype = Annotated[
    str, typer.Option("--dtype", envvar="TETHER_WORKER_DTYPE", help="auto, float32, bfloat16, float16, int8 or int4.")
]
Device = Annotated[str, typer.Option("--device", envvar="TETHER_WORKER_DEVICE", help="auto, cpu, cuda or mps.")]
Threads = Annotated[
    int | None,
    typer.Option("--threads", envvar="TETHER_WORKER_THREADS", help="Processor threads.", show_default="by size"),
]
Slots = Annotated[
    int | None,
    typer.Option("--slots", envvar="TETHER_WORKER_SLOTS", help="Jobs at once.", show_default="by model and memory"),
]
Engine = Annotated[
    str, typer.Option("--engine", envvar="TETHER_WORKER_ENGINE", help="transformers, or openai: lend another server.")
]
BaseUrl = Annotated[
    str | None,
    typer.Option("--base-url", envvar="TETHER_WORKER_BASE_URL", help="That server, e.g. http://127.0.0.1:8000/v1."),
]
ApiKeyEnv = Annotated[
    str | None,
    typer.Option(
        "--api-key-env", envvar="TETHER_WORKER_API_KEY_ENV", help="The environment variable with that server's key."
    ),
]
GpuClass = Annotated[
    str, typer.Option("--gpu-class", envvar="TETHER_WORKER_GPU_CLASS", help="Class of this machine, as others see it.")
]
Polite = Annotated[
    bool,
    typer.Option(
        "--polite",
        envvar="TETHER_WORKER_POLITE",
        help="Take no jobs while the owner or other programs use the machine, on battery, or short of memory.",
    ),
]
LendingHours = Annotated[
    str | None,
    typer.Option("--hours", envvar="TETHER_WORKER_HOURS", help="Take jobs only then, e.g. 20:00-08:00, local time."),
]
RuntimeModule = Annotated[str, typer.Option("--runtime-module", envvar="TETHER_WORKER_RUNTIME_MODULE", hidden=True)]
