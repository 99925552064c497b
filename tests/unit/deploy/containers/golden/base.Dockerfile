# TensorRT-LLM from source, for the ABI of its own devel image. Rendered from config by
# `snakemake build_base_image`; the context is a checkout of the pinned commit.
FROM nvcr.io/nvidia/tensorrt-llm/devel:1.2.0 AS wheel
WORKDIR /src/tensorrt_llm
COPY . .
RUN python3 scripts/build_wheel.py --clean --cuda_architectures "90-real;100-real"

# Without the sources and what the compiler left, which take more room than the image.
FROM nvcr.io/nvidia/tensorrt-llm/devel:1.2.0
COPY --from=wheel /src/tensorrt_llm/build/tensorrt_llm*.whl /tmp/wheel/
RUN python3 -m pip install --no-cache-dir /tmp/wheel/tensorrt_llm*.whl && rm -r /tmp/wheel
LABEL tensorrt_llm.commit="0123456789abcdef0123456789abcdef01234567"
