"""Whether a row of the model matrix is served exactly by a real disaggregated deployment.

    python tests/benchmarks/model_served.py [--row "Qwen3"] [--form "FP8 in blocks"] [--transport ucx]

Makes a tiny random model of the row's config, as a checkpoint of that form. Runs `serve_disagg` on
CPU, and compares the token ids of greedy completions with `generate`: a short prompt, two that are
computed in chunks and whose KV travels, and one that begins as another did. Ends with status 1
where one differs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

import torch  # noqa: E402
from benchmarks.models.all_rows import ROWS  # noqa: E402
from benchmarks.models.checkpoint import Checkpoint  # noqa: E402
from benchmarks.models.forms import FORMS  # noqa: E402
from benchmarks.models.run_row import save_tokenizer  # noqa: E402
from integration.deployment import Deployment, running  # noqa: E402
from serving.engine.torch.build_check.engine_answers import Case  # noqa: E402
from serving.engine.torch.build_check.serving_check import reference  # noqa: E402
from serving.engine.torch.build_check.shrink import VOCAB_SIZE, small_model_of  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

NUM_TOKENS = 24
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "


def cases() -> list[Case]:
    generator = torch.Generator().manual_seed(7)
    drawn = [
        torch.randint(1, VOCAB_SIZE, (count,), generator=generator).tolist()
        for count in (13, 250, 150, 9)
    ]
    short, long, longer, end = drawn
    named = {
        "short": short,
        "in chunks": long,
        "in chunks again": longer,
        "a prefix hit": [*long, *end],
    }
    return [Case(name, prompt, NUM_TOKENS) for name, prompt in named.items()]


def served(deployment: Deployment, case: Case) -> dict[str, Any]:
    """The choice of a greedy completion, and its usage."""
    body = {
        "model": "tiny",
        "prompt": case.prompt,
        "max_tokens": case.num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    response = httpx.post(f"{deployment.url}/v1/completions", json=body, timeout=120)
    response.raise_for_status()
    answer = response.json()
    return {**answer["choices"][0], "usage": answer["usage"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--row", default="DeepSeek V3", help="name of a row in the matrix")
    parser.add_argument("--form", default="safetensors", help="of the checkpoint")
    parser.add_argument("--transport", default="ucx")
    options = parser.parse_args()
    row = next(row for row in ROWS if (row.name, row.form) == (options.row, options.form))
    num_wrong = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small_model_of(row.config, folder / "model", seed=3)
        save_tokenizer(folder / "model")
        (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
        source = folder / "model"
        checkpoint = FORMS[row.form](source) or Checkpoint(source, source)
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint.reference, dtype=torch.float32, attn_implementation="eager"
        )
        deployment = Deployment(
            folder / "deployment",
            str(checkpoint.path),
            engine={"max_num_batched_tokens": 64},
            kv_transfer={"transport": options.transport},
        )
        with running(deployment, "serve_disagg"):
            for case in cases():
                found = served(deployment, case)
                is_equal = found["token_ids"] == reference(model, case).tokens
                num_wrong += not is_equal
                cached = found["usage"]["prompt_tokens_details"]["cached_tokens"]
                print(
                    f"{case.name}: {len(case.prompt)} tokens, {cached} of them cached; "
                    f"{'equal to generate' if is_equal else 'DIFFERS from generate'}"
                )
            print(deployment.snakemake("smoke_test").stdout.split("smoke test of", 1)[-1])
    return 1 if num_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
