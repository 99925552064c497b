rule download_model:
    """Fetch the model at a pinned revision, with checksums, or describe a local one."""
    output:
        manifest=f"{MODEL}/model.json",
    log:
        "logs/download_model.log",
    conda:
        ENVIRONMENT
    params:
        # The name it is served under changes no file.
        model={key: config["model"][key] for key in config["model"] if key != "name"},
        weights=config["engine"]["weights"],
    script:
        "../scripts/download_model.py"
