"""The addresses that nodes dial, listen on and announce, and what of this machine they mean."""

from __future__ import annotations

import errno
import ipaddress
import socket

import multiaddr
import psutil
from libp2p.peer.id import ID

from tether.errors import PortTaken, UsageError

ADDRESS_FORM = "/ip4/<address>/tcp/<port>/p2p/<peer id>"


def parse_address(address: str) -> tuple[multiaddr.Multiaddr, str]:
    """Return a dialable address and the peer id in it; raise `UsageError` that shows the form for anything else."""
    try:
        parsed = multiaddr.Multiaddr(address)
        peer_id = parsed.value_for_protocol("p2p")
        parsed.value_for_protocol("tcp")
        ID.from_string(peer_id)
    except (multiaddr.exceptions.Error, ValueError, LookupError, TypeError) as exc:
        raise UsageError(f"{address!r} is not an address that can be dialled: {ADDRESS_FORM}") from exc
    return parsed, str(peer_id)


def parse_listen(address: str) -> tuple[multiaddr.Multiaddr, str, int]:
    """Return an address to listen on, its host and its port; raise `UsageError` for anything else."""
    try:
        parsed = multiaddr.Multiaddr(address)
        protocols = [protocol.name for protocol in parsed.protocols()]
        host = str(parsed.value_for_protocol(protocols[0]))
        ipaddress.ip_address(host)
        port = int(parsed.value_for_protocol("tcp"))
    except (multiaddr.exceptions.Error, ValueError, LookupError, TypeError) as exc:
        raise UsageError(f"{address!r} is not an address to listen on: /ip4/<address>/tcp/<port>") from exc
    return parsed, host, port


def parse_announce(address: str) -> str:
    """Return an address that others are to be told, without a peer id; raise `UsageError` for anything else."""
    try:
        parsed = multiaddr.Multiaddr(address)
        parsed.value_for_protocol("tcp")
    except (multiaddr.exceptions.Error, ValueError, LookupError, TypeError) as exc:
        raise UsageError(f"{address!r} is not an address to announce: /ip4/<address>/tcp/<port>") from exc
    return str(parsed).partition("/p2p/")[0]


def check_port(host: str, port: int) -> None:
    """Raise `PortTaken` where somebody listens there, `UsageError` where this machine cannot listen there."""
    # libp2p listens with SO_REUSEPORT, so a second process gets the same port without an error and half of the
    # connections. This probe binds without it, and fails where anybody listens.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as exc:
            if exc.errno == errno.EADDRINUSE:
                raise PortTaken(
                    f"port {port} on {host} is taken; stop the process that listens there, or listen elsewhere: "
                    f"--listen /ip{6 if ':' in host else 4}/{host}/tcp/{port + 1}"
                ) from exc
            raise UsageError(f"cannot listen on {host} port {port}: {exc.strerror}") from exc


def reachable(address: str) -> list[str]:
    """Return the address, or one for each of this machine's where it stands for all of them."""
    for wildcard, family, protocol in (("0.0.0.0", socket.AF_INET, "ip4"), ("::", socket.AF_INET6, "ip6")):  # noqa: S104 - compared with, not listened on
        prefix = f"/{protocol}/{wildcard}/"
        if address.startswith(prefix):
            own = [
                entry.address
                for entries in psutil.net_if_addrs().values()
                for entry in entries
                if entry.family == family and "%" not in entry.address
            ]
            own.sort(key=lambda ip: ipaddress.ip_address(ip).is_loopback)
            return [f"/{protocol}/{ip}/{address.removeprefix(prefix)}" for ip in own]
    return [address]
