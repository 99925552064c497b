"""Send the load of `bench.*` to the running service. Output: summary, requests and samples."""

import secrets
import shutil
from pathlib import Path

import msgspec
from serving.deploy.bench.aiperf import aiperf_command, run_aiperf, tokenizer_home
from serving.deploy.bench.samples import FrontendSampler
from serving.deploy.bench.summary import summarise
from serving.deploy.bench.target import find_target
from serving.deploy.bench.trace import cut_trace
from serving.deploy.report.service_spec import read_service_spec, tokenizer_dir
from serving.deploy.rule_script import rule_script

with rule_script(snakemake) as (config, report):
    seed = secrets.randbelow(2**31) if config.bench.seed is None else config.bench.seed
    load = msgspec.structs.replace(config.bench, seed=seed)
    service = read_service_spec(Path("run"), config)
    target = find_target(service.url, service.headers, tokenizer_dir(Path("run")))
    summary_file = Path(snakemake.output.summary)
    folder = summary_file.parent / "aiperf"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    trace = None
    if load.trace is not None:
        trace = summary_file.parent / "trace.jsonl"
        count, too_long = cut_trace(load, target.max_model_len, trace)
        report(
            f"{count} requests of {load.trace}; {too_long} are too long for the model and left out"
        )
    report(f"aiperf against {target.topology} ({target.policy}) at {target.url}")
    python = Path(load.python or "results/bench/env/bin/python")
    sampler = FrontendSampler(target.url, service.headers)
    try:
        run_aiperf(
            aiperf_command(python, target, load, folder, trace, service.headers),
            tokenizer_home(Path(target.tokenizer_dir), (folder / "huggingface").resolve()),
            summary_file.parent / "aiperf.log",
            sampler,
            load.timeout_s,
            report,
        )
    finally:
        sampler.close()
    summary, requests = summarise(folder, target, load, sampler.samples)
    Path(snakemake.output.requests).write_bytes(msgspec.json.encode(requests))
    Path(snakemake.output.samples).write_bytes(msgspec.json.encode(sampler.samples))
    summary_file.write_bytes(msgspec.json.format(msgspec.json.encode(summary)))
