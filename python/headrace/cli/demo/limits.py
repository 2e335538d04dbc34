"""The limit of open descriptors: raised where that's allowed, explained where it isn't."""

from __future__ import annotations

import resource

__all__ = ["LimitError", "ensure_descriptors"]

_SPARE = 64  # what a process has open besides its connections


class LimitError(Exception):
    """A limit of the system is too low, and this process may not raise it; the text says what to change."""


def ensure_descriptors(connections: int) -> None:
    """Lets this process, and those it starts, have so many connections. Raises :class:`LimitError`."""
    needed = connections + _SPARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    enough = hard == resource.RLIM_INFINITY or hard >= needed
    try:
        # The hard limit takes a privilege (CAP_SYS_RESOURCE) that root in a container may lack: so just try.
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard if enough else needed))
    except (PermissionError, ValueError):
        possible = max(1, hard - _SPARE)
        raise LimitError(
            f"{connections:,} connections need {needed:,} open files a process, and the limit is {hard:,}. "
            f"Raise it (ulimit -n {needed}; for good: a line '* - nofile {needed}' in "
            f"/etc/security/limits.conf, or LimitNOFILE={needed} in a systemd unit), or run with "
            f"--connections {possible}"
        ) from None
