"""What the person asked Snakemake for, as far as the DAG depends on it.

Snakemake parses the Snakefile before it looks at the targets. But the topology, and whether
anything will be executed at all, must be known while the rules are written. So this module reads
the command line once more, with Snakemake's own parser.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from msgspec import Struct

from serving.config import Topology
from serving.errors import OperatorError

TOPOLOGY_OF_TARGET: dict[str, Topology] = {
    "serve_agg": "agg",
    "serve_agg_router": "agg_router",
    "serve_disagg": "disagg",
    "serve_disagg_router": "disagg_router",
    "serve_disagg_multinode": "disagg_multinode",
}
SERVE = frozenset({"serve", *TOPOLOGY_OF_TARGET})
JOIN = "join"
STOP = "stop"
_NEEDS_THE_SERVICE = frozenset({*SERVE, JOIN, "smoke_test", "bench", "doctor"})

# Everything that makes Snakemake look, print or tidy instead of running jobs.
_FLAGS_WITHOUT_JOBS = (
    *("dryrun", "touch", "lint", "list_target_rules", "list_rules", "print_compilation"),
    *("containerize", "generate_unit_tests", "dag", "rulegraph", "filegraph", "d3dag", "unlock"),
    *("cleanup_metadata", "conda_cleanup_envs", "conda_create_envs_only", "list_conda_envs"),
    *("cleanup_shadow", "container_cleanup_images", "list_changes", "list_input_changes"),
    *("list_params_changes", "list_untracked", "summary", "detailed_summary", "archive"),
    *("delete_all_output", "delete_temp_output", "report"),
)


class Invocation(Struct, frozen=True):
    """`topology` is the one that a target names. `executes`: jobs will run, in this very process.

    `config_files` are those of `--configfile`.
    """

    targets: tuple[str, ...] = ()
    topology: Topology | None = None
    executes: bool = False
    config_files: tuple[str, ...] = ()

    @property
    def serves(self) -> bool:
        """Whether programs should run afterwards: for a serve target, `join`, a marker, or no target."""
        started = any(target.endswith(".up") for target in self.targets)
        return self.announces or self.joins or started

    @property
    def joins(self) -> bool:
        """Whether this machine should work for a head."""
        return JOIN in self.targets

    @property
    def announces(self) -> bool:
        """Whether a whole service starts, so that its address is worth printing."""
        return not self.targets or not SERVE.isdisjoint(self.targets)


def read_command_line(argv: Sequence[str]) -> Invocation:
    """`argv` without the program's name. Raises OperatorError for targets that exclude each other."""
    from snakemake.cli import parse_args  # type: ignore[import-untyped]

    # The parser names the profile it uses on stderr; Snakemake already did that.
    with contextlib.redirect_stderr(io.StringIO()):
        _, args = cast(tuple[Any, argparse.Namespace], parse_args(list(argv)))
    targets = tuple(sorted(args.targets or ()))
    topologies = {TOPOLOGY_OF_TARGET[target] for target in targets if target in TOPOLOGY_OF_TARGET}
    if len(topologies) > 1:
        named = " and ".join(target for target in targets if target in TOPOLOGY_OF_TARGET)
        raise OperatorError(
            f"{named} cannot be served at the same time",
            remedy="ask for one of them; a second deployment needs a directory and ports of its own",
        )
    if STOP in targets:
        for target in targets:
            if target in _NEEDS_THE_SERVICE or target.endswith(".up"):
                raise OperatorError(
                    f"`stop` and `{target}` cannot be done in one run: nobody knows which comes first",
                    remedy=f"run `snakemake stop`, then `snakemake {target}`",
                )
    if JOIN in targets and not SERVE.isdisjoint(targets):
        raise OperatorError(
            "a node that joins serves what its head serves",
            remedy="ask for `join` alone; a head starts with `serve_disagg_multinode`",
        )
    return Invocation(
        targets=targets,
        topology=next(iter(topologies), None),
        executes=not any(getattr(args, flag, None) for flag in _FLAGS_WITHOUT_JOBS),
        config_files=tuple(map(str, args.configfile or ())),
    )


def from_terminal() -> bool:
    """Whether this process is Snakemake's own command line. Otherwise Snakemake is used as a
    library, and `sys.argv` belongs to another program."""
    path = Path(sys.argv[0])
    return path.name == "snakemake" or (path.name == "__main__.py" and "snakemake" in path.parts)
