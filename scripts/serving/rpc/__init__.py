"""The direct connection between a frontend and a worker: requests one way, tokens the other.

One long-lived TCP or Unix socket connection for each pair carries frames of msgpack
(`protocol.ToWorker`, `protocol.ToFrontend`). All outputs of an engine step for one frontend are one
frame. A peer that sends garbage, speaks another version or stops reading is disconnected. This
package decides what that means for requests: the worker aborts them, the frontend gets
`InstanceLost`. It does not decide what to do next.

    connection.py     frames, keep-alive, slow peers
    server.py         the worker's end
    client.py         the frontend's end
    output_stream.py  the outputs of one request
    handshake.py      proofs that both ends belong to the deployment
    errors.py         errors on the wire
"""

from serving.rpc.client import RpcClient
from serving.rpc.errors import raise_error
from serving.rpc.output_stream import OutputStream
from serving.rpc.server import RpcHandler, RpcServer

__all__ = ["OutputStream", "RpcClient", "RpcHandler", "RpcServer", "raise_error"]
