"""Token ids to text, as they arrive."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from serving.protocol import EngineOutput, FinishReason, SamplingParams, TokenLogprob
from serving.text.detokenize import Delta, Detokenizer
from serving.text.preprocess import PreparedRequest
from serving.text.token_text import TokenText
from tokenizers import Tokenizer, decoders, models
from unit.frontend.fakes import write_tokenizer

TEXTS = [
    "hello world",
    "naïve café",
    "日本語のテキスト",
    "👩‍👩‍👧 family 😀!",
    "mixed é日😀x\n\ttabs",
    " leading and trailing ",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Metaspace with byte fallback, whose decoder strips the first space."""
    vocab = {"<unk>": 0, "▁": 1, "▁hello": 2, "▁world": 3, "lo": 4}
    vocab |= {f"<0x{byte:02X}>": 5 + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def prepare(
    prompt: Sequence[int] = (), stop: Sequence[str] = (), min_tokens: int = 0
) -> PreparedRequest:
    sampling = SamplingParams(max_tokens=1000, min_tokens=min_tokens)
    return PreparedRequest("r", list(prompt), sampling, stop=tuple(stop))


def output(
    ids: Sequence[int], finish_reason: FinishReason | None = None, logprobs: bool = False
) -> EngineOutput:
    entries = [TokenLogprob(i, -1.0, []) for i in ids] if logprobs else None
    return EngineOutput("r", list(ids), finish_reason, logprobs=entries)


def feed_one_by_one(
    detokenizer: Detokenizer, ids: Sequence[int], finish_reason: FinishReason = "length"
) -> list[Delta]:
    deltas = []
    for position, token_id in enumerate(ids):
        last = position == len(ids) - 1
        deltas.append(detokenizer.feed(output([token_id], finish_reason if last else None)))
        if detokenizer.finish_reason is not None:
            break
    return deltas


def text_of(deltas: Sequence[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("per_step", [1, 2, 5, 1000])
def test_deltas_add_up_to_the_text_and_never_split_a_character(
    tokenizer: Tokenizer, text: str, per_step: int
) -> None:
    ids = tokenizer.encode(text).ids
    detokenizer = Detokenizer(TokenText(tokenizer), prepare(tokenizer.encode("prompt: ").ids))
    deltas = []
    for start in range(0, len(ids), per_step):
        last = start + per_step >= len(ids)
        deltas.append(
            detokenizer.feed(output(ids[start : start + per_step], "length" if last else None))
        )
    assert text_of(deltas) == text
    assert all("\ufffd" not in delta.text for delta in deltas)
    assert detokenizer.num_tokens == len(ids)
    assert deltas[-1].finish_reason == "length"


def test_incomplete_last_character_is_dropped_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ok 😀").ids
    for cut in (1, 2, 3):
        deltas = feed_one_by_one(Detokenizer(TokenText(tokenizer), prepare()), ids[:-cut])
        assert text_of(deltas) == "ok "


def test_character_begun_by_the_prompt_is_finished_by_the_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a😀b").ids
    for cut in range(2, len(ids) - 1):
        deltas = feed_one_by_one(Detokenizer(TokenText(tokenizer), prepare(ids[:cut])), ids[cut:])
        assert text_of(deltas) == "😀b"


def test_leading_space_is_kept_after_a_prompt(sentencepiece: Tokenizer) -> None:
    assert text_of(
        feed_one_by_one(Detokenizer(TokenText(sentencepiece), prepare([2])), [3, 3])
    ) == (" world world")
    assert (
        text_of(feed_one_by_one(Detokenizer(TokenText(sentencepiece), prepare()), [3, 3]))
        == "world world"
    )


def test_byte_fallback_tokens_make_whole_characters(sentencepiece: Tokenizer) -> None:
    ids = [2, *(5 + byte for byte in "é日".encode()), 4]
    deltas = feed_one_by_one(Detokenizer(TokenText(sentencepiece), prepare([2])), ids)
    assert text_of(deltas) == " helloé日lo"
    assert all("\ufffd" not in delta.text for delta in deltas)


@pytest.mark.parametrize("which", ["tokenizer", "sentencepiece"])
def test_random_bytes_never_raise_and_never_stall(
    which: str, request: pytest.FixtureRequest
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(which)
    random_ids = random.Random(1)
    for _ in range(50):
        ids = [random_ids.randrange(tokenizer.get_vocab_size()) for _ in range(100)]
        deltas = feed_one_by_one(Detokenizer(TokenText(tokenizer), prepare(ids[:20])), ids)
        assert len(deltas) == 100
    continuation = [tokenizer.get_vocab()["<0x80>" if which == "sentencepiece" else "Ģ"]] * 60
    deltas = feed_one_by_one(Detokenizer(TokenText(tokenizer), prepare()), continuation)
    assert text_of(deltas[:50])  # shown as replacement characters while it goes on


def test_special_tokens_have_no_text_unless_requested(tokenizer: Tokenizer) -> None:
    ids = [0, *tokenizer.encode("hi").ids, *[1] * 40, *tokenizer.encode(" you").ids]
    assert text_of(feed_one_by_one(Detokenizer(TokenText(tokenizer), prepare()), ids)) == "hi you"
    shown = PreparedRequest("r", [], SamplingParams(max_tokens=9), skip_special_tokens=False)
    text = text_of(feed_one_by_one(Detokenizer(TokenText(tokenizer), shown), ids[:3]))
    assert text.startswith("<|im_start|>")


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("hello world", ["wor"], "hello "),
        ("hello world", ["hello"], ""),
        ("hello world", ["d"], "hello worl"),
        ("aaab", ["aab"], "a"),
        ("abcd", ["abcd", "bc"], "a"),  # complete first
        ("日本語です", ["語で"], "日本"),
        ("x😀y", ["😀"], "x"),
        ("the end", ["never"], "the end"),
        ("almost sto", ["stop"], "almost sto"),  # held back, then released at the end
        ("a\n\nb", ["\n\n"], "a"),
    ],
)
@pytest.mark.parametrize("at_once", [False, True])
def test_text_ends_before_the_stop_string(
    tokenizer: Tokenizer, text: str, stop: list[str], expected: str, at_once: bool
) -> None:
    ids = tokenizer.encode(text).ids
    detokenizer = Detokenizer(TokenText(tokenizer), prepare(stop=stop))
    deltas = (
        [detokenizer.feed(output(ids, "length"))] if at_once else feed_one_by_one(detokenizer, ids)
    )
    assert text_of(deltas) == expected
    assert detokenizer.finish_reason == ("length" if expected == text else "stop")
    assert deltas[-1].finish_reason == detokenizer.finish_reason


def test_no_delta_shows_the_beginning_of_a_possible_stop_string(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.encode(char).ids[0] for char in "say stop!"]
    detokenizer = Detokenizer(TokenText(tokenizer), prepare(stop=["stop now"]))
    texts = [delta.text for delta in feed_one_by_one(detokenizer, ids)]
    assert texts[:8] == ["", "sa", "y", " ", "", "", "", ""]  # each "s" waits for what follows
    assert texts[8] == "stop!"


def test_tokens_after_a_stop_string_do_not_count(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.encode(char).ids[0] for char in "abcdef"]
    detokenizer = Detokenizer(TokenText(tokenizer), prepare(stop=["c"]))
    assert detokenizer.feed(output(ids)).text == "ab"
    assert detokenizer.num_tokens == 3


def test_stop_strings_wait_for_min_tokens(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.encode(char).ids[0] for char in "xaxaxa"]
    detokenizer = Detokenizer(TokenText(tokenizer), prepare(stop=["a"], min_tokens=3))
    assert text_of(feed_one_by_one(detokenizer, ids)) == "xax"


def test_logprobs_come_with_the_text_of_their_tokens(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.encode(char).ids[0] for char in "abcdef"]
    detokenizer = Detokenizer(TokenText(tokenizer), prepare(stop=["cdx", "ef"]))
    seen = []
    for token_id in ids:
        delta = detokenizer.feed(output([token_id], logprobs=True))
        seen.append((delta.text, [entry.token_id for entry in delta.logprobs or ()]))
        if detokenizer.finish_reason:
            break
    a, b, c, d, *_ = ids
    assert seen == [("a", [a]), ("b", [b]), ("", []), ("", []), ("cd", [c, d]), ("", [])]


def test_logprobs_of_incomplete_characters_all_come_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("é").ids[:1]
    delta = Detokenizer(TokenText(tokenizer), prepare()).feed(output(ids, "length", logprobs=True))
    assert delta.text == ""
    assert delta.logprobs is not None
    assert len(delta.logprobs) == 1


def test_token_inside_a_character_has_its_true_bytes(
    tokenizer: Tokenizer, sentencepiece: Tokenizer
) -> None:
    text = TokenText(tokenizer)
    assert b"".join(text(i)[1] for i in tokenizer.encode("é 日本").ids) == "é 日本".encode()
    assert text(0) == ("<|im_start|>", b"<|im_start|>")
    assert text(10**6) == ("", b"")
    text = TokenText(sentencepiece)
    assert text(2) == (" hello", b" hello")
    assert text(5 + 0xE9) == ("\ufffd", b"\xe9")


@pytest.mark.parametrize(("stop", "logprobs"), [((), False), (("fox",), False), ((), True)])
def test_each_token_of_an_output_has_its_own_delta(
    tokenizer: Tokenizer, stop: tuple[str, ...], logprobs: bool
) -> None:
    ids = tokenizer.encode("hello wörld, the fox jumps 日本", add_special_tokens=False).ids
    whole = Detokenizer(TokenText(tokenizer), prepare(stop=stop))
    alone = Detokenizer(TokenText(tokenizer), prepare(stop=stop))
    each = whole.feed_each(output(ids[:5], None, logprobs))
    if whole.finish_reason is None:
        each += whole.feed_each(output(ids[5:], "length", logprobs))
    single = [delta for delta in feed_one_by_one(alone, ids) if delta.text]
    assert "".join(delta.text for delta in each) == "".join(delta.text for delta in single)
    assert len([delta for delta in each if delta.text]) == len(single)
    assert (each[-1].finish_reason, whole.num_tokens) == (alone.finish_reason, alone.num_tokens)
    if logprobs:
        token_ids = [entry.token_id for delta in each for entry in delta.logprobs or ()]
        assert token_ids == ids
