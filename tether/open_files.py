"""How many files, and so sockets, this process may have open."""

from __future__ import annotations

import logging
import resource

log = logging.getLogger(__name__)

ENOUGH = 65_536
"""More than any role needs; some systems allow a billion, and children that close all they could have take ages then."""


def raise_limit() -> int:
    """Raise this process's limit of open files as far as it may, and return it; its children have the same."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError) as exc:  # macOS has a further limit, which it does not tell here
        log.debug("cannot raise the limit of open files from %d to %d: %s", soft, wanted, exc)
        return soft
    return wanted
