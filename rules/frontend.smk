rule start_frontend:
    """Start the HTTP frontend and wait until it answers a request."""
    input:
        # The first worker of each role alone: more workers do not restart the frontend.
        workers=ancient([f"run/{name}.up" for name in DEPLOYMENT.first_workers]),
        control=ancient(["run/etcd.up", "run/nats.up"]),
        obsolete_stopped=ancient("run/topology.json"),
    output:
        "run/frontend.up",
    log:
        "logs/start_frontend.log",
    conda:
        ENVIRONMENT
    params:
        program=lambda wildcards: program("frontend"),
    script:
        "../scripts/start_program.py"
