"""How long work tells a person how far it is: one line at a time, to whoever started it."""

from __future__ import annotations

from collections.abc import Callable

Report = Callable[[str], None]
"""Takes one line of progress. Rule scripts print and log it; a caller without a terminal drops it."""
