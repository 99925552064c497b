# What the rules share: the resolved configuration, the plan made from it, and markers that are true.
import sys

# Import the package beside this workflow, not one that is installed elsewhere.
sys.path.insert(0, f"{workflow.basedir}/scripts")

from snakemake.exceptions import WorkflowError

from serving.deploy.planning import deployment, run_state
from serving.deploy.planning.config_file import config_file_to_read
from serving.deploy.planning.invocation import from_terminal
from serving.deploy.rule_script import script_config
from serving.deploy.planning.shell_word import quote_interpreter, require_usable_paths
from serving.errors import OperatorError, disk_error


def end_with(exc):
    """End the run with the paragraph of `exc`."""
    if from_terminal():
        sys.exit(f"\n{exc}\n")  # a WorkflowError comes with a traceback
    raise WorkflowError(str(exc)) from None


try:
    require_usable_paths(Path(workflow.basedir), Path.cwd())
    CONFIG_FILE = config_file_to_read(Path(workflow.basedir))
except OperatorError as exc:
    end_with(exc)

quote_interpreter()

if CONFIG_FILE is not None:

    configfile: CONFIG_FILE


try:
    DEPLOYMENT = deployment.prepare(config, main=workflow.is_main_process)
except OperatorError as exc:
    end_with(exc)
except OSError as exc:
    if (error := disk_error(exc)) is None:
        raise
    end_with(error)

CONFIG, PLAN, INVOCATION = DEPLOYMENT.config, DEPLOYMENT.plan, DEPLOYMENT.invocation
# Scripts get the resolved configuration, and no key as the person wrote it.
config.clear()
config.update(script_config(CONFIG, run_state.failures_file()))

ENVIRONMENT = "../envs/serving.yaml"
MODEL = f"results/models/{CONFIG.model_key}"
CHECKS = DEPLOYMENT.checks
BOOT = deployment.boot_id()


wildcard_constraints:
    role="agg|prefill|decode",
    index=r"([a-z0-9-]+-)?\d+",
    check="host|container|gpu|ucx",


def sections(*names):
    """Sections of the config as a parameter: a rule reruns when a section it names changes."""
    return {name: config["resolved"][name] for name in names}


def program(name):
    """The program of this name, as text for the script."""
    try:
        return deployment.encode(PLAN[name])
    except OperatorError as exc:
        raise WorkflowError(str(exc)) from None


def checks():
    """The reports of the checks that this deployment needs."""
    return expand("results/checks/{check}.json", check=CHECKS)


def service(topology):
    """Everything that a running service consists of: all markers, because each may be missing alone."""
    if topology != PLAN.topology:
        raise WorkflowError(f"serve_{topology} must be named on the command line")
    return [*checks(), "run/topology.json", *markers()]


def joined():
    """Everything that runs on a node that joins."""
    if not INVOCATION.joins:
        raise WorkflowError("join must be named on the command line")
    return [*checks(), "run/topology.json", *markers()]


def control_services():
    """Markers of etcd and NATS, if this machine runs them."""
    return [f"run/{name}.up" for name in ("etcd", "nats") if name in PLAN.fingerprints]


def markers():
    return [f"run/{program.name}.up" for program in PLAN.programs]


def served_first():
    """What must run before a command that is about the service, when one run asks for both."""
    complete = INVOCATION.announces or INVOCATION.joins
    return [*checks(), "run/topology.json", *markers()] if complete else []


def announce():
    if INVOCATION.executes and (INVOCATION.announces or INVOCATION.joins):
        print(DEPLOYMENT.announcement(), file=sys.stderr)


def explain_failures():
    """The remedies come last, after Snakemake's own account of the jobs."""
    for paragraph in run_state.take_failures():
        print(f"\n{paragraph}\n", file=sys.stderr)
