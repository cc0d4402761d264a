"""Servers that have to answer at once: libraries that need them try for minutes, or end the process."""

from __future__ import annotations

import socket

from doorward.core.errors import InputError

#: Seconds within which a server has to take a connection.
_PATIENCE = 10.0


def check_answers(host: str, port: int, *, asked: str) -> None:
    """Raise unless a server takes connections.

    Args:
        asked: what the user gave, for the message.

    Raises:
        InputError: if none does.
    """
    try:
        socket.create_connection((host, port), _PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"{asked}: no server answers at {host}:{port} ({error})") from error
