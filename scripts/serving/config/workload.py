"""The sections that name a workload: `plan`, which simulates it, and `bench`, which sends it."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from serving.config.base import Count, Positive, Seconds, Section


class PlanConfig(Section, frozen=True):
    """Assumptions and targets of `snakemake plan`. Measure the speeds on one of your workers."""

    trace: Annotated[
        str | None,
        Meta(description="Recorded workload: `.jsonl` in Mooncake's format, or `.csv` in Azure's."),
    ] = None
    max_requests: Annotated[Positive, Meta(description="Use this many requests of the trace.")] = (
        2000
    )
    speed_up: Annotated[
        Annotated[float, Meta(gt=0)], Meta(description="Replay the trace this many times faster.")
    ] = 1.0
    quantile: Annotated[
        Annotated[float, Meta(gt=0, lt=1)],
        Meta(description="Share of requests that must meet the targets."),
    ] = 0.9
    ttft_s: Annotated[Seconds, Meta(description="Target for the time to first token.")] = 2.0
    itl_s: Annotated[Seconds, Meta(description="Target for the gap between tokens.")] = 0.05
    max_workers: Annotated[Positive, Meta(description="Most workers of each role.")] = 64
    prefill_tokens_per_s: Annotated[
        Annotated[float, Meta(gt=0)],
        Meta(description="Prompt tokens that one worker computes in a second."),
    ] = 20_000.0
    step_s: Annotated[Seconds, Meta(description="Decode step of a single sequence.")] = 0.02
    step_per_sequence_s: Annotated[
        Annotated[float, Meta(ge=0)],
        Meta(description="Time that each further sequence in the batch adds to a step."),
    ] = 0.0005
    transfer_tokens_per_s: Annotated[
        Annotated[float, Meta(gt=0)],
        Meta(description="Prompt tokens whose KV is transferred in a second."),
    ] = 1e6
    kv_cache_tokens: Annotated[
        Positive, Meta(description="Size of each worker's KV pool, in tokens.")
    ] = 1_000_000


class BenchConfig(Section, frozen=True):
    """What `snakemake bench` sends to the running service: a recorded or a synthetic workload."""

    name: Annotated[
        str,
        Meta(
            pattern="^[A-Za-z0-9][A-Za-z0-9._-]*$",
            description="Results go to `results/bench/NAME`; a run of the same name replaces them.",
        ),
    ] = "latest"
    compare: Annotated[
        list[str],
        Meta(description="Names of earlier runs to show beside this one, in the table and plots."),
    ] = []
    trace: Annotated[
        str | None,
        Meta(
            description="Recorded workload to replay at its original times, `.jsonl` in Mooncake's format. Without it, the load is synthetic."
        ),
    ] = None
    speed_up: Annotated[
        Annotated[float, Meta(gt=0)], Meta(description="Replay the trace this many times faster.")
    ] = 1.0
    max_requests: Annotated[Positive, Meta(description="Requests to send.")] = 100
    concurrency: Annotated[
        Positive,
        Meta(description="Synthetic: requests in flight, unless `request_rate` is set."),
    ] = 8
    request_rate: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="Synthetic: requests per second, at random times (Poisson)."),
    ] = None
    input_tokens: Annotated[Positive, Meta(description="Synthetic: tokens of each prompt.")] = 512
    output_tokens: Annotated[Positive, Meta(description="Synthetic: tokens of each answer.")] = 64
    shared_prefixes: Annotated[
        Count,
        Meta(
            description="Synthetic: number of different prefixes. Each prompt begins with one of them, which exercises the prefix cache."
        ),
    ] = 0
    prefix_tokens: Annotated[
        Positive, Meta(description="Synthetic: tokens of each shared prefix.")
    ] = 256
    seed: Annotated[
        Count | None,
        Meta(
            description="Seed of the prompt texts. Default: a new one for each run, so that no run profits from an earlier run's cache."
        ),
    ] = None
    timeout_s: Annotated[Seconds, Meta(description="Deadline for the whole run.")] = 1800.0
    python: Annotated[
        str | None,
        Meta(
            description="Set it to reuse a Python that has aiperf and matplotlib. Default: an environment made from `envs/aiperf.txt`."
        ),
    ] = None
