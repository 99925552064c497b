# What workers run in. Rendered from config by `snakemake build_image`.
FROM nvcr.io/nvidia/tensorrt-llm/release:1.2.0

# Packages first, since they change seldom. What the base has stays as it is: TensorRT-LLM is built
# against its own torch, and its other pins belong together. What it lacks comes at our pins.
COPY requirements.txt constraints.txt keep_base.py /opt/serving/
RUN python3 /opt/serving/keep_base.py /opt/serving/constraints.txt > /opt/serving/pins.txt \
    && PIP_CONSTRAINT= PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --no-cache-dir \
        --root-user-action=ignore -r /opt/serving/requirements.txt -c /opt/serving/pins.txt

# This project last: a change of it repeats nothing above.
COPY scripts /opt/serving/scripts
ENV PYTHONPATH=/opt/serving/scripts
