"""Print constraints for pip: what is installed stays, and the file's pins hold for all else."""

import re
import sys
from importlib.metadata import distributions
from pathlib import Path


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    # A broken installation has no name, and nothing to keep.
    names = ((d.metadata["Name"], d.version) for d in distributions())
    installed = {canonical(name): version for name, version in names if name}
    for name, version in sorted(installed.items()):
        print(f"{name}=={version}")
    for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines():
        if "==" in line and canonical(line.split("==")[0]) not in installed:
            print(line)
