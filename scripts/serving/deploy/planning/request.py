"""What the person asked Snakemake for, as far as it decides what the DAG should be.

Snakemake parses the Snakefile before it looks at the targets, but which topology is meant, and
whether anything will be executed at all, must be known while the rules are written. So the
command line is read here once more, by Snakemake's own parser.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Sequence
from typing import Any, cast

from msgspec import Struct

from serving.config import Topology
from serving.errors import OperatorError

PINNED: dict[str, Topology] = {
    "serve_agg": "agg",
    "serve_agg_router": "agg_router",
    "serve_disagg": "disagg",
    "serve_disagg_router": "disagg_router",
    "serve_disagg_multinode": "disagg_multinode",
}
SERVE = frozenset({"serve", *PINNED})
JOIN = "join"

# Everything that makes Snakemake look, print or tidy instead of running jobs.
_LOOKS_ONLY = (
    *("dryrun", "touch", "lint", "list_target_rules", "list_rules", "print_compilation"),
    *("containerize", "generate_unit_tests", "dag", "rulegraph", "filegraph", "d3dag", "unlock"),
    *("cleanup_metadata", "conda_cleanup_envs", "conda_create_envs_only", "list_conda_envs"),
    *("cleanup_shadow", "container_cleanup_images", "list_changes", "list_input_changes"),
    *("list_params_changes", "list_untracked", "summary", "detailed_summary", "archive"),
    *("delete_all_output", "delete_temp_output", "report"),
)


class Request(Struct, frozen=True):
    """`topology` is the one a target pins. `executes`: jobs will run, in this very process."""

    targets: tuple[str, ...]
    topology: Topology | None
    executes: bool

    @property
    def serves(self) -> bool:
        """Whether programs should run afterwards: a serve target, a marker, or no target."""
        started = any(target.endswith(".up") for target in self.targets)
        return self.announces or self.joins or started

    @property
    def joins(self) -> bool:
        """Whether this machine should work for a head."""
        return JOIN in self.targets

    @property
    def announces(self) -> bool:
        """Whether a whole service is asked for, so that its address is of interest."""
        return not self.targets or not SERVE.isdisjoint(self.targets)


def from_command_line(argv: Sequence[str]) -> Request:
    """`argv` without the program's name. Raises OperatorError for two topologies at once."""
    from snakemake.cli import parse_args  # type: ignore[import-untyped]

    # It has named the profile it uses once already.
    with contextlib.redirect_stderr(io.StringIO()):
        _, args = cast(tuple[Any, argparse.Namespace], parse_args(list(argv)))
    targets = tuple(sorted(args.targets or ()))
    topologies = {PINNED[target] for target in targets if target in PINNED}
    if len(topologies) > 1:
        named = " and ".join(target for target in targets if target in PINNED)
        raise OperatorError(
            f"{named} cannot be served at the same time",
            remedy="ask for one of them; a second deployment needs a directory and ports of its own",
        )
    if JOIN in targets and not SERVE.isdisjoint(targets):
        raise OperatorError(
            "a node that joins serves what its head does",
            remedy="ask for `join` alone; a head starts with `serve_disagg_multinode`",
        )
    return Request(
        targets=targets,
        topology=next(iter(topologies), None),
        executes=not any(getattr(args, flag, None) for flag in _LOOKS_ONLY),
    )
