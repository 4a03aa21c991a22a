"""The libp2p host under links and topics: Noise and yamux only, read and written in few steps, with limits that fit.

Defects by their numbers are in docs/libp2p.md.
"""

from __future__ import annotations

from typing import cast

from libp2p import new_host
from libp2p.abc import IRawConnection, ISecureConn
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.io.trio import TrioTCPStream
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.rcmgr.connection_limits import ConnectionLimits
from libp2p.rcmgr.manager import ResourceLimits, ResourceManager
from libp2p.security.noise.io import NoiseTransportReadWriter
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as Noise
from libp2p.security.secure_session import SecureSession
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux

from tether.errors import LinkClosed
from tether.node_key import NodeKey
from tether.noise_stream import NoiseStream


class _Session(SecureSession):
    """libp2p's secure session over `NoiseStream`."""

    def __init__(self, session: SecureSession) -> None:
        conn = cast(NoiseTransportReadWriter, session.conn)
        super().__init__(
            local_peer=session.local_peer,
            local_private_key=session.local_private_key,
            remote_peer=session.remote_peer,
            remote_permanent_pubkey=session.remote_permanent_pubkey,
            is_initiator=session.is_initiator,
            conn=conn,
        )
        self.tcp = cast(TrioTCPStream, cast(RawConnection, conn.read_writer.read_write_closer).stream)
        self._bytes = NoiseStream(self.tcp.stream, conn.noise_state)

    async def read(self, n: int | None = None) -> bytes:
        try:
            return await self._bytes.read(n)
        except LinkClosed as exc:
            raise ConnectionClosedError(exc.message) from exc

    async def write(self, data: bytes) -> None:
        try:
            await self._bytes.write(data)
        except LinkClosed as exc:  # yamux expects this one where it gives credit for what was read before
            raise ConnectionClosedError(exc.message) from exc


class _Yamux(Yamux):
    """Yamux that says nothing of each frame and does not wait after it."""

    async def _write_frame(self, data: bytes) -> None:
        async with self._write_lock:
            await self.secured_conn.write(data)


class _Noise(Noise):
    """Noise whose sessions are read and written in few steps."""

    async def secure_inbound(self, conn: IRawConnection) -> ISecureConn:
        return _Session(cast(SecureSession, await super().secure_inbound(conn)))

    async def secure_outbound(self, conn: IRawConnection, peer_id: ID) -> ISecureConn:
        return _Session(cast(SecureSession, await super().secure_outbound(conn, peer_id)))


def tcp_of(connection: SwarmConn) -> TrioTCPStream:
    """Return the TCP connection that lies under a host's connection."""
    return cast(_Session, cast(Yamux, connection.muxed_conn).secured_conn).tcp


def build_host(key: NodeKey, max_connections: int) -> BasicHost:
    """Return a host with this key, and with room for so many connections."""
    key_pair = create_new_key_pair(key.seed)
    limits = ResourceManager(
        limits=ResourceLimits(max_connections=2 * max_connections, max_streams=50_000),
        connection_limits=ConnectionLimits(
            max_established_inbound=max_connections,
            max_established_outbound=max_connections,
            max_established_total=max_connections,
            max_established_per_peer=4,
        ),
        # Each of these can refuse everybody for a minute because of a few.
        enable_circuit_breaker=False,
        enable_graceful_degradation=False,
        enable_memory_limits=False,
    )
    host = new_host(
        key_pair=key_pair,
        # The default also offers plaintext, where anybody can claim to be anybody (defect 4).
        sec_opt={NOISE: _Noise(key_pair, noise_privkey=create_noise_key_pair().private_key)},
        muxer_opt={TProtocol(YAMUX): _Yamux},
        connection_config=ConnectionConfig(
            max_connections=max_connections,
            high_watermark=max_connections,
            low_watermark=0,
            min_connections=0,
            max_connections_per_peer=4,
            inbound_upgrade_timeout=5.0,
            inbound_stream_protocol_negotiation_timeout=5.0,
        ),
        resource_manager=limits,
        disable_identify_address_discovery=True,
    )
    network = cast(Swarm, host.get_network())
    # Who dials decides when to try again.
    network.retry_config = RetryConfig(max_retries=0)
    return cast(BasicHost, host)
