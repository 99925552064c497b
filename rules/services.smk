# Starting is idempotent: when the program already runs, the job only proves that it is ready.
# So Snakemake may ask for proof of all programs after etcd restarted, and restarts none of them.
#
# All `start_*` rules share `start_program.py`, because the program is their only difference.


rule fetch_binaries:
    """Find or download etcd and nats-server."""
    output:
        etcd="results/bin/etcd",
        nats="results/bin/nats-server",
        versions="results/bin/versions.json",
    log:
        "logs/fetch_binaries.log",
    conda:
        ENVIRONMENT
    script:
        "../scripts/fetch_binaries.py"


rule start_etcd:
    """Start etcd, which knows the live workers."""
    input:
        checks(),
        binary="results/bin/etcd",
    output:
        "run/etcd.up",
    log:
        "logs/start_etcd.log",
    conda:
        ENVIRONMENT
    params:
        program=lambda wildcards: program("etcd"),
    script:
        "../scripts/start_program.py"


rule start_nats:
    """Start nats-server, which carries their cache events and loads."""
    input:
        checks(),
        binary="results/bin/nats-server",
    output:
        "run/nats.up",
    log:
        "logs/start_nats.log",
    conda:
        ENVIRONMENT
    params:
        program=lambda wildcards: program("nats"),
    script:
        "../scripts/start_program.py"


rule open_cluster:
    """Publish the configuration for nodes that join."""
    input:
        etcd="run/etcd.up",
        nats=ancient("run/nats.up"),
        engine=f"{PLAN.engine_dir}/engine.json",
    output:
        "run/cluster.open",
    log:
        "logs/open_cluster.log",
    conda:
        ENVIRONMENT
    params:
        published=sections(
            *("model", "engine", "tensorrt_llm", "mock", "kv_transfer"),
            *("deadlines", "deployment", "etcd", "nats"),
        ),
    script:
        "../scripts/open_cluster.py"
