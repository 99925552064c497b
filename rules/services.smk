# Starting is idempotent: a job that runs although its program does already only proves it ready.
# So a restarted etcd lets Snakemake ask the others for proof, and restarts none of them.


rule fetch_binaries:
    """Find or fetch etcd and nats-server."""
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
    """Start etcd: who is alive."""
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
        "../scripts/start_etcd.py"


rule start_nats:
    """Start nats-server: what they cache."""
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
        "../scripts/start_nats.py"


rule open_cluster:
    """Tell nodes that join what is served here."""
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
        told=sections(
            *("model", "engine", "tensorrt_llm", "mock", "kv_transfer"),
            *("deadlines", "deployment", "etcd", "nats"),
        ),
    script:
        "../scripts/open_cluster.py"
