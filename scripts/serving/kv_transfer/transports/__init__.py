"""The transports, one module or package each. See `serving.kv_transfer.transport` for the contract."""

from serving.kv_transfer.transport import Transport
from serving.kv_transfer.transports.nixl import NixlTransport
from serving.kv_transfer.transports.tcp import TcpTransport
from serving.kv_transfer.transports.ucx import UcxTransport

TRANSPORTS: dict[str, type[Transport]] = {
    "ucx": UcxTransport,
    "nixl": NixlTransport,
    "tcp": TcpTransport,
}
"""By the values of `kv_transfer.transport`. Their libraries load when they start."""
