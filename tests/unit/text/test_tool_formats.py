"""Every format's calls, in every cut of the text into deltas."""

import json
import random
from typing import get_args

import pytest
from serving.config.frontend import ReasoningParser, ToolParser
from serving.text.answer_parser import AnswerParser
from serving.text.parts import Answer, assemble
from serving.text.reasoning import BY_NAME as REASONING
from serving.text.tool_calls.base import Tool
from serving.text.tool_calls.select import BY_NAME

WEATHER = Tool(
    "get_weather",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "units": {"type": "object"},
        },
        "required": ["city"],
    },
)
TOOLS = {tool.name: tool for tool in (WEATHER, Tool("now", {"type": "object", "properties": {}}))}
OSLO = {"city": 'Oslo, "Øst"', "days": 3}

# format -> (text, text of the answer, [(name, arguments)])
SAMPLES: list[tuple[str, str, str, list[tuple[str, object]]]] = [
    (
        "hermes",
        'I look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo, \\"Øst\\"", "days": 3}}\n</tool_call>\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        "I look.",
        [("get_weather", OSLO), ("now", {})],
    ),
    (
        "hermes",
        '<tool_call>{"arguments": {"days": 3, "city": "a}b</tool"}, "name": "get_weather"}</tool_call> done',
        " done",
        [("get_weather", {"days": 3, "city": "a}b</tool"})],
    ),
    ("hermes", "a < b and <tool> but no <tool_call", "a < b and <tool> but no <tool_call", []),
    ("hermes", '<tool_call>\n{"title": "x"}\n</tool_call>', None, []),  # type: ignore[list-item]
    (
        "granite",
        '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Rome"}}, {"name": "now", "arguments": {}}]',
        "",
        [("get_weather", {"city": "Rome"}), ("now", {})],
    ),
    (
        "phi4_mini",
        'ok <|tool_call|>[{"name": "now", "arguments": {}}]<|/tool_call|>',
        "ok",
        [("now", {})],
    ),
    (
        "nemotron",
        '<TOOLCALL>[{"name": "get_weather", "arguments": {"city": "Rome"}}]</TOOLCALL>',
        "",
        [("get_weather", {"city": "Rome"})],
    ),
    (
        "minimax_m1",
        '<tool_calls>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n{"name": "now", "arguments": {}}\n</tool_calls>',
        "",
        [("get_weather", {"city": "Rome"}), ("now", {})],
    ),
    (
        "cohere",
        '<|START_ACTION|>[\n {"tool_call_id": "0", "tool_name": "get_weather", "parameters": {"city": "Rome"}}\n]<|END_ACTION|>',
        "",
        [("get_weather", {"city": "Rome"})],
    ),
    (
        "llama3_json",
        '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Rome"}}; {"name": "now", "parameters": {}}',
        "",
        [("get_weather", {"city": "Rome"}), ("now", {})],
    ),
    (
        "llama3_json",
        '{"type": "function", "name": "now", "parameters": {}}',
        "",
        [("now", {})],
    ),
    ("llama3_json", '{"name": "Ada", "age": 36}', '{"name": "Ada", "age": 36}', []),
    (
        "json",
        ' {"answer": [1, 2, {"name": "now"}]} end',
        ' {"answer": [1, 2, {"name": "now"}]} end',
        [],
    ),
    (
        "json",
        '```json\n[{"name": "now"}, {"name": "get_weather", "arguments": "{\\"city\\": \\"Rome\\"}"}]\n```',
        None,  # type: ignore[list-item]
        [("now", {}), ("get_weather", {"city": "Rome"})],
    ),
    (
        "mistral",
        '[TOOL_CALLS]get_weather[ARGS]{"city": "Rome"}[TOOL_CALLS]now[CALL_ID]abc123def[ARGS]{}',
        "",
        [("get_weather", {"city": "Rome"}), ("now", {})],
    ),
    (
        "mistral_v3",
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Rome"}}, {"name": "now", "arguments": {}}]',
        "",
        [("get_weather", {"city": "Rome"}), ("now", {})],
    ),
    (
        "deepseek_v3",
        'Sure.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{"city": "Rome"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        "Sure.",
        [("get_weather", {"city": "Rome"}), ("now", {})],
    ),
    (
        "deepseek_v31",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Rome"}<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        "",
        [("get_weather", {"city": "Rome"}), ("now", {})],
    ),
    (
        "kimi_k2",
        '<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{"city": "Rome"}<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>',
        "",
        [("get_weather", {"city": "Rome"}), ("now", {})],
    ),
    (
        "llama_function_tag",
        '<function=get_weather>{"city": "Rome"}</function>',
        "",
        [("get_weather", {"city": "Rome"})],
    ),
    (
        "qwen3_coder",
        'Let me see.\n\n<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo,\n\n"Øst" <b>\n</parameter>\n<parameter=days>\n3\n</parameter>\n<parameter=units>\n{"t": "C"}\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>',
        "Let me see.",
        [
            ("get_weather", {"city": 'Oslo,\n\n"Øst" <b>', "days": 3, "units": {"t": "C"}}),
            ("now", {}),
        ],
    ),
    (
        "seed_oss",
        "<seed:tool_call>\n<function=get_weather>\n<parameter=city>Rome</parameter>\n</function>\n</seed:tool_call>",
        "",
        [("get_weather", {"city": "Rome"})],
    ),
    (
        "glm",
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Rome\n</arg_value>\n<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n<tool_call>now</tool_call>",
        "",
        [("get_weather", {"city": "Rome\n", "days": 3}), ("now", {})],
    ),
    (
        "glm",
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Rome</arg_value></tool_call>",
        "",
        [("get_weather", {"city": "Rome"})],
    ),
    (
        "minimax_m2",
        '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Rome</parameter>\n<parameter name="days">2</parameter>\n</invoke>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>',
        "",
        [("get_weather", {"city": "Rome", "days": 2}), ("now", {})],
    ),
    (
        "deepseek_v32",
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n<｜DSML｜parameter name="city" string="true">Rome</｜DSML｜parameter>\n<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜function_calls>',
        "",
        [("get_weather", {"city": "Rome", "days": 2})],
    ),
    (
        "lfm2",
        'Yes.<|tool_call_start|>[get_weather(city="Oslo, \\"Øst\\"", days=3), now()]<|tool_call_end|>',
        "Yes.",
        [("get_weather", OSLO), ("now", {})],
    ),
    (
        "pythonic",
        "[get_weather(city='it\\'s\\n\\u00d8', days=3, units={'a': [1, True, None]}), now()]",
        "",
        [
            ("get_weather", {"city": "it's\nØ", "days": 3, "units": {"a": [1, True, None]}}),
            ("now", {}),
        ],
    ),
    ("pythonic", "[1, 2] is a list", "[1, 2] is a list", []),
    (
        "olmo3",
        '<function_calls>\nget_weather(city="Rome")\nnow()\n</function_calls>',
        "",
        [("get_weather", {"city": "Rome"}), ("now", {})],
    ),
    (
        "gemma4",
        'ok<|tool_call>call:get_weather{city:<|"|>Oslo, "Øst"<|"|>,days:3,units:{t:<|"|>C<|"|>,l:[1,<|"|>x<|"|>]}}<tool_call|><|tool_call>call:now{}<tool_call|>',
        "ok",
        [("get_weather", {**OSLO, "units": {"t": "C", "l": [1, "x"]}}), ("now", {})],
    ),
    (
        "function_gemma",
        "<start_function_call>call:get_weather{city:<escape>Rome<escape>}<end_function_call>",
        "",
        [("get_weather", {"city": "Rome"})],
    ),
    (
        "harmony",
        '<|channel|>analysis<|message|>Think.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Rome"}<|call|>',
        "",
        [("get_weather", {"city": "Rome"})],
    ),
    (
        "harmony",
        "<|channel|>analysis<|message|>Think.<|end|><|start|>assistant<|channel|>final<|message|>Hello <b>.<|return|>",
        "Hello <b>.",
        [],
    ),
]


def parse(name: str, pieces: list[str]) -> Answer:
    parser = AnswerParser(BY_NAME[name], TOOLS)
    parts = [part for piece in pieces for part in parser.feed(piece)]
    return assemble([*parts, *parser.finish()])


def content(answer: Answer) -> object:
    return answer.text, answer.reasoning, [(c.name, c.arguments) for c in answer.tool_calls]


@pytest.mark.parametrize(("name", "text", "expected", "calls"), SAMPLES)
def test_whole_text_gives_the_calls(
    name: str, text: str, expected: str | None, calls: list[tuple[str, object]]
) -> None:
    answer = parse(name, [text])
    assert [(c.name, json.loads(c.arguments)) for c in answer.tool_calls] == calls
    if expected is not None:
        assert answer.text == expected
    assert len({c.id for c in answer.tool_calls}) == len(answer.tool_calls)


@pytest.mark.parametrize(("name", "text", "expected", "calls"), SAMPLES)
def test_every_cut_gives_what_the_whole_gives(
    name: str, text: str, expected: str | None, calls: object
) -> None:
    whole = content(parse(name, [text]))
    assert content(parse(name, list(text))) == whole
    for cut in range(1, len(text)):
        assert content(parse(name, [text[:cut], text[cut:]])) == whole, cut
    random.seed(1)
    for _ in range(50):
        cuts = sorted(random.sample(range(len(text)), min(7, len(text))))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert content(parse(name, pieces)) == whole, cuts


@pytest.mark.parametrize(("name", "text", "expected", "calls"), SAMPLES)
def test_an_answer_that_ends_early_never_raises(
    name: str, text: str, expected: str | None, calls: object
) -> None:
    for end in range(len(text)):
        whole = content(parse(name, [text[:end]]))
        assert content(parse(name, list(text[:end]))) == whole


@pytest.mark.parametrize("name", BY_NAME)
def test_garbage_is_content_and_never_an_error(name: str) -> None:
    alphabet = [*BY_NAME[name].special_tokens, BY_NAME[name].trigger, *"{}[]()\",:=\\\n' ab1"]
    alphabet += [
        '{"name": "now"',
        '"arguments": ',
        "<function=now>",
        "<parameter=a>",
        "call:now{",
        "now(",
    ]
    random.seed(name)
    for _ in range(400):
        text = "".join(random.choices([each for each in alphabet if each], k=random.randint(1, 14)))
        whole = content(parse(name, [text]))
        assert content(parse(name, list(text))) == whole, text


def test_arguments_stream_while_they_are_generated() -> None:
    for name, text, _, calls in SAMPLES:
        name_comes_late = 0 < text.find('"arguments"') < text.find('"name"')
        if not calls or not calls[0][1] or name_comes_late:
            continue
        parser = AnswerParser(BY_NAME[name], TOOLS)
        begun = next(i for i in range(len(text)) if parser.feed(text[i]) and parser.num_calls)
        assert begun < text.rindex("Rome" if "Rome" in text else "3"), name


@pytest.mark.parametrize("name", REASONING)
def test_reasoning_comes_apart_from_the_answer(name: str) -> None:
    reasoning = REASONING[name]
    text = f"{reasoning.begin}{reasoning.header}\nHm, {reasoning.begin[:2]} x\n\ny.\n{reasoning.end}\n\nYes.\n"
    for opened in (False, True):
        given = text.removeprefix(reasoning.begin + reasoning.header) if opened else text
        for pieces in ([given], list(given)):
            parser = AnswerParser(None, {}, reasoning, starts_inside_reasoning=opened)
            parts = [part for piece in pieces for part in parser.feed(piece)]
            answer = assemble([*parts, *parser.finish()])
            assert answer.reasoning == f"Hm, {reasoning.begin[:2]} x\n\ny."
            assert answer.text == "Yes.\n"
    assert reasoning.is_open(f"user: hi{reasoning.begin}\n")
    assert not reasoning.is_open(f"{reasoning.begin}\n\n{reasoning.end}\n\n")


def test_text_without_reasoning_stays_as_it_is() -> None:
    parser = AnswerParser(None, {}, REASONING["think"])
    parts = [part for char in " \n2 < 3 <think> " for part in parser.feed(char)]
    assert assemble([*parts, *parser.finish()]).text == " \n2 < 3 <think> "


def test_configuration_names_every_format() -> None:
    assert get_args(ToolParser) == ("auto", *BY_NAME)
    assert get_args(ReasoningParser) == ("auto", "none", *REASONING)
