"""What a tool grammar lets through is a valid call, whatever the model would like to write."""

import json
import random
from collections.abc import Callable

import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer
from serving.text.answer_parser import AnswerParser
from serving.text.parts import assemble
from serving.text.reasoning import BY_NAME as REASONING
from serving.text.tool_calls.base import Tool
from serving.text.tool_calls.guide import MAX_CALLS, required_calls, triggered_calls
from serving.text.tool_calls.select import BY_NAME
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

TOOLS = [
    Tool(
        "set_alarm",
        {
            "type": "object",
            "properties": {
                "label": {"type": "string", "maxLength": 8},
                "hour": {"type": "integer", "minimum": 0, "maximum": 23},
                "days": {"type": "array", "items": {"enum": ["mon", "tue"]}, "maxItems": 2},
                "loud": {"type": "boolean"},
            },
            "required": ["label", "hour"],
            "additionalProperties": False,
        },
    ),
    Tool("now", {"type": "object", "properties": {}, "additionalProperties": False}),
]
BY_TOOL = {tool.name: tool for tool in TOOLS}


def byte_tokenizer(special: tuple[str, ...]) -> Tokenizer:
    """One token a byte, and `special`."""
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    names = dict.fromkeys(["<eos>", *special])
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
    return tokenizer


class Guided:
    """A grammar over a byte tokenizer in which `special` are special tokens."""

    def __init__(self, special: tuple[str, ...], make: Callable[[dict[str, int]], str]) -> None:
        self.tokenizer = byte_tokenizer(special)
        ids = {name: self.tokenizer.token_to_id(name) for name in special}
        self.eos = self.tokenizer.token_to_id("<eos>")
        num_tokens = self.tokenizer.get_vocab_size()
        self.lark = make(ids)
        llt = LLTokenizer(self.tokenizer.to_str(), n_vocab=num_tokens, eos_token=self.eos)
        self.matcher = LLMatcher(llt, LLMatcher.grammar_from_lark(self.lark), log_level=0)
        assert not self.matcher.is_error(), f"{self.matcher.get_error()}\n{self.lark}"

    def sample(self, seed: int, closings: list[list[int]], max_tokens: int = 3000) -> str:
        """A random text of the grammar. Now and then it closes what is open, as a model does."""
        rng = random.Random(seed)
        matcher = self.matcher.deep_copy()
        ids: list[int] = []
        while not matcher.is_accepting() or (not matcher.is_stopped() and rng.random() < 0.2):
            closing = rng.choice(closings) if closings and rng.random() < 0.2 else []
            if closing and matcher.validate_tokens(closing) == len(closing):
                chosen = closing
            else:
                words = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint32)
                allowed = [t for t in range(256) if words[t // 32] >> np.uint32(t % 32) & 1]
                names = range(256, self.tokenizer.get_vocab_size())
                named = [t for t in names if words[t // 32] >> np.uint32(t % 32) & 1]
                named = [t for t in named if t != self.eos]
                printable = [t for t in allowed if t < 94]  # random bytes are rarely UTF-8
                options = named if named and rng.random() < 0.5 else printable or allowed or named
                if not options:
                    break
                chosen = [rng.choice(options)]
            assert matcher.consume_tokens(chosen)
            ids += chosen
            assert len(ids) < max_tokens, self.tokenizer.decode(ids, skip_special_tokens=False)
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)


CLOSINGS = [
    '"',
    "}",
    "</parameter>",
    "\n</parameter>\n",
    "</arg_value>\n",
    "</｜DSML｜parameter>\n",
]
CLOSINGS += ["</parameter>\n", '<|"|>', "<escape>"]


def check(arguments: str, tool: Tool) -> None:
    value = json.loads(arguments)
    if tool.name == "now":
        assert value == {}
        return
    assert set(value) <= {"label", "hour", "days", "loud"}
    assert isinstance(value["label"], str)
    assert isinstance(value["hour"], int)
    assert 0 <= value["hour"] <= 23
    assert set(value.get("days", [])) <= {"mon", "tue"}
    assert value.get("loud", True) in (True, False)


@pytest.mark.parametrize("specials", [True, False], ids=["special-tokens", "plain-text"])
@pytest.mark.parametrize("name", BY_NAME)
def test_required_call_is_always_valid(name: str, specials: bool) -> None:
    format = BY_NAME[name]
    special = format.special_tokens if specials else ()
    guided = Guided(special, lambda ids: required_calls(format, TOOLS, ids, parallel=True))
    for seed in range(12):
        text = guided.sample(seed, [guided.ids(each) for each in CLOSINGS])
        parser = AnswerParser(format, BY_TOOL)
        answer = assemble([*parser.feed(text), *parser.finish()])
        assert answer.tool_calls, text
        assert not answer.text.strip(), text
        for call in answer.tool_calls:
            check(call.arguments, BY_TOOL[call.name])


def test_number_of_calls_is_bounded() -> None:
    format = BY_NAME["json"]
    guided = Guided((), lambda ids: required_calls(format, TOOLS, ids, parallel=True))
    call = guided.sample(1, [guided.ids(each) for each in CLOSINGS]).splitlines()[0]
    more = guided.ids(format.separator + call)
    matcher = guided.matcher.deep_copy()
    assert matcher.consume_tokens(guided.ids(call))
    for _ in range(MAX_CALLS - 1):
        assert matcher.consume_tokens(more)
    assert matcher.is_accepting()
    assert matcher.validate_tokens(more) < len(more)


@pytest.mark.parametrize("name", [name for name, each in BY_NAME.items() if each.trigger])
def test_grammar_begins_where_the_model_opens_a_call(name: str) -> None:
    format = BY_NAME[name]
    guided = Guided(
        format.special_tokens, lambda ids: triggered_calls(format, TOOLS, ids, parallel=True)
    )
    matcher = guided.matcher.deep_copy()
    encode = guided.tokenizer.encode
    opening = f"Some <text> first. {format.trigger}"
    assert matcher.consume_tokens(encode(opening, add_special_tokens=False).ids)
    assert not matcher.is_accepting(), "a call that was opened must be completed"
    matcher = guided.matcher.deep_copy()
    assert matcher.consume_tokens(encode("No call at all.", add_special_tokens=False).ids)
    assert matcher.is_accepting()


@pytest.mark.parametrize("name", REASONING)
def test_model_may_think_before_a_required_call(name: str) -> None:
    reasoning = REASONING[name]
    for inside in (False, True):
        guided = Guided(
            (),
            lambda ids, inside=inside: required_calls(  # type: ignore[misc]
                BY_NAME["hermes"],
                TOOLS,
                ids,
                parallel=False,
                reasoning=reasoning,
                inside_reasoning=inside,
            ),
        )
        thoughts = f"What? {{}}{reasoning.end}\n\n"
        text = thoughts if inside else reasoning.begin + thoughts
        text += '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
        ids = guided.tokenizer.encode(text, add_special_tokens=False).ids
        assert guided.matcher.consume_tokens(ids), guided.matcher.get_error()
        assert guided.matcher.is_accepting()


@pytest.mark.parametrize("name", [name for name, each in BY_NAME.items() if not each.trigger])
def test_answer_is_calls_or_text_where_calls_have_no_opening(name: str) -> None:
    format = BY_NAME[name]
    guided = Guided(
        format.special_tokens, lambda ids: triggered_calls(format, TOOLS, ids, parallel=True)
    )
    text = "Hello {there}."
    if name == "harmony":
        text = f"<|channel|>final<|message|>{text}"
    matcher = guided.matcher.deep_copy()
    assert matcher.consume_tokens(guided.ids(text))
    assert matcher.is_accepting()
    for seed in range(5):
        sample = guided.sample(seed, [guided.ids(each) for each in CLOSINGS])
        parser = AnswerParser(format, BY_TOOL)
        for call in assemble([*parser.feed(sample), *parser.finish()]).tool_calls:
            check(call.arguments, BY_TOOL[call.name])
