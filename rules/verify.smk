rule smoke_test:
    """Test the running service end to end; starts it when nothing is deployed here."""
    input:
        service(PLAN.topology) if DEPLOYMENT.starts_for_smoke_test else [],
    log:
        "logs/smoke_test.log",
    conda:
        ENVIRONMENT
    script:
        "../scripts/smoke_test.py"


rule doctor:
    """Find out why the service does not work."""
    input:
        served_first(),
    log:
        "logs/doctor.log",
    conda:
        ENVIRONMENT
    script:
        "../scripts/doctor.py"


rule plan:
    """Propose numbers of prefill and decode workers for a recorded workload, by simulation."""
    log:
        "logs/plan.log",
    conda:
        ENVIRONMENT
    script:
        "../scripts/plan.py"
