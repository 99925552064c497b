"""lm-eval's `local-completions` against this service, and its `hf` model, on the same items.

Both must give the same figures. The items come with this script, since no data set can be fetched
everywhere: choices of one and of several tokens, texts to be judged as a whole, and answers to be
generated.

    pip install --no-deps --target build/lm-eval -r envs/lm-eval.txt
    PYTHONPATH=scripts:tests:build/lm-eval python tests/benchmarks/lm_eval_figures.py
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.evaluator
import lm_eval.tasks
import yaml
from integration.deployment import DEFAULT_MODEL, Deployment, running

TOLERANCE = 2e-3
"""Of a log-probability, in nats: both compute in float32, in another order."""

CHOICES: list[tuple[str, list[str], int]] = [
    ("The capital of France is", ["Paris", "London", "Berlin", "Madrid"], 0),
    ("Water freezes at zero degrees", ["Celsius", "Kelvin", "Newton", "per hour"], 0),
    ("The opposite of hot is", ["warm", "cold", "red", "a very long winter"], 1),
    ("A week has seven", ["months", "days", "years", "hours and minutes"], 1),
    ("The sun rises in the", ["west", "north", "east", "middle of the night"], 2),
    ("Two plus two equals", ["five", "three", "four", "twenty-two"], 2),
    ("Bees make", ["honey", "milk", "wool", "bread and butter"], 0),
    ("The largest planet is", ["Mars", "Venus", "Earth", "Jupiter"], 3),
    ("Émile said “déjà vu” in", ["French", "German", "Chinese 漢字", "🙂 emoji"], 0),
    ("A triangle has three", ["sides", "wheels", "wings", "legs and a tail"], 0),
]
TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen. " * 8,
    "def add(a, b):\n    return a + b\n",
    "Der Zug fährt um 7 Uhr. 今日は良い天気です。 🙂",
]
QUESTIONS = [
    ("Q: What is the capital of Italy?\nA:", "Rome"),
    ("Q: Name a primary colour.\nA:", "Red"),
    ("Count: one, two, three,", "four"),
    ("The first letter of the alphabet is", "A"),
]


def write_tasks(folder: Path) -> list[str]:
    """A task for each way in which lm-eval asks a model. Returns their names."""
    _write_lines(
        folder / "choices.jsonl",
        [{"query": q, "choices": c, "gold": gold} for q, c, gold in CHOICES],
    )
    _write_lines(folder / "texts.jsonl", [{"text": text} for text in TEXTS])
    _write_lines(folder / "questions.jsonl", [{"query": q, "answer": a} for q, a in QUESTIONS])
    tasks: dict[str, dict[str, Any]] = {
        "choices": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{query}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{gold}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "texts": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
        "questions": {
            "output_type": "generate_until",
            "doc_to_text": "{{query}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 24, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, task in tasks.items():
        data = {"dataset_path": "json", "dataset_kwargs": _data(folder / f"{name}.jsonl")}
        text = yaml.safe_dump({"task": f"served_{name}", **data, "test_split": "test", **task})
        (folder / f"{name}.yaml").write_text(text)
    return [f"served_{name}" for name in tasks]


def evaluate(folder: Path, tasks: Sequence[str], kind: str, **settings: Any) -> dict[str, Any]:
    results: dict[str, Any] = lm_eval.evaluator.simple_evaluate(
        model=kind,
        model_args=settings,
        tasks=list(tasks),
        task_manager=lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=1,
        bootstrap_iters=0,
        log_samples=True,
    )
    return results


def figures(results: Mapping[str, Any]) -> dict[str, float]:
    return {
        f"{task} {metric.removesuffix(',none')}": value
        for task, metrics in results["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, float) and "stderr" not in metric
    }


def responses(results: Mapping[str, Any], task: str) -> list[Any]:
    """What the model answered to each item."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"] for sample in samples]


def _numbers(value: Any) -> list[float]:
    if isinstance(value, list | tuple):
        return [number for each in value for number in _numbers(each)]
    return [float(value)] if isinstance(value, float) else []


def _data(path: Path) -> dict[str, Any]:
    return {"data_files": {"test": str(path)}}


def _write_lines(path: Path, items: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        deployment = Deployment(
            folder / "served", engine={"max_model_len": 2048, "kv_cache_tokens": 8192}
        )
        with running(deployment, "serve_agg"):
            results = deployment.directory / "results"
            [gguf] = (results / "models").rglob("*.gguf")
            [engine] = (results / "engines").glob("*/engine.json")
            (tasks_folder := folder / "tasks").mkdir()
            tasks = write_tasks(tasks_folder)
            served = evaluate(
                tasks_folder,
                tasks,
                "local-completions",
                model=DEFAULT_MODEL,
                base_url=f"{deployment.url}/v1/completions",
                tokenizer=str(engine.parent),
                max_length=2048,
                num_concurrent=1,
            )
            remote = evaluate(
                tasks_folder,
                tasks[:1],
                "local-completions",
                model=DEFAULT_MODEL,
                base_url=f"{deployment.url}/v1/completions",
                tokenizer_backend="remote",
                max_length=2048,
            )
            reference = evaluate(
                tasks_folder,
                tasks,
                "hf",
                pretrained=str(gguf.parent),
                gguf_file=gguf.name,
                tokenizer=str(engine.parent),
                dtype="float32",
                device="cpu",
                max_length=2048,
            )
    print(f"{'figure':40} {'hf':>12} {'served':>12}")
    wrong = []
    expected, found = figures(reference), figures(served)
    for name, value in expected.items():
        print(f"{name:40} {value:12.6f} {found[name]:12.6f}")
        if not math.isclose(value, found[name], rel_tol=1e-3):
            wrong.append(name)
    for task in tasks:
        ours, theirs = responses(served, task), responses(reference, task)
        numbers = list(zip(_numbers(ours), _numbers(theirs), strict=True))
        worst = max((abs(a - b) / max(1.0, abs(b) / 10) for a, b in numbers), default=0.0)
        is_same = worst < TOLERANCE if numbers else ours == theirs
        print(f"{task}: {len(ours)} items, largest difference {worst:.1e}, same: {is_same}")
        if not is_same:
            wrong.append(task)
    same = responses(remote, tasks[0]) == responses(served, tasks[0])
    print(f"{tasks[0]} with the service's tokenizer (`tokenizer_backend=remote`), same: {same}")
    if not same:
        wrong.append("remote tokenizer")
    if wrong:
        raise SystemExit(f"different: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
