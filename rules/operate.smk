rule status:
    """Show what runs here."""
    input:
        served_first(),
    log:
        "logs/status.log",
    conda:
        ENVIRONMENT
    script:
        "../scripts/status.py"


rule stop:
    """Stop all programs in order, and make sure that none is left."""
    log:
        "logs/stop.log",
    conda:
        ENVIRONMENT
    script:
        "../scripts/stop.py"
