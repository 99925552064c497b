"""Recorded workloads: when requests came, how long they were, and what they have in common.

Two formats, recognised by the file name:

    .jsonl  `timestamp` (ms), `input_length`, `output_length`, `hash_ids` (one per 512 tokens;
            equal ids mean equal prefixes), as Mooncake and others publish them
    .csv    `TIMESTAMP`, `ContextTokens`, `GeneratedTokens`, as Azure publishes them; nothing is shared
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from datetime import datetime
from itertools import count
from pathlib import Path
from struct import pack

import msgspec
from msgspec import Struct
from xxhash import xxh3_64_intdigest

from serving.errors import OperatorError

HASH_TOKENS = 512


class TraceRequest(Struct, frozen=True):
    """`block_hashes`: one for each full block of the prompt, of `block_size` tokens."""

    arrival_s: float
    prompt_tokens: int
    completion_tokens: int
    block_hashes: list[int]


class Trace(Struct, frozen=True):
    """Requests in order of arrival, the first at 0 s, and the tokens in one of their blocks."""

    requests: list[TraceRequest]
    block_size: int

    @property
    def duration_s(self) -> float:
        return self.requests[-1].arrival_s if self.requests else 0.0

    def faster(self, factor: float) -> Trace:
        """The same requests, so many times closer together."""
        requests = [
            msgspec.structs.replace(each, arrival_s=each.arrival_s / factor)
            for each in self.requests
        ]
        return Trace(requests, self.block_size)

    def part(self, num_requests: int) -> Trace:
        """The first so many."""
        return Trace(self.requests[:num_requests], self.block_size)


class _Line(Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int] = []


def load_trace(path: Path) -> Trace:
    """Raises OperatorError when the file is missing or not in one of the formats."""
    read = {".jsonl": _read_jsonl, ".csv": _read_csv}.get(path.suffix)
    if read is None:
        raise OperatorError(f"{path} is no trace", remedy="name a .jsonl or .csv file")
    try:
        requests = sorted(read(path), key=lambda each: each.arrival_s)
    except FileNotFoundError:
        raise OperatorError(f"there is no trace {path}", remedy="name one that exists") from None
    except (msgspec.MsgspecError, KeyError, ValueError) as exc:
        raise OperatorError(
            f"{path} cannot be read: {exc}", remedy="see scripts/serving/simulate/trace.py"
        ) from exc
    if not requests:
        raise OperatorError(f"{path} holds no requests", remedy="name one that does")
    start_s = requests[0].arrival_s
    requests = [msgspec.structs.replace(r, arrival_s=r.arrival_s - start_s) for r in requests]
    return Trace(requests, HASH_TOKENS)


def _read_jsonl(path: Path) -> Iterator[TraceRequest]:
    decode = msgspec.json.Decoder(_Line).decode
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                one = decode(line)
                hashes = [_hash(each) for each in one.hash_ids[: one.input_length // HASH_TOKENS]]
                yield TraceRequest(
                    one.timestamp / 1000,
                    max(1, one.input_length),
                    max(1, one.output_length),
                    hashes,
                )


def _read_csv(path: Path) -> Iterator[TraceRequest]:
    fresh = count(1)
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            # Seven digits after the second; datetime takes six.
            moment = datetime.fromisoformat(row["TIMESTAMP"][:26])
            tokens = max(1, int(row["ContextTokens"]))
            hashes = [_hash(next(fresh)) for _ in range(tokens // HASH_TOKENS)]
            yield TraceRequest(
                moment.timestamp(), tokens, max(1, int(row["GeneratedTokens"])), hashes
            )


def _hash(identity: int) -> int:
    """Ids of traces are small and dense; block hashes are neither."""
    return xxh3_64_intdigest(pack("<q", identity))
