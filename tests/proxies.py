"""Reverse proxies from Debian in front of a gateway: the configurations of `deploy/`, on free ports, without root."""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
import re
import shutil
import ssl
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.ports import free_port
from tests.processes import eventually

Kind = Literal["nginx", "caddy"]
DEPLOY = Path(__file__).parent.parent / "deploy"
NAME = "llm.example.org"
STOP_SECONDS = 20.0


def find(program: str) -> str:
    """Return a program of Debian's; a missing one is a failure, because the configuration would go untested."""
    found = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if found is None:
        raise RuntimeError(f"no {program}: run `apt-get install {program}` as root")
    return found


class Proxy:
    """A proxy in front of the gateway at a port; below `path`, where it passes on no other."""

    def __init__(self, kind: Kind, folder: Path, gateway_port: int, *, path: str = "") -> None:
        self.port = free_port()
        self._folder = folder
        folder.mkdir(parents=True)
        self._trusted = _certificate(folder)
        configuration = folder / "configuration"
        configuration.write_text(
            (self._nginx if kind == "nginx" else self._caddy)(gateway_port, path), encoding="utf-8"
        )
        arguments = {
            "nginx": ["-p", str(folder), "-e", "error.log", "-c", str(configuration)],
            "caddy": ["run", "--adapter", "caddyfile", "--config", str(configuration)],
        }
        with (folder / "output").open("wb") as output:
            self._process = subprocess.Popen(
                [find(kind), *arguments[kind]],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "HOME": str(folder)},
                start_new_session=True,
            )
        self.http = self.client()

    def __enter__(self) -> Self:
        def answers() -> bool:
            assert self._process.poll() is None, (self._folder / "output").read_text()
            try:
                return self.http.get("/healthz").status_code > 0
            except httpx.TransportError:
                return False

        eventually(answers, what="the proxy")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.http.close()
        self._process.terminate()
        self._process.wait(STOP_SECONDS)

    @property
    def url(self) -> str:
        """As a client has it; its name is resolved to this machine by `context` and `client`."""
        return f"https://localhost:{self.port}"

    @property
    def context(self) -> ssl.SSLContext:
        """Trusts the proxy's certificate."""
        return ssl.create_default_context(cafile=str(self._trusted))

    def client(self, address: str = "127.0.0.1") -> httpx.Client:
        """Return a client that comes from an address of this machine."""
        transport = httpx.HTTPTransport(verify=self.context, local_address=address)
        return httpx.Client(base_url=self.url.replace("localhost", "127.0.0.1"), transport=transport, timeout=30)

    def _nginx(self, gateway_port: int, path: str) -> str:
        site = (DEPLOY / "nginx.conf").read_text()
        site = site.replace("127.0.0.1:8080", f"127.0.0.1:{gateway_port}")
        site = site.replace("listen 443", f"listen 127.0.0.1:{self.port}")
        site = re.sub(r"/etc/letsencrypt/live/llm\.example\.org/(\w+)\.pem", rf"{self._folder}/\1.pem", site)
        site = site.replace("location / {", f"location {path}/ {{")
        temporary = "".join(
            f"{name}_temp_path {self._folder}/{name};\n"
            for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        user = "user root;\n" if os.geteuid() == 0 else ""  # the folder is its owner's alone
        return (
            f"{user}daemon off;\npid {self._folder}/pid;\nworker_processes 1;\nevents {{}}\n"
            f"http {{\naccess_log {self._folder}/access.log;\n{temporary}{site}\n}}\n"
        )

    def _caddy(self, gateway_port: int, path: str) -> str:
        site = (DEPLOY / "Caddyfile").read_text()
        site = site.replace("127.0.0.1:8080", f"127.0.0.1:{gateway_port}")
        tls = f"\n\ttls {self._folder}/fullchain.pem {self._folder}/privkey.pem\n\tbind 127.0.0.1"
        site = site.replace(f"\n{NAME} {{", f"\nhttps://127.0.0.1:{self.port} {{{tls}")
        if path:
            site = site.replace("reverse_proxy ", f"reverse_proxy {path}/* ")
        return f"{{\n\tadmin off\n\tauto_https disable_redirects\n}}\n{site}"


def _certificate(folder: Path) -> Path:
    """Make a key and a certificate for loopback, as Let's Encrypt names them; return the certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
    now = dt.datetime.now(dt.UTC)
    names = [x509.DNSName(NAME), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "fullchain.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "privkey.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "fullchain.pem"
