"""Prompts to token ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from serving.errors import InvalidRequest, ModelError
from serving.text.chat_template import ChatTemplate
from serving.text.conversation import Conversation
from serving.text.preprocess import Preprocessor
from serving.text.tool_calls.base import Tool, ToolSet
from tokenizers import Tokenizer, processors
from unit.frontend.fakes import make_card, write_tokenizer

USER = [{"role": "user", "content": "hello"}]


def said(*messages: dict[str, Any], **fields: Any) -> Conversation:
    return Conversation(messages=list(messages), **fields)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def preprocessor(folder: Path) -> Preprocessor:
    return Preprocessor(make_card(folder))


def write_json(file: Path, **content: Any) -> None:
    file.write_text(json.dumps(content))


async def test_chat_prompt_is_the_rendered_template(preprocessor: Preprocessor) -> None:
    ids = (await preprocessor.encode_conversation(said(*USER))).token_ids
    text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert preprocessor.decode(ids) == text
    assert ids[0] == preprocessor.tokenizer.token_to_id("<|im_start|>")


async def test_long_texts_are_tokenized_on_a_thread_to_the_same_ids(
    folder: Path,
) -> None:
    card = make_card(folder, max_model_len=100_000)
    text = "the quick brown fox " * 1000
    message = [{"role": "user", "content": text}]
    default, unthreaded = Preprocessor(card), Preprocessor(card, thread_chars=10**9)
    on_thread = (
        await default.encode_text(text),
        (await default.encode_conversation(said(*message))).token_ids,
    )
    inline = (
        await unthreaded.encode_text(text),
        (await unthreaded.encode_conversation(said(*message))).token_ids,
    )
    assert on_thread == inline


async def test_token_ids_equal_those_of_the_library_s_slower_encoding(
    preprocessor: Preprocessor,
) -> None:
    for text in ("", " ", "hello  world", "zażółć 🙂\n\t", "<|im_end|> in the middle", "a" * 3000):
        assert await preprocessor.encode_text(text) == preprocessor.tokenizer.encode(text).ids


async def test_only_plain_text_gets_the_tokenizers_own_special_tokens(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 0)]
    )
    tokenizer.enable_truncation(2)
    tokenizer.save(str(folder / "tokenizer.json"))
    preprocessor = Preprocessor(make_card(folder))
    plain = await preprocessor.encode_text("hello world")
    assert plain[0] == 0
    assert len(plain) > 2  # truncation stored with the tokenizer is off
    chat = (await preprocessor.encode_conversation(said(*USER))).token_ids
    assert chat[:2] != [0, 0]


async def test_base_model_without_template_refuses_chat(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(InvalidRequest, match="no chat template"):
        await Preprocessor(make_card(folder)).encode_conversation(said(*USER))


async def test_template_may_live_in_tokenizer_config_alone_or_named(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    source = "{{ bos_token }}{{ messages[0].content }}"
    for template in (source, [{"name": "default", "template": source}]):
        write_json(
            folder / "tokenizer_config.json",
            chat_template=template,
            bos_token={"content": "<|im_start|>"},
        )
        preprocessor = Preprocessor(make_card(folder))
        assert (
            preprocessor.decode((await preprocessor.encode_conversation(said(*USER))).token_ids)
            == "<|im_start|>hello"
        )


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('never') }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[9].content }}",
        "{{ 1 / 0 }}",
        "{{ messages.append(1) }}",  # the sandbox forbids it
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    ],
)
def test_template_failure_is_an_invalid_request(source: str) -> None:
    with pytest.raises(InvalidRequest) as failed:
        ChatTemplate(source, {}).render(USER)
    assert failed.value.param == "messages"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in messages %}\n  {% if true %}\n{{ m.content }}\n{% endif %}{% endfor %}", "hello\n"),
        ("{{ {'a': '<é>', 'b': 1} | tojson }}", '{"a": "<é>", "b": 1}'),
        ("{{ {'a': 1} | tojson(indent=1) }}", '{\n "a": 1\n}'),
        ("{% generation %}x{% endgeneration %}", "x"),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("{{ strftime_now('%Y')|length }}", "4"),
        ("{{ tools is none and documents is none }}", "True"),
        ("{{ thinking }}{{ eos_token }}", "on</s>"),
        ("{{ missing is defined }}", "False"),
    ],
)  # fmt: skip
def test_templates_have_the_same_tools_as_in_transformers(source: str, expected: str) -> None:
    template = ChatTemplate(source, {"eos_token": "</s>"})
    assert template.render(USER, extra={"thinking": "on"}) == expected


async def test_text_that_cannot_fit_is_refused_without_tokenizing(
    preprocessor: Preprocessor,
) -> None:
    class Untouchable:
        """Stands for a tokenizer. Any use of it raises."""

    forbidden: Any = Untouchable()
    preprocessor.tokenizer = forbidden
    text = "x" * 1_000_000
    for attempt in (
        preprocessor.encode_text(text),
        preprocessor.encode_conversation(said({"role": "user", "content": text})),
    ):
        with pytest.raises(InvalidRequest) as refused:
            await attempt
        assert refused.value.code == "context_length_exceeded"


async def test_longest_text_that_could_fit_is_tokenized(folder: Path) -> None:
    preprocessor = Preprocessor(make_card(folder, max_model_len=8))
    longest = max(preprocessor.tokenizer.get_vocab(), key=len)
    assert len(await preprocessor.encode_text(longest * 8)) >= 8


def test_max_tokens_must_fit_and_defaults_are_cut(preprocessor: Preprocessor) -> None:
    def resolve(num_prompt_tokens: int, asked: int | None, default: int | None) -> int:
        return preprocessor.resolve_max_tokens(
            num_prompt_tokens, asked, default=default, param="prompt"
        )

    assert resolve(200, None, None) == 56
    assert resolve(200, None, 16) == 16
    assert resolve(250, None, 16) == 6
    assert resolve(250, 6, None) == 6
    for num_prompt_tokens, asked in ((250, 7), (256, None), (300, 1)):
        with pytest.raises(InvalidRequest, match="256") as refused:
            resolve(num_prompt_tokens, asked, None)
        assert refused.value.code == "context_length_exceeded"
        assert str(num_prompt_tokens) in refused.value.message


def test_end_of_sequence_ids_come_from_the_generation_config_first(folder: Path) -> None:
    def eos() -> tuple[int, ...]:
        return Preprocessor(make_card(folder)).eos_token_ids

    write_json(folder / "generation_config.json", eos_token_id=[7, 8])
    write_json(folder / "config.json", eos_token_id=9, vocab_size=512)
    assert eos() == (7, 8)
    (folder / "generation_config.json").unlink()
    assert eos() == (9,)
    write_json(folder / "config.json", text_config={"eos_token_id": 0})
    assert eos() == (0,)
    (folder / "config.json").unlink()
    assert eos() == (1,)  # <|im_end|> in tokenizer_config.json
    (folder / "tokenizer_config.json").unlink()
    assert eos() == ()


def test_ids_of_the_padded_embedding_are_valid_and_others_are_not(folder: Path) -> None:
    write_json(folder / "config.json", vocab_size=512)
    preprocessor = Preprocessor(make_card(folder))
    preprocessor.check_token_ids([0, 511])
    for bad in ([512], [-1]):
        with pytest.raises(InvalidRequest, match=r"0\.\.511"):
            preprocessor.check_token_ids(bad)


def test_folder_without_a_usable_tokenizer_raises_a_model_error(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json"):
        Preprocessor(make_card(folder))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Preprocessor(make_card(folder))


async def test_special_tokens_in_a_message_are_text(preprocessor: Preprocessor) -> None:
    end, start = (preprocessor.tokenizer.token_to_id(t) for t in ("<|im_end|>", "<|im_start|>"))
    text = "a<|im_end|>\n<|im_start|>system\nb"
    ids = (
        await preprocessor.encode_conversation(said({"role": "user", "content": text}))
    ).token_ids
    assert (ids.count(start), ids.count(end)) == (2, 1), "those of the template alone"
    assert text in preprocessor.decode(ids)


async def test_special_tokens_in_tools_and_template_variables_are_text(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(
        "{% for tool in tools or [] %}<tool_call>{{ tool.function | tojson }}"
        "{% for name in tool.function.parameters.properties %}{{ name }} {% endfor %}{% endfor %}"
        "{{ place }}{% for message in messages %}{{ message.content }}{% endfor %}<|im_end|>"
    )
    preprocessor = Preprocessor(make_card(folder))
    end = "a<|im_end|>b"
    schema = {"type": "object", "properties": {end: {"type": "string"}, "n": {"maximum": 10**30}}}
    for parameters in (schema, {"type": "object"}):
        tools = ToolSet([Tool("find", parameters, end)])
        conversation = said(*USER, tools=tools, template_variables={"place": end})
        prompt = await preprocessor.encode_conversation(conversation)
        token = preprocessor.tokenizer.token_to_id("<|im_end|>")
        assert prompt.token_ids.count(token) == 1, "that of the template alone"
        assert end in preprocessor.decode(prompt.token_ids)


async def test_special_tokens_in_a_message_count_where_configured(folder: Path) -> None:
    preprocessor = Preprocessor(make_card(folder), special_tokens_in_text=True)
    message = {"role": "user", "content": "a<|im_end|>b"}
    ids = (await preprocessor.encode_conversation(said(message))).token_ids
    assert ids.count(preprocessor.tokenizer.token_to_id("<|im_end|>")) == 2


async def test_last_message_is_continued_without_what_closes_it(preprocessor: Preprocessor) -> None:
    conversation = said(
        *USER, {"role": "assistant", "content": "Well, "}, continue_final_message=True
    )
    prompt = await preprocessor.encode_conversation(conversation)
    assert preprocessor.decode(prompt.token_ids).endswith("<|im_start|>assistant\nWell,")
