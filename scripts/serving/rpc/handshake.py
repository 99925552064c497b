"""Who may speak to a worker: both ends prove that they know the deployment's secret.

    -> Hello(nonce)   <- Hello(nonce, proof)   -> Proof

A proof is HMAC-SHA256 over both nonces and the name of the worker, so that none can be used again
or elsewhere. Neither end learns the secret. What follows is neither encrypted nor signed: whoever
can alter packets on the way can take a connection over after its handshake.
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
    """The secret in `path`; empty, so that nothing is proven, for no path.

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


def worker_proof(secret: bytes, asked: Hello, answer: Hello) -> bytes:
    """What a worker says beside `answer` (its `proof` is not looked at)."""
    return _proof(b"worker", secret, asked, answer)


def frontend_proof(secret: bytes, asked: Hello, answer: Hello) -> bytes:
    """What a frontend that said `asked` says to a worker that said `answer`."""
    return _proof(b"frontend", secret, asked, answer)


def _proof(side: bytes, secret: bytes, asked: Hello, answer: Hello) -> bytes:
    parts = (side, asked.nonce, answer.nonce, answer.instance_id, answer.epoch, answer.version)
    return hmac.digest(secret, msgspec.msgpack.encode(parts), hashlib.sha256)


def same(proof: bytes, expected: bytes) -> bool:
    """In a time that tells nothing about how much of it agrees."""
    return hmac.compare_digest(proof, expected)
