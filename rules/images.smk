# Images for `container.runtime`. A build takes long, so no serve target depends on one: request it
# by name. Without `container.image`, workers run in the image that was built last.
from serving.deploy.containers import image_recipes


rule build_base_image:
    """Build or fetch the image with TensorRT-LLM in it."""
    output:
        "results/images/base.json",
    log:
        "logs/build_base_image.log",
    conda:
        ENVIRONMENT
    params:
        settings=lambda wildcards: image_recipes.base_image_identity(CONFIG),
    script:
        "../scripts/build_base_image.py"


rule build_image:
    """Build the image that workers run in."""
    input:
        base="results/images/base.json",
    output:
        "results/images/serving.json",
    log:
        "logs/build_image.log",
    conda:
        ENVIRONMENT
    params:
        settings=lambda wildcards: image_recipes.serving_image_identity(CONFIG),
    script:
        "../scripts/build_image.py"
