rule build_engine:
    """Build the engine: pack the weights and compare logits with the source, or check and configure TensorRT-LLM."""
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
