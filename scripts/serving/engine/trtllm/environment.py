"""Environment variables that decide whether TensorRT-LLM starts, and whether its KV moves.

Its ranks are started with MPI spawn even for one GPU. Inside a Slurm or PMIx job, spawn takes the
job's variables for its own and waits for peers that do not exist.
"""

from __future__ import annotations

from collections.abc import MutableMapping

_LAUNCHERS = ("SLURM_", "PMI_", "PMI2_", "PMIX_", "OMPI_")
# Settings, not the identity of a job: people and container images set these on purpose.
_SETTINGS = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_MCA_", "PMIX_MCA_")
# These are set by `mpirun` for the processes that it starts, though named like settings.
_IDENTITY = ("OMPI_MCA_orte_", "OMPI_MCA_ess", "OMPI_MCA_pmix", "OMPI_MCA_initial_wdir")

MULTI_NODE = "TLLM_SPAWN_PROXY_PROCESS"
"""Set by `trtllm-llmapi-launch`, under which the job's variables are meant."""

UCX_DEFAULTS = {
    # Multi-node NVLink is probed for at start, and on hosts without it the probe can fail.
    "UCX_CUDA_IPC_ENABLE_MNNVL": "n",
    # One transfer over several network cards at once has led to hangs.
    "UCX_MAX_RNDV_RAILS": "1",
}
NIXL_DEFAULTS = {"TRTLLM_NIXL_KVCACHE_BACKEND": "UCX"}


def scrub_mpi_environment(environ: MutableMapping[str, str]) -> list[str]:
    """Remove what a surrounding job left for its own MPI processes. Returns the removed names.

    Nothing is removed under `trtllm-llmapi-launch`.
    """
    if environ.get(MULTI_NODE) == "1":
        return []
    leaked = sorted(name for name in environ if _is_leaked(name))
    for name in leaked:
        del environ[name]
    return leaked


def _is_leaked(name: str) -> bool:
    if not name.startswith(_LAUNCHERS):
        return False
    return name.startswith(_IDENTITY) or not name.startswith(_SETTINGS)


def set_transport_defaults(environ: MutableMapping[str, str], transport: str) -> None:
    """Set what prevents known hangs, except where a person has decided otherwise.

    `transport` is `ucx`, `nixl` or empty (no KV is moved).
    """
    if transport:
        defaults = UCX_DEFAULTS | (NIXL_DEFAULTS if transport == "nixl" else {})
        for name, value in defaults.items():
            environ.setdefault(name, value)
