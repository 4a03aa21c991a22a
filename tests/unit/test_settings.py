from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from tether.errors import UsageError
from tether.settings import (
    GatewaySettings,
    NodeSettings,
    OrchestratorSettings,
    WorkerSettings,
    default_config_file,
    default_data_dir,
    load_config,
)

COMMANDS = {
    "gateway": {"port": False, "host": False, "keep": False},
    "worker": {"model": True, "dtype": False},
}


@pytest.mark.parametrize("section", [NodeSettings, GatewaySettings, OrchestratorSettings, WorkerSettings])
def test_the_defaults_hold_and_a_section_is_frozen(section: type[Any]) -> None:
    settings = section()
    with pytest.raises(AttributeError, match="immutable"):
        setattr(settings, section.__struct_fields__[0], None)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (NodeSettings, {"silence_seconds": 0.2}, "--silence is from 0.3 to 600 seconds"),
        (NodeSettings, {"silence_seconds": 601.0}, "--silence"),
        (NodeSettings, {"silence_seconds": float("nan")}, "--silence"),
        (NodeSettings, {"grace_seconds": -1.0}, "--grace is from 0 to 3600 seconds"),
        (NodeSettings, {"grace_seconds": 3601.0}, "--grace"),
        (NodeSettings, {"name": " "}, "--name is not empty"),
        (NodeSettings, {"name": "two\nlines"}, "--name has no control characters"),
        (NodeSettings, {"region": "\x1b[2J"}, "--region has no control characters"),
        (NodeSettings, {"region": ""}, "--region is a short name without '/'"),
        (NodeSettings, {"region": "eu/west"}, "--region"),
        (GatewaySettings, {"port": -1}, "--port is from 0 to 65535"),
        (GatewaySettings, {"port": 65536}, "--port"),
        (GatewaySettings, {"max_body_bytes": 1023}, "--max-body is from 1024 to 786432 bytes"),
        (GatewaySettings, {"max_body_bytes": 768 * 1024 + 1}, "--max-body"),
        (GatewaySettings, {"requests_per_minute": -1}, "--requests-per-minute"),
        (GatewaySettings, {"deadline_seconds": 0.0}, "--deadline is more than 0 and at most 3600 seconds"),
        (GatewaySettings, {"deadline_seconds": 3600.5}, "--deadline"),
        (OrchestratorSettings, {"max_queued": -1}, "--max-queued is 0 or more"),
        (OrchestratorSettings, {"max_attempts": 0}, "--max-attempts is from 1 to 100"),
        (OrchestratorSettings, {"max_attempts": 101}, "--max-attempts"),
        (OrchestratorSettings, {"max_lost_workers": 0}, "--max-lost-workers is from 1 to 100"),
        (OrchestratorSettings, {"lost_gateway_seconds": -1.0}, "--lost-gateway is from 0 to 86400 seconds"),
        (OrchestratorSettings, {"retention_days": 0.0}, "--retention-days is more than 0"),
        (WorkerSettings, {"models": ()}, "--model names at least one model"),
        (WorkerSettings, {"models": ("demo", "demo")}, "--model names a model twice"),
        (
            WorkerSettings,
            {"model_version": "1\n"},
            "--model, --model-version and --gpu-class have no control characters",
        ),
        (WorkerSettings, {"threads": 0}, "--threads is 1 or more"),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_flag(section: type[Any], values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        section(**values)
    assert caught.value.message.startswith(message)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (NodeSettings, {"silence_seconds": 0.3, "grace_seconds": 0.0}),
        (GatewaySettings, {"port": 0, "max_body_bytes": 1024, "requests_per_minute": 0, "deadline_seconds": 3600.0}),
        (GatewaySettings, {"host": "::1"}),
        (OrchestratorSettings, {"max_queued": 0, "max_attempts": 1}),
        (WorkerSettings, {"models": ("demo", "phi-2"), "threads": 1}),
    ],
)
def test_the_ends_of_a_range_are_in_it(section: type[Any], values: dict[str, Any]) -> None:
    settings = section(**values)
    assert {name: getattr(settings, name) for name in values} == values
    assert msgspec.structs.replace(settings) == settings


def test_the_folders_are_the_platforms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    assert default_data_dir() == tmp_path / "data" / "tether"
    assert default_config_file() == tmp_path / "config" / "tether" / "config.toml"
    assert NodeSettings().data_dir == tmp_path / "data" / "tether"


# --- the configuration file ------------------------------------------------------------------------------------------


def test_a_file_gives_each_command_its_defaults(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('[gateway]\nport = 9000\nkeep = "nothing"\n[worker]\nmodel = ["demo", "phi-2"]\n')
    assert load_config(path, COMMANDS) == {
        "gateway": {"port": 9000, "keep": "nothing"},
        "worker": {"model": ["demo", "phi-2"]},
    }


def test_a_lone_value_will_do_for_a_list(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('[worker]\nmodel = "phi-2"\n')
    assert load_config(path, COMMANDS) == {"worker": {"model": ["phi-2"]}}


def test_a_missing_file_is_an_empty_one(tmp_path: Path) -> None:
    assert load_config(tmp_path / "none.toml", COMMANDS) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[gatway]\nport = 1", "there is no section [gatway]; did you mean 'gateway'?"),
        ("[zebra]\nport = 1", "there is no section [zebra]; it has gateway, worker"),
        ("port = 1", "there is no section [port]; it has gateway, worker"),
        ("gateway = 1", "there is no section [gateway]"),
        ("[gateway]\nprot = 1", "[gateway] has no key 'prot'; did you mean 'port'?"),
        ("[gateway]\nmodel = 1", "[gateway] has no key 'model'; it has host, keep, port"),
        ("[gateway]\nport = [1]", "[gateway] port is one value, not list"),
        ("[worker]\nmodel = {a = 1}", "[worker] model is one value, not dict"),
    ],
)
def test_a_section_or_a_key_that_does_not_exist_is_named_with_the_nearest(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_config(path, COMMANDS)
    assert caught.value.message.startswith(f"{path}: {message}")


@pytest.mark.parametrize("content", [b"[gateway", b"a = = 1", b"\xff\xfe", b"[gateway]\nport = 1\nport = 2"])
def test_a_file_that_is_no_toml_is_refused_with_its_place(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="cannot read the configuration file") as caught:
        load_config(path, COMMANDS)
    assert str(path) in caught.value.message


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the configuration file"):
        load_config(tmp_path, COMMANDS)
