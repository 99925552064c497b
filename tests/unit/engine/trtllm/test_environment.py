"""What a surrounding job leaves behind, and what of it must go."""

from serving.engine.trtllm.environment import scrub_mpi_environment, set_transport_defaults

LEAKED = {
    "SLURM_JOB_ID": "7",
    "SLURM_NODELIST": "n[1-4]",
    "PMI_RANK": "0",
    "PMI2_FD": "3",
    "PMIX_NAMESPACE": "slurm.pmix.7.0",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_MCA_orte_hnp_uri": "tcp://",
    "OMPI_MCA_ess_base_vpid": "0",
}
KEPT = {
    "PATH": "/bin",
    "CUDA_VISIBLE_DEVICES": "0",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_MCA_coll_hcoll_enable": "0",
    "MY_SLURM_NOTE": "x",
}


def test_job_variables_are_removed_and_settings_stay() -> None:
    environ = LEAKED | KEPT
    assert scrub_mpi_environment(environ) == sorted(LEAKED)
    assert environ == KEPT


def test_mpi_variables_stay_under_the_librarys_own_launcher() -> None:
    environ = LEAKED | {"TLLM_SPAWN_PROXY_PROCESS": "1"}
    assert scrub_mpi_environment(environ) == []
    assert environ.keys() >= LEAKED.keys()


def test_defaults_do_not_override_a_persons_settings() -> None:
    environ = {"UCX_MAX_RNDV_RAILS": "4"}
    set_transport_defaults(environ, "ucx")
    assert environ == {"UCX_MAX_RNDV_RAILS": "4", "UCX_CUDA_IPC_ENABLE_MNNVL": "n"}


def test_nixl_runs_over_ucx_and_no_transport_needs_nothing() -> None:
    environ: dict[str, str] = {}
    set_transport_defaults(environ, "")
    assert environ == {}
    set_transport_defaults(environ, "nixl")
    assert environ["TRTLLM_NIXL_KVCACHE_BACKEND"] == "UCX"
    assert environ["UCX_MAX_RNDV_RAILS"] == "1"
