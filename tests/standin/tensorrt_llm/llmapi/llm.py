"""Test code. LLM: the arguments, signatures and checks of the real one over the stand-in's engine."""

from __future__ import annotations

import atexit
import copy
import itertools
import json
import weakref
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from tensorrt_llm import _contract, _failures, _generate, _settings, _touches
from tensorrt_llm.executor.result import RequestOutput
from tensorrt_llm.llmapi import llm_args
from tensorrt_llm.sampling_params import SamplingParams

_UINT64 = (1 << 64) - 1


class _Tokenizer:
    """What SamplingParams and results need of one."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        path = folder / "generation_config.json"
        content = json.loads(path.read_text()) if path.exists() else {}
        config = json.loads((folder / "config.json").read_text()) | content
        eos = config.get("eos_token_id")
        self.eos_token_id = eos[0] if isinstance(eos, list) and eos else eos or None
        self.pad_token_id = config.get("pad_token_id")

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids))


class _EmptyIterable:
    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        raise StopAsyncIteration


class BaseLLM(_touches.Watched):
    """What both flows have; `_arguments` is the model of the arguments."""

    _arguments: Any

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        self._executor: Any = None
        self.args = self._arguments(
            model=model,
            tokenizer=tokenizer,
            tokenizer_mode=tokenizer_mode,
            skip_tokenizer_init=skip_tokenizer_init,
            trust_remote_code=trust_remote_code,
            tensor_parallel_size=tensor_parallel_size,
            dtype=dtype,
            revision=revision,
            tokenizer_revision=tokenizer_revision,
            **kwargs,
        )
        _touches.touch(*(f"{self._arguments.__name__}.{n}" for n in self._given()))
        _failures.raise_at_start()
        settings = self._settings = self._load_settings(_folder(Path(model)))
        where = Path(tokenizer) if tokenizer is not None else settings.model_dir
        self._tokenizer = None if skip_tokenizer_init else _Tokenizer(where)
        self._ids = itertools.count(1)
        from tensorrt_llm._executor import Executor

        self._executor = Executor(settings)
        atexit.register(_shutdown, weakref.ref(self))

    def _given(self) -> list[str]:
        """Arguments that do not have their default."""
        fields = self._arguments.model_fields
        return [n for n in self.args.model_fields_set if getattr(self.args, n) != fields[n].default]

    def _load_settings(self, folder: Path) -> _settings.Settings:
        return _settings.read(self.args, folder)

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    @property
    def llm_id(self) -> str:
        return f"standin-{id(self)}"

    def generate_async(self, *args: Any, **kwargs: Any) -> Any:
        """The signature is the version's, see `__signature__`."""
        bound = _SIGNATURE.bind(*args, **kwargs)
        _touches.keywords("LLM.generate_async", kwargs)
        bound.apply_defaults()
        given = bound.arguments
        if self._executor is None or self._executor.is_shut_down:
            raise RuntimeError("LLM is shutting down")
        return self._generate(given)

    def _generate(self, given: dict[str, Any]) -> Any:
        from tensorrt_llm._request import Job

        params = self._prepared(given["sampling_params"])
        disaggregated = given["disaggregated_params"]
        kind = None if disaggregated is None else disaggregated.request_type
        if kind == "context_only":
            params.max_tokens = 1
        prompt = self._prompt(given["inputs"])
        self._check_length(len(prompt), kind)
        params._get_stop_reasons_and_words()
        self._executor.begin_results()
        request_id = next(self._ids) & _UINT64
        result = RequestOutput(
            request_id,
            prompt,
            params,
            self._executor.abort,
            self._tokenizer.decode if self._tokenizer and params.detokenize else None,
            disaggregated,
        )
        job = Job(
            request_id,
            prompt,
            params,
            given["streaming"],
            disaggregated,
            given.get("cache_salt"),
            result,
            self._settings.stream_interval,
            self._settings.always_greedy,
        )
        self._executor.submit(job)
        return result

    def generate(self, inputs: Any, sampling_params: Any = None, **more: Any) -> Any:
        """One prompt or several, blocking."""
        one = isinstance(inputs, str) or (bool(inputs) and isinstance(inputs[0], int))
        several = [inputs] if one else list(inputs)
        results = [
            self.generate_async(each, sampling_params=copy.copy(sampling_params), **more)
            for each in several
        ]
        for result in results:
            result.result()
        return results[0] if one else results

    def get_stats_async(self, timeout: float | None = 2) -> Any:
        result = self._executor.stats_result
        if result is None:
            return _EmptyIterable()
        result.set_timeout(timeout)
        return result

    def get_stats(self, timeout: float | None = 2) -> list[dict[str, Any]]:
        result = self._executor.stats_result
        if result is None:
            return []
        result.set_timeout(timeout)
        return result.get_results()  # type: ignore[no-any-return]

    def get_kv_cache_events_async(self, timeout: float | None = 2) -> Any:
        result = self._executor.events_result
        assert result is not None, "KV Event IterationResult is not properly instantiated."
        result.set_timeout(timeout)
        return result

    def get_kv_cache_events(self, timeout: float | None = 2) -> list[dict[str, Any]]:
        return self.get_kv_cache_events_async(timeout).get_results()  # type: ignore[no-any-return]

    def shutdown(self) -> None:
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.shutdown()

    def __getstate__(self) -> object:
        raise RuntimeError("LLM object can not be pickled.")

    def _prepared(self, params: Any) -> Any:
        """The caller's own object is changed, as the real one does."""
        if params is None:
            params = SamplingParams()
        if not isinstance(params, SamplingParams):
            raise TypeError(
                f"The sampling_params must be type SamplingParams or None, but got {type(params)}"
            )
        if params.end_id is None:
            if self._tokenizer is None:
                raise ValueError(
                    "tokenizer is required to reset end_id if it is None, or you can explicitly "
                    "specify the end_id for sampling_params"
                )
            params._setup(self._tokenizer)
        if params.n > 1 or params.best_of > 1 or params.use_beam_search:
            raise ValueError("the stand-in computes one sequence per request")
        if params.guided_decoding is not None:
            what = "cannot enforce it" if self._settings.guided else "has no backend for it"
            raise ValueError(f"guided decoding was asked for, and the stand-in {what}")
        params.return_perf_metrics = params.return_perf_metrics or self._settings.perf_metrics
        return params

    def _prompt(self, inputs: Any) -> list[int]:
        if isinstance(inputs, dict):
            inputs = inputs.get("prompt_token_ids") or inputs.get("prompt")
        if isinstance(inputs, str):
            if self._tokenizer is None:
                raise ValueError("a text prompt needs a tokenizer")
            return self._tokenizer.encode(inputs)
        if not isinstance(inputs, list) or not inputs or not isinstance(inputs[0], int):
            raise TypeError(f"The inputs must be type str or list of int, but got {type(inputs)}")
        return list(inputs)

    def _check_length(self, prompt_len: int, kind: str | None) -> None:
        s = self._settings
        if s.chunked_prefill or kind == "generation_only":
            return
        if prompt_len > s.max_num_tokens:
            raise ValueError(
                f"The sum of prompt length ({prompt_len / 1}), query length (0) should not exceed "
                f"max_num_tokens ({s.max_num_tokens})"
            )


_SIGNATURE = _generate.signature("LLM.generate_async")
BaseLLM.generate_async.__signature__ = _generate.with_self(_SIGNATURE)  # type: ignore[attr-defined]


class LLM(BaseLLM):
    """The PyTorch flow."""

    _arguments = llm_args.TorchLlmArgs

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        backend = kwargs.get("backend", "pytorch")
        if backend == "tensorrt" and "TrtLlmArgs" not in _contract.classes(
            _contract.current_version()
        ):
            raise ValueError("the TensorRT backend was removed: backend='tensorrt'")
        if kwargs.get("backend") is None:
            kwargs.pop("backend", None)
        super().__init__(model, *args, **kwargs)


def _folder(model: Path) -> Path:
    if not model.is_dir():
        raise ValueError(f"{model} is no folder, and nothing is downloaded here")
    return model


def _shutdown(reference: weakref.ReferenceType[BaseLLM]) -> None:
    llm = reference()
    if llm is not None:
        llm.shutdown()
