rule stop_obsolete:
    """Stop programs that no longer belong, which makes room for the others."""
    input:
        engine=ancient(f"{PLAN.engine_dir}/engine.json"),
    output:
        "run/topology.json",
    log:
        "logs/stop_obsolete.log",
    conda:
        ENVIRONMENT
    params:
        record=lambda wildcards: deployment.encode(DEPLOYMENT.record),
    script:
        "../scripts/stop_obsolete.py"


rule start_worker:
    """Start one worker. It reconnects on its own after etcd or NATS restart."""
    input:
        engine=f"{PLAN.engine_dir}/engine.json",
        control=ancient(control_services()),
        obsolete_stopped=ancient("run/topology.json"),
    output:
        "run/worker-{role}-{index}.up",
    log:
        "logs/start_worker-{role}-{index}.log",
    conda:
        ENVIRONMENT
    params:
        program=lambda wildcards: program(f"worker-{wildcards.role}-{wildcards.index}"),
    script:
        "../scripts/start_program.py"
