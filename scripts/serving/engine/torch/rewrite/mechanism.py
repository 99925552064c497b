"""The layer rewrite: parts of a loaded model are replaced by faster ones that compute the same.

A `Pattern` finds the modules that it may replace by their children, never by a model's name. Each
replacement is proven: module and replacement compute the same sample input, and the module stays as
it was when they differ. So a layer that scales its residual, skips its rotation or adds a norm is
left alone, whatever it is called. The rest runs as transformers wrote it, and the report says so.

A rewrite replaces `forward` on the instance: attributes, names and weights stay where they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from serving.engine.torch.attention import AttentionOptions

Forward = Callable[..., Any]


class Differs(Exception):
    """A module is not what a pattern replaces; the text says what differs."""


class Observation(NamedTuple):
    """What a module makes of a sample input: named tensors, in the order of comparison.

    `options` is what the module asks of attention, where it contains attention.
    """

    tensors: dict[str, torch.Tensor]
    options: AttentionOptions | None = None


class Pattern(ABC):
    """One kind of module, and its replacement."""

    kind: str
    """For the report, in the plural."""

    tolerances: Mapping[torch.dtype, float]
    """Largest difference, relative to the norm, that rounding explains."""

    @abstractmethod
    def candidates(self, model: nn.Module) -> Iterable[nn.Module]:
        """Modules of this kind, matching or not."""

    @abstractmethod
    def require_match(self, module: Any) -> None:
        """Raises Differs when the module has other parts than those that are replaced."""

    @abstractmethod
    def observe(self, module: Any, forward: Forward) -> Observation:
        """Run `forward`, the module's own or its replacement, on the sample input."""

    @abstractmethod
    def replacement(self, module: Any, original: Observation) -> Forward:
        """A faster `forward`. Raises Differs when there is none."""


@dataclass
class RewriteReport:
    """How many modules of each kind were found, and how many of them were replaced."""

    found: Counter[str] = field(default_factory=Counter)
    replaced: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, str] = field(default_factory=dict)  # of the first that was not, by kind

    def add(self, kind: str, reason: str | None) -> None:
        """`reason` None: replaced; else why not."""
        self.found[kind] += 1
        if reason is None:
            self.replaced[kind] += 1
        else:
            self.reasons.setdefault(kind, reason)

    def __str__(self) -> str:
        parts = []
        for kind, found in self.found.items():
            text = f"{self.replaced[kind]} of {found} {kind}"
            parts.append(text + (f" ({self.reasons[kind]})" if kind in self.reasons else ""))
        return "layer rewrite: " + (", ".join(parts) or "nothing of a known pattern")


@torch.inference_mode()
def rewrite(model: nn.Module, patterns: Sequence[Pattern]) -> RewriteReport:
    """Replace what matches, pattern after pattern, in place, on the device it will run on."""
    report = RewriteReport()
    for pattern in patterns:
        for module in list(pattern.candidates(model)):
            report.add(pattern.kind, _try_to_replace(pattern, module))
    return report


def decoder_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The layers of every module that has a list of that name."""
    for container in list(model.modules()):
        layers = getattr(container, "layers", None)
        if isinstance(layers, nn.ModuleList):
            yield from layers


def _try_to_replace(pattern: Pattern, module: nn.Module) -> str | None:
    """None when it worked, else the reason in a few words: a start never fails for a rewrite."""
    try:
        pattern.require_match(module)
        original = pattern.observe(module, module)
        forward = pattern.replacement(module, original)
        _require_equal(pattern, original, pattern.observe(module, forward))
    except Differs as exc:
        return str(exc)
    except (AttributeError, TypeError, ValueError, RuntimeError) as exc:
        # A module that takes or gives other things than those we call it with.
        return f"{type(exc).__name__}: {str(exc).splitlines()[0][:80]}"
    module.forward = forward
    return None


def _require_equal(pattern: Pattern, original: Observation, ours: Observation) -> None:
    for name, theirs in original.tensors.items():
        if (error := difference(ours.tensors[name], theirs)) is None:
            raise Differs(f"{name} would have another shape")
        if not error <= pattern.tolerances[theirs.dtype]:
            raise Differs(f"{name} would differ by {error:.2g}")


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float | None:
    """Norm of the difference, relative to the norm of `theirs`; None for unequal shapes."""
    if ours.shape != theirs.shape:
        return None
    error = (ours.float() - theirs.float()).norm() / theirs.float().norm().clamp_min(1e-20)
    return float(error)
