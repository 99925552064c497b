# Load on the running service, and plots of the results.
import shutil

BENCH = CONFIG.bench
BENCH_FOLDER = f"results/bench/{BENCH.name}"
BENCH_RUNS = [BENCH.name, *(run for run in BENCH.compare if run != BENCH.name)]
BENCH_PLOTS = {
    "ttft": "Time to first token of each request, and its distribution.",
    "itl": "Inter-token latency of each request, and its distribution.",
    "throughput": "Output tokens per second and requests in flight, second by second.",
    "hit_rate": "Share of prompt tokens that the router knew to be cached, by instance.",
}

if "bench" in INVOCATION.targets:
    for run in BENCH_RUNS[1:]:
        if not Path(f"results/bench/{run}/summary.json").exists():
            raise WorkflowError(
                f"`bench.compare` names {run}, which has no results yet: "
                f"run `snakemake bench --config bench='{{name: {run}}}'` first"
            )

if INVOCATION.executes and "bench" in INVOCATION.targets:
    # A result from before is no reason not to measure again.
    shutil.rmtree(BENCH_FOLDER, ignore_errors=True)


rule bench:
    """Send load to the running service (bench.*) with aiperf; results and plots in results/bench."""
    input:
        f"{BENCH_FOLDER}/comparison.txt",
        expand(f"{BENCH_FOLDER}/{{plot}}.svg", plot=BENCH_PLOTS),


rule bench_environment:
    """Make a Python environment for the load generator."""
    input:
        f"{workflow.basedir}/envs/aiperf.txt",
    output:
        "results/bench/env/ready",
    log:
        "logs/bench_environment.log",
    conda:
        ENVIRONMENT
    script:
        "../scripts/make_bench_environment.py"


rule run_bench:
    """Run the load generator, and sample the service meanwhile."""
    input:
        [] if BENCH.python else "results/bench/env/ready",
        ancient(served_first()),
    output:
        summary=f"{BENCH_FOLDER}/summary.json",
        requests=f"{BENCH_FOLDER}/requests.json",
        samples=f"{BENCH_FOLDER}/samples.json",
    log:
        "logs/run_bench.log",
    conda:
        ENVIRONMENT
    script:
        "../scripts/run_bench.py"


rule compare_bench:
    """Compare this run with those that bench.compare names."""
    input:
        summaries=expand(
            "results/bench/{run}/summary.json", run=[BENCH.name, *BENCH.compare]
        ),
    output:
        report(
            f"{BENCH_FOLDER}/comparison.txt",
            category="Benchmark",
            labels={"run": BENCH.name, "what": "figures"},
        ),
    log:
        "logs/compare_bench.log",
    conda:
        ENVIRONMENT
    script:
        "../scripts/compare_bench.py"


rule plot_bench:
    """Draw plots, for people and for `snakemake --report`."""
    input:
        expand(
            "results/bench/{run}/{data}.json",
            run=BENCH_RUNS,
            data=["summary", "requests", "samples"],
        ),
    output:
        *[
            report(
                f"{BENCH_FOLDER}/{plot}.svg",
                category="Benchmark",
                labels={"run": BENCH.name, "what": about},
            )
            for plot, about in BENCH_PLOTS.items()
        ],
    log:
        "logs/plot_bench.log",
    conda:
        ENVIRONMENT
    params:
        python=BENCH.python or "results/bench/env/bin/python",
        program=f"{workflow.basedir}/scripts/plot_bench.py",
        out=lambda wildcards, output: Path(output[0]).parent,
        folders=[f"results/bench/{run}" for run in BENCH_RUNS],
    shell:
        "{params.python:q} {params.program:q} {params.out:q} {params.folders:q} > {log:q} 2>&1"
