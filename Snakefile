"""From a model ID to a running, OpenAI-compatible service. `snakemake --list` names the targets."""

from snakemake.utils import min_version

min_version("9.0")


include: "rules/common.smk"
include: "rules/model.smk"
include: "rules/engine.smk"
include: "rules/checks.smk"
include: "rules/images.smk"
include: "rules/services.smk"
include: "rules/workers.smk"
include: "rules/frontend.smk"
include: "rules/verify.smk"
include: "rules/bench.smk"
include: "rules/operate.smk"


rule serve:
    """Serve the topology that the config names (the default target)."""
    default_target: True
    input:
        lambda wildcards: service(PLAN.topology),


rule serve_agg:
    """Serve with workers that prefill and decode."""
    input:
        lambda wildcards: service("agg"),


rule serve_agg_router:
    """Serve with workers that prefill and decode, routed by KV cache."""
    input:
        lambda wildcards: service("agg_router"),


rule serve_disagg:
    """Serve with prefill and decode in separate workers."""
    input:
        lambda wildcards: service("disagg"),


rule serve_disagg_router:
    """Serve with prefill and decode in separate workers, routed by KV cache."""
    input:
        lambda wildcards: service("disagg_router"),


rule serve_disagg_multinode:
    """Serve from this head node: etcd, NATS, frontend and its own workers; other nodes `join`."""
    input:
        lambda wildcards: service("disagg_multinode"),
        "run/cluster.open",


rule join:
    """Start this node's workers for the head at `cluster.head`."""
    input:
        lambda wildcards: joined(),


onsuccess:
    announce()


onerror:
    explain_failures()
