rule build_engine:
    """Pack the model for the engine and compare it with its source."""
    input:
        model=f"{MODEL}/model.json",
    output:
        engine=f"{PLAN.engine_dir}/engine.json",
    log:
        "logs/build_engine.log",
    conda:
        ENVIRONMENT
    params:
        fingerprint=PLAN.engine_fingerprint,
    script:
        "../scripts/build_engine.py"
