"""Programs on PATH that are shell scripts."""

from collections.abc import Callable
from pathlib import Path

Script = Callable[[str, str], Path]
"""The fixture `script`: takes name and body, and returns the file that records calls."""
