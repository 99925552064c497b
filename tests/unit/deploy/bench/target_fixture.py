"""A service that a benchmark could measure."""

from serving.deploy.bench.target import Target

TARGET = Target(
    url="http://127.0.0.1:8000",
    model="m",
    topology="agg_router",
    policy="kv",
    num_instances=2,
    max_model_len=1000,
    tokenizer_dir="/t",
)
