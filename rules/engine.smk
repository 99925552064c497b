rule build_engine:
    """Make the model an engine: packed and compared with its source, or checked and configured."""
    input:
        model=f"{MODEL}/model.json",
        image=ancient(
            expand("results/checks/{check}.json", check=DEPLOYMENT.build_checks)
        ),
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
