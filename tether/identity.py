"""Who one process is: what it shows on its links, and how it judges what others show."""

from __future__ import annotations

from collections.abc import Iterable

from tether.credentials import Membership, verify_process
from tether.messages import Signed
from tether.network import RENEW_WITHIN_SECONDS, Network
from tether.node_key import NodeKey
from tether.records import Role


class Identity:
    """What one process shows on its links, and how it judges what others show."""

    def __init__(self, network: Network, key: NodeKey, roles: Iterable[Role]) -> None:
        self.network = network
        self.key = key
        self.roles: frozenset[Role] = frozenset(roles)
        self.peer_id = key.peer_id
        self._chain: tuple[Signed, ...] = ()
        self._issued_at = 0.0
        self._expires_at = 0.0

    def chain(self, now: float) -> tuple[Signed, ...]:
        """Return credentials for this process; raise `NotAMember` where its machine can give it none.

        Ask before a role starts, so that a machine that may not have this role says so at once.
        """
        # Anew every hour, so that a link shows what the machine was renewed to since, by this process or another one.
        if not self._chain or now - self._issued_at > 3_600 or now > self._expires_at - RENEW_WITHIN_SECONDS:
            self.network.reload()
            self._chain = self.network.issue_process_credential(self.key, self.roles, now)
            self._issued_at = now
            self._expires_at = self.verify(self._chain, self.peer_id, now).expires_at
        return self._chain

    def expires_at(self, now: float) -> float:
        """Return when the shown credentials end."""
        self.chain(now)
        return self._expires_at

    def verify(self, chain: tuple[Signed, ...], peer_id: str, now: float) -> Membership:
        """Return what `chain` proves of `peer_id` in this network; raise `NotAMember` with the reason."""
        return verify_process(chain, self.network.public_key, peer_id, now)

    def renew(self, chain: tuple[Signed, ...], now: float) -> tuple[Signed, ...]:
        """Return a newer chain for the machine of a peer that showed `chain`, or () where none is due or possible.

        Only orchestrators give any.
        """
        return self.network.renew(chain, now) if "orchestrator" in self.roles else ()

    def store_renewed(self, chain: tuple[Signed, ...], now: float) -> bool:
        """Keep a newer chain for this machine that an orchestrator offered, and say whether it was better."""
        stored = self.network.store_renewed(chain, now)
        if stored:
            self._chain = ()
        return stored
