# What the rules share: the typed config, the plan made of it, and true markers.
import sys

# The package beside this workflow is meant, not one that is installed elsewhere.
sys.path.insert(0, f"{workflow.basedir}/scripts")

from snakemake.exceptions import WorkflowError

from serving.deploy.planning import deployment
from serving.errors import OperatorError

try:
    DEPLOYMENT = deployment.prepare(config, main=workflow.is_main_process)
except OperatorError as exc:
    if deployment.from_terminal():
        sys.exit(f"\n{exc}\n")  # a WorkflowError comes with a traceback
    raise WorkflowError(str(exc)) from None

CONFIG, PLAN, REQUEST = DEPLOYMENT.config, DEPLOYMENT.plan, DEPLOYMENT.request
# What the scripts see is complete and typed, with the topology that was asked for.
config.clear()
config.update(deployment.plain(CONFIG))

ENVIRONMENT = "../envs/serving.yaml"
MODEL = f"results/models/{DEPLOYMENT.model_key}"
CHECKS = DEPLOYMENT.checks
BOOT = deployment.boot_id()


wildcard_constraints:
    role="agg|prefill|decode",
    index=r"([a-z0-9-]+-)?\d+",
    check="host|container|gpu|ucx",


def sections(*names):
    """Those sections of the config: a rule reruns when what it depends on is changed."""
    return {name: config[name] for name in names}


def program(name):
    """What to start under this name, as text for the script."""
    try:
        return deployment.encode(PLAN[name])
    except OperatorError as exc:
        raise WorkflowError(str(exc)) from None


def checks():
    """The reports of the checks this deployment needs."""
    return expand("results/checks/{check}.json", check=CHECKS)


def service(topology):
    """Everything that makes a running service. All markers, since each may be missing alone."""
    if topology != PLAN.topology:
        raise WorkflowError(f"serve_{topology} must be named on the command line")
    return [*checks(), "run/topology.json", *markers()]


def joined():
    """Everything that runs on a node that joined."""
    if not REQUEST.joins:
        raise WorkflowError("join must be named on the command line")
    return [*checks(), "run/topology.json", *markers()]


def control_services():
    """Markers of etcd and NATS, where they are this machine's."""
    return [f"run/{name}.up" for name in ("etcd", "nats") if name in PLAN.fingerprints]


def markers():
    return [f"run/{program.name}.up" for program in PLAN.programs]


def announce():
    if REQUEST.announces:
        print(DEPLOYMENT.announcement(), file=sys.stderr)


def explain_failures():
    """What to do comes last, after Snakemake's own words about the jobs."""
    for paragraph in deployment.take_failures():
        print(f"\n{paragraph}\n", file=sys.stderr)
