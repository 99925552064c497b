"""Run aiperf, NVIDIA's load generator, against the service.

aiperf lives in an environment of its own. This module builds its command line, gives it a
tokenizer without network access, and watches it and the service while it runs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx

from serving.config import BenchConfig
from serving.deploy.bench.samples import FrontendSampler, Sample
from serving.deploy.bench.target import Target
from serving.errors import OperatorError
from serving.progress import Report

TOKENIZER = "service/model"
_TOKENIZER_FILES = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("tokenizer.model", "chat_template.jinja", "generation_config.json"),
)
SAMPLE_S, REPORT_S, END_S = 1.0, 5.0, 10.0


def aiperf_command(
    python: Path,
    target: Target,
    config: BenchConfig,
    folder: Path,
    trace: Path | None,
    headers: Mapping[str, str],
) -> list[str]:
    """The command line of aiperf, whose export goes to `folder`."""
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


def tokenizer_home(tokenizer_dir: Path, home: Path) -> Path:
    """Make `home` a home for Hugging Face libraries that holds only the tokenizer, as TOKENIZER.

    Returns `home`. aiperf accepts a plain folder only where it may ask the network, and it decodes
    in processes that may not.
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


def run_aiperf(
    arguments: Sequence[str],
    home: Path,
    log: Path,
    sampler: FrontendSampler,
    timeout_s: float,
    report: Report,
) -> None:
    """Run aiperf to its end, and sample and report meanwhile. `home` comes from `tokenizer_home`.

    Raises OperatorError when it fails or exceeds `timeout_s`. No process of it is left running.
    """
    environment = {
        **os.environ,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    proxies = [name for name in environment if name.lower().endswith("_proxy")]
    for name in ("HF_HUB_CACHE", "PYTHONPATH", *proxies):  # it speaks to our own service alone
        environment.pop(name, None)
    started = reported = time.monotonic()
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
                        f"the benchmark did not finish within {timeout_s:g} s",
                        remedy="raise `bench.timeout_s`, or lower `bench.max_requests`",
                    )
                if now - reported >= REPORT_S:
                    reported = now
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
