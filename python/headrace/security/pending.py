"""How many of a server's connections may be at their beginning."""

from __future__ import annotations

from typing import Protocol

from headrace.errors import HandshakeError

__all__ = ["PendingConnections", "check_seconds"]


class Beginning(Protocol):
    """A connection of which not much is known yet."""

    def _fail(self, exc: BaseException) -> None: ...


class PendingConnections:
    """Those that are in their handshake; if there are too many, the oldest goes."""

    max_pending_handshakes: int

    def _limit_pending(self, max_pending_handshakes: int) -> None:
        if max_pending_handshakes < 1:
            raise ValueError(f"max_pending_handshakes must be at least 1, not {max_pending_handshakes!r}")
        self.max_pending_handshakes = max_pending_handshakes
        self._pending: dict[Beginning, None] = {}

    def _begins(self, connection: Beginning) -> None:
        """A server's connection begins its handshake; if there are too many, the oldest goes."""
        self._pending[connection] = None
        if len(self._pending) > self.max_pending_handshakes:
            oldest = next(iter(self._pending))
            self._over(oldest)
            oldest._fail(
                HandshakeError(
                    f"{self.max_pending_handshakes} connections are in their handshake: the oldest gives way"
                )
            )

    def _over(self, connection: Beginning) -> None:
        self._pending.pop(connection, None)


def check_seconds(name: str, value: float) -> float:
    if not value > 0:
        raise ValueError(f"{name} must be a positive number of seconds, not {value!r}")
    return value
