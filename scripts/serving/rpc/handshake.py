"""The handshake of frontend and worker: both ends prove that they know the deployment's secret.

    -> Hello(nonce)   <- Hello(nonce, proof)   -> Proof

A proof is HMAC-SHA256 over both nonces and the name of the worker, so it is worthless for another
connection or another worker. It does not reveal the secret. The messages after the handshake are
neither encrypted nor signed: an attacker who can alter packets can take over the connection.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from pathlib import Path

import msgspec

from serving.protocol import Hello

NONCE_BYTES = 16
MIN_SECRET_BYTES = 16


def read_secret(path: str) -> bytes:
    """The secret in `path`. No path means an empty secret, and no proofs.

    Raises OSError, and ValueError for a secret that could be guessed.
    """
    if not path:
        return b""
    secret = Path(path).read_bytes().strip()
    if len(secret) < MIN_SECRET_BYTES:
        raise ValueError(f"the secret in {path} is shorter than {MIN_SECRET_BYTES} bytes")
    return secret


def new_nonce() -> bytes:
    return secrets.token_bytes(NONCE_BYTES)


def worker_proof(secret: bytes, frontend: Hello, worker: Hello) -> bytes:
    """The worker's proof, for its hello `worker` (without regard to the `proof` in it)."""
    return _proof(b"worker", secret, frontend, worker)


def frontend_proof(secret: bytes, frontend: Hello, worker: Hello) -> bytes:
    """The proof of the frontend whose hello was `frontend`, for the worker that sent `worker`."""
    return _proof(b"frontend", secret, frontend, worker)


def _proof(role: bytes, secret: bytes, frontend: Hello, worker: Hello) -> bytes:
    parts = (role, frontend.nonce, worker.nonce, worker.instance_id, worker.epoch, worker.version)
    return hmac.digest(secret, msgspec.msgpack.encode(parts), hashlib.sha256)


def same(proof: bytes, expected: bytes) -> bool:
    """Compare in a time that does not depend on the contents."""
    return hmac.compare_digest(proof, expected)
