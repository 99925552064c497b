# A machine may change with a reboot, so each check runs once per boot.


rule check_host:
    """Is this machine fit for the deployment?"""
    output:
        "results/checks/host.json",
    log:
        "logs/check_host.log",
    conda:
        ENVIRONMENT
    params:
        config=sections("model", "engine", "workers", "kv_transfer"),
        roles=DEPLOYMENT.roles,
        boot=BOOT,
    script:
        "../scripts/check_host.py"


rule check_gpu:
    """Can the workers use their GPUs?"""
    output:
        "results/checks/gpu.json",
    log:
        "logs/check_gpu.log",
    conda:
        ENVIRONMENT
    params:
        config=sections("model", "engine", "workers", "container"),
        roles=DEPLOYMENT.roles,
        boot=BOOT,
    script:
        "../scripts/check_gpu.py"


rule check_ucx:
    """Does UCX transfer bytes between two processes here?"""
    output:
        "results/checks/ucx.json",
    log:
        "logs/check_ucx.log",
    conda:
        ENVIRONMENT
    params:
        config=sections("kv_transfer"),
        boot=BOOT,
    script:
        "../scripts/check_ucx.py"


rule check_container:
    """Can the configured container runtime start the configured image?"""
    output:
        "results/checks/container.json",
    log:
        "logs/check_container.log",
    conda:
        ENVIRONMENT
    params:
        config=sections("engine", "workers", "kv_transfer", "container"),
        boot=BOOT,
    script:
        "../scripts/check_container.py"
