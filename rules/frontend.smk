rule start_frontend:
    """Start the HTTP frontend, and have it answer a request."""
    input:
        # The first worker of each role: with more of them, or with new ones, it goes on running.
        workers=ancient([f"run/{name}.up" for name in DEPLOYMENT.first_workers]),
        control=ancient(["run/etcd.up", "run/nats.up"]),
        room=ancient("run/topology.json"),
    output:
        "run/frontend.up",
    log:
        "logs/start_frontend.log",
    conda:
        ENVIRONMENT
    params:
        program=lambda wildcards: program("frontend"),
    script:
        "../scripts/start_frontend.py"
