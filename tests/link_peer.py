"""A worker in a process of its own, for tests that kill and freeze it: NETWORK_SEED KEY_SEED ADDRESS quiet|flood|echo."""

from __future__ import annotations

import sys

import trio

from tests.p2p import LinkNode, linking, network_of
from tether.link import Link
from tether.messages import InferCancel, InferTokens
from tether.node_key import NodeKey


async def main(network_seed: str, key_seed: str, address: str, mode: str) -> None:
    """Link, and answer each cancel with tokens; `flood` sends without being asked."""
    node = LinkNode(network_of(network_seed), "worker", key=NodeKey(bytes.fromhex(key_seed)), listen=[])

    def answer(link: Link, message: InferCancel) -> None:
        link.send(InferTokens(message.job_id, message.attempt, 0, (17, 4711), "a few words"))

    node.links.on(InferCancel, answer)
    async with linking(node) as nursery:
        node.dials(nursery, address)
        link = await node.until_up(address.rpartition("/p2p/")[2])
        while mode == "flood" and link.is_open:
            for position in range(100):
                link.send(InferTokens("flood", 1, position, (1,), "x" * 1_000))
            while link.is_open and link.num_buffered_bytes > 100_000:  # noqa: ASYNC110 - as a runtime would
                await trio.sleep(0.001)
        await trio.sleep_forever()


if __name__ == "__main__":
    trio.run(main, sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4])
