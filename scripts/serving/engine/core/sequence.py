"""What the engine knows of one request: its tokens, its blocks, and how far it is.

Knows neither the queue nor the pool; `admission`, `step` and `scheduler` change what is here.
"""

from __future__ import annotations

import secrets
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from serving import block_hash
from serving.protocol import EngineRequest, ErrorInfo, SamplingParams, TokenLogprob

# Stands in `Sequence.tokens` for a token that a step under way is choosing.
UNKNOWN_TOKEN = -1


class State(Enum):
    WAITING = "waiting"  # in the queue, holds no blocks
    RESERVED = "reserved"  # holds blocks that a transfer is filling
    RUNNING = "running"
    EXPORTED = "exported"  # finished prefill, blocks held for a decode worker
    DONE = "done"


class Guidance(ABC):
    """Keeps a sequence to its grammar: the part that the scheduler has to know."""

    @property
    @abstractmethod
    def is_ready(self) -> bool:
        """Whether it is compiled. The other members are valid from then on."""

    @property
    @abstractmethod
    def error(self) -> ErrorInfo | None:
        """Why the sequence cannot go on; None while it can. Tokens chosen since are meaningless."""

    @property
    @abstractmethod
    def is_complete(self) -> bool:
        """Whether the output fits its grammar, and nothing can follow."""

    @abstractmethod
    def accept(self, token: int) -> None:
        """The output goes on by `token`."""


@dataclass(eq=False)
class Sequence:
    """One request in the engine. `tokens` grows; `num_computed` of them have their KV in `blocks`.

    Steps may be scheduled ahead: `num_scheduled` tokens are computed or in a step under way, and
    the last `num_unknown` tokens are still being chosen by such steps (`UNKNOWN_TOKEN`).
    `hashes` are those of the full blocks known so far; the first `num_stored` blocks are in the
    prefix cache. `arrival` orders requests for admission and preemption.
    """

    request: EngineRequest
    arrival: int
    root: int
    block_size: int
    tokens: list[int] = field(init=False)
    seed: int = field(init=False)
    is_penalized: bool = field(init=False)  # tokens seen so far change the choice of the next one
    is_plain: bool = field(init=False)  # only the likeliest token is wanted
    # The whole prompt is to be computed for its log-probabilities, cached or not. They are reported
    # with the first token, and not again by a worker that continues the request.
    wants_prompt_logprobs: bool = field(init=False)
    state: State = State.WAITING
    blocks: list[int] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_scheduled: int = 0
    num_unknown: int = 0
    num_readable: int = 0  # computed in steps that are over, so that a transfer may read their KV
    num_stored: int = 0
    num_uncached: int = 0  # tokens to be computed, as it looked when it arrived
    num_cached: int | None = None  # set at the first admission, reported with the first output
    has_reported_cached: bool = False
    in_flight: int = 0  # steps under way that it is part of: blocks must outlive them
    # Loop time at which it will have waited too long to begin. None if it may wait for ever, and
    # from its first admission on, also after a preemption.
    queued_until: float | None = None
    embedding: bytes | None = None  # of a request with `pooling`, once its prompt is computed
    # Where a CUDA runner keeps its block table, and how many of its blocks are in there.
    slot: int | None = None
    num_tabled: int = 0
    guidance: Guidance | None = None
    # Of the prompt's tokens from the second on, as far as they are computed, if they are wanted.
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    # A reservation's waiter: called when its blocks may be written to, and when it is aborted. Only
    # the first call has an effect.
    on_settled: Callable[[], None] | None = None
    # Held while a transfer copies blocks, and while they are taken away from it.
    transfer_lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.tokens = list(self.request.token_ids)
        # An unseeded request draws its seed once, so that preemption does not change its output.
        p = self.request.sampling
        self.seed = secrets.randbits(64) if p.seed is None else p.seed & (2**64 - 1)
        self.is_penalized = bool(
            p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1.0
        )
        self.is_plain = (
            p.temperature == 0
            and p.logprobs is None
            and p.guide is None
            and not (self.is_penalized or p.logit_bias or p.min_tokens)
        )
        is_new = len(self.tokens) == self.num_prompt
        self.wants_prompt_logprobs = is_new and p.prompt_logprobs is not None

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def is_reservation(self) -> bool:
        return self.on_settled is not None

    @property
    def sampling(self) -> SamplingParams:
        return self.request.sampling

    @property
    def computes_whole_prompt(self) -> bool:
        """Whether what is wanted of each prompt token is lost where its KV is found in the cache."""
        return self.wants_prompt_logprobs or self.request.pooling == "mean"

    @property
    def needs_token_values(self) -> bool:
        """Whether the next token cannot be chosen before the values of all others are known."""
        return self.is_penalized or self.guidance is not None

    @property
    def is_ready(self) -> bool:
        """Whether it may be admitted: its grammar, if any, is compiled."""
        return self.guidance is None or self.guidance.is_ready

    @property
    def num_prompt(self) -> int:
        return self.request.num_prompt_tokens

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def remaining(self) -> int:
        """Tokens still to be scheduled before the next one can be sampled."""
        return len(self.tokens) - self.num_scheduled

    def block_hashes(self, num_blocks: int) -> list[int]:
        """Hashes of the first `num_blocks` blocks, which must be full of known tokens."""
        if len(self.hashes) < num_blocks:
            done = len(self.hashes)
            parent = self.hashes[-1] if done else self.root
            tokens = self.tokens[done * self.block_size : num_blocks * self.block_size]
            self.hashes += block_hash.chain(tokens, self.block_size, parent)
        return self.hashes[:num_blocks]
