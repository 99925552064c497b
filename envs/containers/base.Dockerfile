# TensorRT-LLM from source, for the ABI of its own devel image. Rendered from config by
# `snakemake build_base_image`; the context is a checkout of the pinned commit.
FROM {{ devel }} AS wheel
WORKDIR /src/tensorrt_llm
COPY . .
RUN python3 scripts/build_wheel.py --clean{% if cuda_architectures %} --cuda_architectures "{{ cuda_architectures }}"{% endif %}

# Without the sources and what the compiler left, which take more room than the image.
FROM {{ devel }}
COPY --from=wheel /src/tensorrt_llm/build/tensorrt_llm*.whl /tmp/wheel/
RUN python3 -m pip install --no-cache-dir /tmp/wheel/tensorrt_llm*.whl && rm -r /tmp/wheel
LABEL tensorrt_llm.commit="{{ commit }}"
