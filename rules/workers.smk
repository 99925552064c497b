rule stop_obsolete:
    """Stop what no longer belongs, so that there is room for what does."""
    input:
        engine=ancient(f"{PLAN.engine_dir}/engine.json"),
    output:
        "run/topology.json",
    log:
        "logs/stop_obsolete.log",
    conda:
        ENVIRONMENT
    params:
        record=lambda wildcards: deployment.encode(DEPLOYMENT.wanted),
    script:
        "../scripts/stop_obsolete.py"


rule start_worker:
    """Start one worker. It reconnects by itself when etcd or NATS restart."""
    input:
        engine=f"{PLAN.engine_dir}/engine.json",
        control=ancient(control_services()),
        room=ancient("run/topology.json"),
    output:
        "run/worker-{role}-{index}.up",
    log:
        "logs/start_worker-{role}-{index}.log",
    conda:
        ENVIRONMENT
    params:
        program=lambda wildcards: program(f"worker-{wildcards.role}-{wildcards.index}"),
    script:
        "../scripts/start_worker.py"
