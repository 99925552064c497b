"""Whether the torch engine answers as transformers does, before anybody is served.

First a small model of the same config with random weights: its prompts are longer than every window
and block, and KV comes to be in every way there is. Then the model itself, on short prompts. The
reference is `generate` with transformers' own masks and cache (`eager` attention, which ignores
nothing). Log-probabilities are compared, not only tokens, so that a near-tie is no difference and a
small error is one.
"""

from __future__ import annotations

import inspect
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from serving.engine.torch.build_check.engine_answers import (
    BLOCK_SIZE,
    REMEDY,
    Case,
    EngineAnswer,
    answer,
)
from serving.engine.torch.build_check.shrink import VOCAB_SIZE, WINDOW, small_model_of
from serving.errors import ModelError, OperatorError
from serving.progress import Report

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)

TOLERANCE = {"float32": 0.003, "bfloat16": 0.5, "float16": 0.1, "int8": 1.5}
"""Largest difference of a log-probability, in standard deviations of the logits around it. Another
order of summation gives 1e-5 in float32; a scaling that is off by 5% gives 0.01, a missing window 1."""

_SEEDS = (0, 1)  # a difference must repeat: MoE routers can be within rounding of another expert
_KINDS = ("token_type_ids", "mm_token_type_ids")
_REAL_TOKENS = 6
_REAL_S = 20.0


class Reference(NamedTuple):
    """What `generate` chose, and its logits `[num_tokens, vocab_size]` (float32)."""

    case: Case
    tokens: list[int]
    logits: torch.Tensor


class Difference(NamedTuple):
    """`size` is in standard deviations of the logits."""

    case: str
    position: int
    size: float

    def __str__(self) -> str:
        return (
            f"{self.case}, token {self.position + 1} of the answer: its log-probability differs by "
            f"{self.size:.2g} standard deviations of the logits"
        )


def check_small_model(
    config: PreTrainedConfig,
    near: Path,
    report: Report,
    reference_model: Callable[[PreTrainedModel], PreTrainedModel] | None = None,
    *,
    device: str = "cpu",
) -> None:
    """Raises ModelError unless a small model of `config` is served as `generate` computes it.

    `reference_model` makes the model that generates of the small one. `device` is the one that will
    serve: its runner, kernels and graphs are what is checked, in float32. Without its GPU, or
    without memory there, the check falls back to the CPU and reports it. Temporary files go beside
    the folder `near`.
    """
    import torch

    if device != "cpu" and not torch.cuda.is_available():
        report("no GPU is here: the CPU checks how the engine computes this model")
        device = "cpu"
    try:
        _check_small_model(config, near, report, reference_model, device)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        report("the GPU has no memory left: the CPU checks how the engine computes this model")
        _check_small_model(config, near, report, reference_model, "cpu")
    finally:
        if device != "cpu":
            _leave_gpu()


def _leave_gpu() -> None:
    """A service may run beside the build. A GPU that has failed cannot be left any more."""
    import torch

    try:
        torch.cuda.empty_cache()
    except RuntimeError as exc:
        log.warning("the GPU's memory was not given back: %s", exc)


def _check_small_model(
    config: PreTrainedConfig,
    near: Path,
    report: Report,
    reference_model: Callable[[PreTrainedModel], PreTrainedModel] | None,
    device: str,
) -> None:
    import torch

    started = time.monotonic()
    found: Difference | None = None
    for seed in _SEEDS:
        folder = Path(tempfile.mkdtemp(prefix=f"{near.name}-check-", dir=near.parent))
        try:
            small_model_of(config, folder, seed)
            cases = small_cases(seed)
            # The engine first: it knows best why it cannot run something.
            answers = answer(
                folder, "float32", device, cases.together, cases.after, exported=cases.exported
            )
            model = _load(folder)
            model = reference_model(model) if reference_model else model
            references = [reference(model, case) for case in cases.everything]
        except (OperatorError, torch.OutOfMemoryError):
            raise
        except Exception as exc:  # whatever a model raises that does not fit
            raise cannot_compute("a small model of the same config", exc) from exc
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        for case in cases.after:
            assert answers[case.name].cached_tokens, f"{case.name} found nothing in the cache"
        found = first_difference(references, answers, TOLERANCE["float32"])
        if found is None:
            report(
                f"the engine on {device} and `generate` agree on a small model of this config: "
                f"{', '.join(case.name for case in cases.everything)} "
                f"({time.monotonic() - started:.1f} s)"
            )
            return
        log.warning("seed %d: %s", seed, found)
    raise ModelError(
        "the torch engine would not compute this model as transformers does; on a small model of "
        f"the same config: {found}",
        remedy=REMEDY,
    )


def cannot_compute(what: str, exc: Exception) -> ModelError:
    text = (str(exc).strip() or "no reason given").splitlines()[0]
    return ModelError(
        f"the torch engine cannot compute this model: {what} fails with {type(exc).__name__}: {text}",
        remedy=REMEDY,
    )


class Cases(NamedTuple):
    together: list[Case]
    after: list[Case]
    exported: list[Case]

    @property
    def everything(self) -> list[Case]:
        return [*self.together, *self.after, *self.exported]


def small_cases(seed: int) -> Cases:
    """Prompts beyond every window, chunk and block of the small model."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(1, VOCAB_SIZE, (count,), generator=generator).tolist()

    long, short = tokens(3 * WINDOW + 13), tokens(BLOCK_SIZE + 3)
    return Cases(
        [Case("a batch of two in chunks", long, 12), Case("a batch of two", short, 28)],
        [Case("a prefix hit", [*long[: 5 * BLOCK_SIZE + 2], *tokens(9)], 6)],
        [Case("KV from another engine", tokens(2 * WINDOW + 6), 10)],
    )


def real_references(model: PreTrainedModel, prompts: Sequence[list[int]]) -> list[Reference]:
    """`generate` on short prompts; fewer of them when the model is slow, one at least."""
    references: list[Reference] = []
    deadline = time.monotonic() + _REAL_S
    for index, prompt in enumerate(prompts):
        if references and time.monotonic() > deadline:
            break
        references.append(reference(model, Case(f"prompt {index + 1}", prompt, _REAL_TOKENS)))
    return references


def check_real_model(
    folder: Path, dtype: str, references: Sequence[Reference], report: Report
) -> None:
    """Raises ModelError unless the engine over `folder` answers like `references`, on CPU."""
    started = time.monotonic()
    try:
        answers = answer(folder, dtype, "cpu", [each.case for each in references])
    except OperatorError:
        raise
    except Exception as exc:  # whatever a model raises that does not fit
        raise cannot_compute("its first prompt", exc) from exc
    if found := first_difference(references, answers, TOLERANCE[dtype]):
        raise ModelError(
            f"the torch engine does not compute this model as transformers does: {found}",
            remedy=REMEDY,
        )
    report(
        f"the engine and `generate` agree on {len(references)} prompts "
        f"({time.monotonic() - started:.1f} s)"
    )


def reference(model: Any, case: Case) -> Reference:
    """Greedy, one prompt at a time."""
    import torch
    from transformers import GenerationConfig

    plain: Any = GenerationConfig
    ids = torch.tensor([case.prompt])
    # What processors say of the tokens of a text, where a multimodal model wants to know it.
    kinds = {name: torch.zeros_like(ids) for name in _kinds_of_tokens(model)}
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **kinds,
            generation_config=plain(
                max_new_tokens=case.num_tokens,
                do_sample=False,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            ),
        )
    tokens: list[int] = out.sequences[0, len(case.prompt) :].tolist()
    return Reference(case, tokens, torch.stack([step[0].float() for step in out.logits]))


def _kinds_of_tokens(model: Any) -> list[str]:
    if not hasattr(model.config, "text_config"):
        return []
    return [name for name in _KINDS if name in inspect.signature(model.forward).parameters]


def first_difference(
    references: Sequence[Reference], answers: dict[str, EngineAnswer], tolerance: float
) -> Difference | None:
    """The first answer that differs from its reference by more than `tolerance`, or None."""
    for case, tokens, logits in references:
        found = answers[case.name]
        if len(found.tokens) != len(tokens) or len(found.logprobs) != len(tokens):
            return Difference(case.name, len(found.tokens), float("inf"))
        for position, expected in enumerate(logits):
            spread = max(float(expected.std()), 1e-6)
            logprobs = expected.log_softmax(-1)
            token = found.tokens[position]
            error = abs(found.logprobs[position] - float(logprobs[token])) / spread
            lost = float(logprobs.max() - logprobs[token]) / spread
            if not max(error, lost) <= tolerance:
                return Difference(case.name, position, max(error, lost))
            if token != tokens[position]:  # a near-tie; the answers part here
                break
    return None


def _load(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    return auto.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
