"""A bounded number of places that tenants share, so that one tenant's flood leaves room for the others. Pure."""

from __future__ import annotations

from collections import Counter
from typing import Literal

Refusal = Literal["full", "share"]
"""Why there is no place: nobody gets one, or this tenant has its share of them."""


class Room:
    """`num_places` places. A tenant may have as many of them as are free still, times its weight.

    These are dynamic thresholds (Choudhury and Hahne, 1998): a tenant that is alone gets half of the places, two get a third
    each, and whoever comes anew finds a place as long as there is any. `most_per_tenant` bounds each tenant besides.
    """

    def __init__(self, num_places: int, most_per_tenant: int | None = None) -> None:
        self.num_places = num_places
        self.most_per_tenant = most_per_tenant
        self._taken: Counter[str] = Counter()
        self._num_taken = 0

    def __len__(self) -> int:
        return self._num_taken

    def taken_by(self, tenant_id: str) -> int:
        """Return how many places a tenant has."""
        return self._taken[tenant_id]

    def why_not(self, tenant_id: str, weight: float = 1.0) -> Refusal | None:
        """Return why a tenant gets no further place; None where it does."""
        num_free = self.num_places - self._num_taken
        if num_free <= 0:
            return "full"
        own = self._taken[tenant_id]
        if own >= weight * num_free or (self.most_per_tenant is not None and own >= self.most_per_tenant):
            return "share"
        return None

    def take(self, tenant_id: str) -> None:
        """Give a place to a tenant, also where `why_not` says no: it may have had one before."""
        self._taken[tenant_id] += 1
        self._num_taken += 1

    def leave(self, tenant_id: str) -> None:
        """Take a place back."""
        self._num_taken -= 1
        self._taken[tenant_id] -= 1
        if self._taken[tenant_id] <= 0:
            del self._taken[tenant_id]
