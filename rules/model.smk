rule download_model:
    """Fetch the model at a pinned revision, with checksums, or describe a local one."""
    output:
        manifest=f"{MODEL}/model.json",
    log:
        "logs/download_model.log",
    conda:
        ENVIRONMENT
    params:
        model=sections("model")["model"],
    script:
        "../scripts/download_model.py"
