"""How a link begins: what a node shows of itself, and whether what a peer shows is believed."""

from __future__ import annotations

from tether.credentials import Membership
from tether.errors import LinkError, NotAMember, ProtocolViolation, from_info
from tether.identity import Identity
from tether.link import tag_of
from tether.messages import PROTOCOL_VERSION, Hello, LinkMessage, Refused, Welcome

_RENEWAL_DUE_SECONDS = 29 * 86_400.0


class Introduction:
    """What a node shows of itself on each new link, and how it judges what the peer shows there.

    Times are Unix seconds.
    """

    def __init__(self, identity: Identity, *, name: str, region: str, boot_id: str) -> None:
        self._identity = identity
        self._name = name
        self._region = region
        self._boot_id = boot_id

    def hello(self, addresses: tuple[str, ...], now: float) -> Hello:
        """Return what is shown to a peer that was dialled; raise `NotAMember` where this machine is none any more.

        `addresses` are where this node can be dialled, if it is an orchestrator.
        """
        return Hello(
            PROTOCOL_VERSION,
            self._boot_id,
            tuple(sorted(self._identity.roles)),
            self._name,
            self._region,
            self._identity.chain(now),
            addresses,
        )

    def welcome(self, hello: Hello, orchestrators: tuple[str, ...], now: float) -> Welcome:
        """Return what is shown to a peer that said hello, renewed credentials for it included where they are due.

        Raises `NotAMember` where this machine is no member any more.
        """
        return Welcome(
            PROTOCOL_VERSION,
            self._boot_id,
            tuple(sorted(self._identity.roles)),
            self._name,
            self._region,
            self._identity.chain(now),
            orchestrators,
            self._identity.renew(hello.chain, now),
        )

    def check_hello(self, peer_id: str, message: LinkMessage, now: float) -> tuple[Hello, Membership]:
        """Return a peer's first message as what it has to be, and what proves that the peer is what it says.

        Raises `ProtocolViolation` or `NotAMember` where it is not.
        """
        if not isinstance(message, Hello):
            raise ProtocolViolation(f"a link begins with hello, not with {tag_of(type(message))}")
        return message, self._check_peer(peer_id, message, now)

    def check_answer(self, peer_id: str, answer: LinkMessage, now: float) -> tuple[Welcome, Membership]:
        """Return what a dialled peer answers as a welcome, and what proves that the peer is what it says.

        Raises the error with which it refuses this node, `ProtocolViolation`, or `NotAMember`.
        """
        if isinstance(answer, Refused):
            error = from_info(answer.error)
            raise error if isinstance(error, LinkError) else LinkError(error.message)
        if not isinstance(answer, Welcome):
            raise ProtocolViolation(f"hello is answered with welcome, not with {tag_of(type(answer))}")
        membership = self._check_peer(peer_id, answer, now)
        if "orchestrator" not in answer.roles:
            raise NotAMember("the peer is not an orchestrator")
        return answer, membership

    def is_renewal_due(self, now: float) -> bool:
        """Whether this machine's membership ends soon; a new hello to an orchestrator gets it renewed."""
        return self._identity.expires_at(now) - now < _RENEWAL_DUE_SECONDS

    def _check_peer(self, peer_id: str, shown: Hello | Welcome, now: float) -> Membership:
        if shown.protocol != PROTOCOL_VERSION:
            raise ProtocolViolation(
                f"one side speaks version {shown.protocol} of the link protocol and the other {PROTOCOL_VERSION}; "
                "use the same version of Tether on both"
            )
        if peer_id == self._identity.peer_id:
            raise ProtocolViolation("a node needs no link to itself")
        membership = self._identity.verify(shown.chain, peer_id, now)
        if not shown.roles:
            raise ProtocolViolation("a peer has at least one role")
        if beyond := frozenset(shown.roles) - membership.roles:
            raise NotAMember(f"the peer's credential does not make it {', '.join(sorted(beyond))}")
        return membership
