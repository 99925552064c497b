"""`snakemake bench`: aiperf against the running service, and what became of it.

aiperf (NVIDIA's load generator) runs as a program of an environment of its own; this module tells it
the load, watches it and the service meanwhile, and turns its export into one summary.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec
from msgspec import Struct

from serving.config import BenchConfig
from serving.deploy.bench.samples import Sample, Sampler, hit_rates
from serving.errors import OperatorError
from serving.progress import Report

TOKENIZER = "service/model"
_TOKENIZER_FILES = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("tokenizer.model", "chat_template.jinja", "generation_config.json"),
)
SAMPLE_S, TELL_S, END_S = 1.0, 5.0, 10.0
QUANTILES = ("avg", "p50", "p90", "p99")


class Target(Struct, frozen=True):
    """The service under test, as `/ready` and the models' list describe it."""

    url: str
    model: str
    topology: str
    policy: str
    num_instances: int
    max_model_len: int
    tokenizer_dir: str


class Summary(Struct, frozen=True):
    """One run. Latencies in ms; `hit_rate` and `hit_rates` are shares of prompt tokens that the
    router knew to be cached where it sent them, over all instances and of each."""

    name: str
    when: str
    target: Target
    load: dict[str, Any]
    requests: int
    errors: int
    duration_s: float
    requests_per_s: float
    output_tokens_per_s: float
    ttft_ms: dict[str, float]
    itl_ms: dict[str, float]
    latency_ms: dict[str, float]
    hit_rate: float
    hit_rates: dict[str, float]


def find_target(
    url: str, headers: Mapping[str, str], tokenizer_dir: Path, max_model_len: int
) -> Target:
    """Raises OperatorError when nothing serves at `url`, or it is not what can be measured."""
    if url.startswith("https:"):
        raise OperatorError(
            f"{url} speaks HTTPS, and the load is sent in the clear",
            remedy="serve without `frontend.tls` while you measure",
        )
    try:
        answer = httpx.get(f"{url}/ready", headers=dict(headers), timeout=5.0, trust_env=False)
        state = answer.json()
    except (httpx.HTTPError, ValueError) as exc:
        raise OperatorError(
            f"nothing serves at {url}: {exc}",
            remedy="start a service, for example `snakemake serve_agg_router`, then run this again",
        ) from None
    if not state.get("ready"):
        raise OperatorError(
            f"the service at {url} is not ready: {state.get('reason') or answer.text[:200]}",
            remedy="see `snakemake status`",
        )
    return Target(
        url=url,
        model=state["model"],
        topology=state["topology"],
        policy=state["policy"],
        num_instances=len(state["instances"]),
        max_model_len=max_model_len,
        tokenizer_dir=str(tokenizer_dir.resolve()),
    )


def cut_trace(config: BenchConfig, max_model_len: int, out: Path) -> tuple[int, int]:
    """Write the requests to replay to `out`: those that fit into the context, the first
    `max_requests` of them, at their times over `speed_up`.

    Returns how many, and how many were left out for their length. Raises OperatorError.
    """
    assert config.trace is not None
    taken, too_long = 0, 0
    try:
        with Path(config.trace).open(encoding="utf-8") as lines, out.open("w") as kept:
            for line in lines:
                if not line.strip():
                    continue
                request = json.loads(line)
                # The chat template adds some tokens to a prompt.
                if request["input_length"] + request["output_length"] + 64 > max_model_len:
                    too_long += 1
                    continue
                request["timestamp"] = request["timestamp"] / config.speed_up
                kept.write(json.dumps(request) + "\n")
                taken += 1
                if taken == config.max_requests:
                    break
    except FileNotFoundError:
        raise OperatorError(
            f"there is no trace {config.trace}", remedy="set `bench.trace` to one that exists"
        ) from None
    except (ValueError, KeyError, TypeError) as exc:
        raise OperatorError(
            f"{config.trace} is no trace as Mooncake publishes them: {exc!r}",
            remedy='a line is {"timestamp": ms, "input_length": n, "output_length": n, "hash_ids": [...]}',
        ) from None
    if not taken:
        raise OperatorError(
            f"no request of {config.trace} fits into {max_model_len} tokens",
            remedy="raise `engine.max_model_len`, or name another `bench.trace`",
        )
    return taken, too_long


def command(
    python: Path,
    target: Target,
    config: BenchConfig,
    folder: Path,
    trace: Path | None,
    headers: Mapping[str, str],
) -> list[str]:
    """What starts aiperf. Its export goes to `folder`."""
    arguments: list[str] = [
        *("--model", target.model, "--tokenizer", TOKENIZER),
        *("--url", target.url, "--endpoint-type", "chat", "--streaming"),
        # So that every answer is as long as asked for, and counted as the service counts.
        *("--extra-inputs", "ignore_eos:true", "--use-server-token-count"),
        *("--artifact-dir", str(folder), "--random-seed", str(config.seed), "--ui", "none"),
        *("--no-gpu-telemetry", "--no-server-metrics"),
    ]
    for name, value in headers.items():
        arguments += ["--header", f"{name}:{value}"]
    if trace is not None:
        arguments += ["--input-file", str(trace), "--custom-dataset-type", "mooncake_trace"]
        arguments += ["--fixed-schedule"]
    else:
        count = str(config.max_requests)
        arguments += ["--request-count", count, "--num-dataset-entries", count]
        arguments += ["--prompt-input-tokens-mean", str(config.input_tokens)]
        arguments += ["--prompt-output-tokens-mean", str(config.output_tokens)]
        if config.shared_prefixes:
            arguments += ["--num-prefix-prompts", str(config.shared_prefixes)]
            arguments += ["--prefix-prompt-length", str(config.prefix_tokens)]
        if config.request_rate is not None:
            arguments += ["--request-rate", str(config.request_rate)]
            arguments += ["--request-rate-mode", "poisson"]
        else:
            arguments += ["--concurrency", str(config.concurrency)]
    return [str(python.parent / "aiperf"), "profile", *arguments]


def offline_home(tokenizer_dir: Path, home: Path) -> Path:
    """A home for Hugging Face libraries that holds the tokenizer and nothing else, under the name
    TOKENIZER. Returns `home`.

    aiperf takes a folder by name only where it may ask the network, and it decodes in processes
    that may not.
    """
    revision = "0" * 40
    repository = home / "hub" / f"models--{TOKENIZER.replace('/', '--')}"
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    for path in tokenizer_dir.iterdir():
        if path.name in _TOKENIZER_FILES:
            (snapshot / path.name).write_bytes(path.read_bytes())
    return home


def run(
    arguments: Sequence[str],
    home: Path,
    log: Path,
    sampler: Sampler,
    timeout_s: float,
    report: Report,
) -> None:
    """Run aiperf to its end, sampling and telling meanwhile; `home` is from `offline_home`.

    Raises OperatorError when it fails, or is not over within `timeout_s`; nothing of it is left
    running.
    """
    environment = {
        **os.environ,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    for name in ("HF_HUB_CACHE", "PYTHONPATH"):
        environment.pop(name, None)
    started = told = time.monotonic()
    first = sampler.take()
    with log.open("wb") as output:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                time.sleep(SAMPLE_S)
                sample = sampler.take()
                now = time.monotonic()
                if now - started > timeout_s:
                    raise OperatorError(
                        f"the benchmark was not over within {timeout_s:g} s",
                        remedy="raise `bench.timeout_s`, or lower `bench.max_requests`",
                    )
                if now - told >= TELL_S:
                    told = now
                    report(_progress(first, sample, now - started))
        except httpx.HTTPError as exc:
            raise OperatorError(
                f"the service stopped answering during the benchmark: {exc}",
                remedy="see `snakemake status`",
            ) from exc
        finally:
            _end(process)
    sampler.take()
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise OperatorError(f"aiperf ended with {process.returncode}:\n{tail}", remedy=f"see {log}")


def _progress(first: Sample, last: Sample, seconds: float) -> str:
    tokens = last.generated_tokens - first.generated_tokens
    return (
        f"  {seconds:4.0f} s: {last.in_flight:.0f} requests in flight, {tokens:,.0f} tokens so far"
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """aiperf is a group of processes."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, signum)
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            continue


def summarise(
    folder: Path, target: Target, config: BenchConfig, samples: Sequence[Sample]
) -> tuple[Summary, list[dict[str, float]]]:
    """The run as a whole, and each request: `start_s`, `ttft_ms`, `itl_ms`, `latency_ms`.

    Raises OperatorError when no request was answered.
    """
    exported = json.loads((folder / "profile_export_aiperf.json").read_text())
    rows = []
    for line in (folder / "profile_export.jsonl").read_text().splitlines():
        one = json.loads(line)
        values = one.get("metrics") or {}
        if "time_to_first_token" in values:
            row = {"start_s": one["metadata"]["request_start_ns"] / 1e9}
            row |= {
                ours: values[name]["value"] for ours, name in _OF_REQUEST.items() if name in values
            }
            rows.append(row)
    if not rows:
        raise OperatorError(
            f"no request was answered: {exported.get('error_summary')}",
            remedy=f"see {folder}/logs and `snakemake status`",
        )
    begin = min(row["start_s"] for row in rows)
    rows = [{**row, "start_s": row["start_s"] - begin} for row in rows]
    first, last = samples[0], samples[-1]
    routed = sum(last.routed_tokens.values()) - sum(first.routed_tokens.values())
    hit = sum(last.hit_tokens.values()) - sum(first.hit_tokens.values())
    errors = sum(each.get("count", 1) for each in exported.get("error_summary") or [])
    return (
        Summary(
            name=config.name,
            when=time.strftime("%Y-%m-%d %H:%M:%S"),
            target=target,
            load=msgspec.to_builtins(config),
            requests=len(rows),
            errors=errors,
            duration_s=_total(exported, "benchmark_duration"),
            requests_per_s=_total(exported, "request_throughput"),
            output_tokens_per_s=_total(exported, "output_token_throughput"),
            ttft_ms=_quantiles(exported, "time_to_first_token"),
            itl_ms=_quantiles(exported, "inter_token_latency"),
            latency_ms=_quantiles(exported, "request_latency"),
            hit_rate=hit / routed if routed else 0.0,
            hit_rates=hit_rates(first, last),
        ),
        rows,
    )


_OF_REQUEST = {
    "ttft_ms": "time_to_first_token",
    "itl_ms": "inter_token_latency",
    "latency_ms": "request_latency",
}


def _total(exported: dict[str, Any], name: str) -> float:
    return float(exported.get(name, {}).get("avg") or 0.0)


def _quantiles(exported: dict[str, Any], name: str) -> dict[str, float]:
    return {key: float(exported.get(name, {}).get(key) or 0.0) for key in QUANTILES}


_COLUMNS = ("TTFT p50", "p90", "p99", "ITL p50", "p99")


def table(summaries: Sequence[Summary]) -> list[str]:
    """Lines for people: one run a row."""
    head = ("run", "topology, policy", "requests", "failed", *_COLUMNS, "tokens/s", "hits")
    rows: list[tuple[str, ...]] = [head]
    for one in summaries:
        rows.append(
            (
                one.name,
                f"{one.target.topology}, {one.target.policy}",
                str(one.requests),
                str(one.errors),
                *[f"{one.ttft_ms[key]:,.0f} ms" for key in ("p50", "p90", "p99")],
                *[f"{one.itl_ms[key]:,.1f} ms" for key in ("p50", "p99")],
                f"{one.output_tokens_per_s:,.0f}",
                f"{one.hit_rate:.0%}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
