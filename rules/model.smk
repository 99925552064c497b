rule download_model:
    """Fetch the model at a pinned revision, with checksums, or describe a local one."""
    output:
        manifest=f"{MODEL}/model.json",
    log:
        "logs/download_model.log",
    conda:
        ENVIRONMENT
    params:
        # The model's name in the API changes no file.
        model={
            key: value
            for key, value in sections("model")["model"].items()
            if key != "name"
        },
        weights=CONFIG.engine.weights,
    script:
        "../scripts/download_model.py"
