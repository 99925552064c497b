"""The direct connection between a frontend and a worker: requests one way, tokens the other.

One long-lived TCP or unix-socket connection per pair carries length-prefixed msgpack frames
(`protocol.ToWorker`, `protocol.ToFrontend`). Everything an engine step produced for one frontend
is one frame. A peer that sends garbage, speaks another version or does not read is disconnected;
what that means for requests is decided here (abort them, or `InstanceLost`), what to do about it
is not.

    connection.py  frames, keep-alive, slow peers
    server.py      the worker's end
    client.py      the frontend's end
    handshake.py   who may speak to a worker
    errors.py      errors that travel
"""

from serving.rpc.client import OutputStream, RpcClient
from serving.rpc.errors import error_info, raise_error
from serving.rpc.server import RpcHandler, RpcServer

__all__ = ["OutputStream", "RpcClient", "RpcHandler", "RpcServer", "error_info", "raise_error"]
