"""Calls to supervisord over its UNIX socket."""

from __future__ import annotations

import http.client
import xmlrpc.client
from pathlib import Path
from typing import Any


class SupervisordRpc:
    """supervisord's XML-RPC interface at `socket`.

    It counts as not answering when a call takes longer than `answer_s`.
    """

    def __init__(self, socket: Path, answer_s: float) -> None:
        self._socket, self._answer_s = socket, answer_s

    def call(self, method: str, *arguments: Any) -> Any:
        """Raises OSError when supervisord does not answer, xmlrpc.client.Fault when it refuses."""
        transport = _transport(self._socket, self._answer_s)
        with xmlrpc.client.ServerProxy("http://supervisor", transport=transport) as proxy:
            try:
                return getattr(proxy.supervisor, method)(*arguments)
            except (http.client.HTTPException, xmlrpc.client.ProtocolError) as exc:
                raise OSError(str(exc)) from exc


def _transport(socket: Path, answer_s: float) -> Any:
    """supervisor's own transport, bounded: by itself it would wait for an answer without end."""
    from supervisor.xmlrpc import SupervisorTransport  # slow to load

    transport = SupervisorTransport(serverurl=f"unix://{socket}")
    unconnected = transport._get_connection

    def connect() -> http.client.HTTPConnection:
        connection: http.client.HTTPConnection = unconnected()
        try:
            connection.connect()
        except OSError:
            connection.close()
            raise
        connection.sock.settimeout(answer_s)
        return connection

    transport._get_connection = connect
    return transport
