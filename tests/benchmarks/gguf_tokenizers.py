"""Whether GGUF files give the ids of the tokenizer.json that they were made of.

    python tests/benchmarks/gguf_tokenizers.py llama-bpe=llama3/tokenizer.json gemma3=gemma/tokenizer.json

Each original is written as a GGUF vocabulary and read back as the product reads it. `gemma3`,
`llama` and `phi3` are SentencePiece tokenizers of these architectures; other names are words of
`tokenizer.ggml.pre`. Random texts join the hard ones. The script ends with status 1 on a difference.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

from serving.engine.torch.weights import gguf_tokenizer  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from unit.engine.gguf_vocabulary import write_vocabulary  # noqa: E402
from unit.engine.hard_texts import HARD_TEXTS  # noqa: E402

PIECES = ("llama", "gemma2", "gemma3", "phi3")
RANGES = (
    *((32, 127), (160, 592), (768, 880), (0x400, 0x460), (0x600, 0x660), (0x900, 0x970)),
    *((0xE00, 0xE5B), (0x3040, 0x3100), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0x1F300, 0x1F650)),
    *((0x2000, 0x2070), (0x2460, 0x2500), (0xFF00, 0xFF60), (9, 14)),
)
FILES = (*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "scripts").glob("*.py")))


def texts(added: list[str]) -> Iterator[str]:
    yield from HARD_TEXTS
    yield from (path.read_text("utf-8") for path in FILES)
    for token in added[:: max(len(added) // 60, 1)]:
        yield from (token, f"{token} hi\n", f"say {token}  x", f"{token}{token}ok")
    choice = random.Random(0)
    for _ in range(500):
        runs = [RANGES[0] if choice.random() < 0.4 else choice.choice(RANGES) for _ in range(8)]
        spaces = (" ", "", "\n", "\n\n", "\t", "'s", "'LL", "123", "00")
        yield "".join(
            "".join(chr(choice.randrange(*run)) for _ in range(choice.randint(1, 6)))
            + choice.choice(spaces)
            for run in runs[: choice.randint(1, 8)]
        )


def compare(name: str, path: Path) -> str:
    content = json.loads(path.read_text("utf-8"))
    original = Tokenizer.from_file(str(path))
    first = original.encode("x").ids[0]
    starts = original.id_to_token(first) in ("<s>", "<bos>", "<|begin_of_text|>")
    is_pieces = name in PIECES
    facts: dict[str, str | bool | int] = {"add_bos_token": starts}
    if starts:
        facts["bos_token_id"] = first
    if is_pieces:
        facts["unknown_token_id"] = original.token_to_id("<unk>") or 0
        facts["add_space_prefix"] = not name.startswith("gemma")
    else:
        facts["pre"] = name
    with tempfile.TemporaryDirectory() as folder:
        written = write_vocabulary(
            Path(folder) / "a.gguf",
            content,
            model="llama" if is_pieces else "gpt2",
            architecture=name if is_pieces else "llama",
            metadata=facts,
        )
        gguf_tokenizer.save(written, Path(folder), 4096)
        found = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    count = 0
    for text in texts([each["content"] for each in content["added_tokens"]]):
        for special in (True, False):
            expected = original.encode(text, add_special_tokens=special)
            if found.encode(text, add_special_tokens=special).ids != expected.ids:
                return f"differs on {text[:60]!r}"
            if found.decode(expected.ids, skip_special_tokens=False) != original.decode(
                expected.ids, skip_special_tokens=False
            ):
                return f"decodes {text[:60]!r} otherwise"
        count += 1
    return f"the same ids on {count} texts"


def main() -> int:
    verdicts = []
    for argument in sys.argv[1:]:
        name, _, path = argument.partition("=")
        verdicts.append(compare(name, Path(path)))
        print(f"{name:12} {verdicts[-1]}", flush=True)
    return 0 if verdicts and all("the same" in verdict for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
