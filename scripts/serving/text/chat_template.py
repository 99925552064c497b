"""A model's chat template: messages to prompt text, as `transformers` renders it.

Templates come with the model and run in Jinja's sandbox. They have the tools of
`transformers.utils.chat_template_utils`: `raise_exception`, `strftime_now`, `tojson` without HTML
escapes, loop controls, and the `{% generation %}` marker, which only training uses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from serving.errors import InvalidRequest, ModelError
from serving.text.json_text import json_text

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")

# All that a template can raise for messages that it does not support.
_TEMPLATE_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


# A conversation in which each role speaks, and a text that no template has.
_PROBES = {
    "user": ("user",),
    "system": ("system", "user"),
    "assistant": ("user", "assistant", "user"),
}
_MARK = "the-probed-text"


class ChatTemplate:
    """One compiled template, and the variant for conversations with tools if the model has one."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], tool_source: str | None = None
    ) -> None:
        """`tool_source` replaces `source` where there are tools."""
        self.source = source if tool_source is None else tool_source
        self._special_tokens = dict(special_tokens)
        self._template = _compiled(source)
        self._tool_template = self._template if tool_source is None else _compiled(tool_source)
        self._roles_in_parts = frozenset(role for role in _PROBES if self._wants_parts(role))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text. `extra` are further template variables. Raises InvalidRequest."""
        variables = {
            **self._special_tokens,
            "tools": None,
            "documents": None,
            **(extra or {}),
            "messages": self._in_parts(messages) if self._roles_in_parts else messages,
            "add_generation_prompt": add_generation_prompt,
        }
        template = self._tool_template if variables["tools"] else self._template
        try:
            return template.render(variables)
        except _TEMPLATE_FAILURES as exc:
            raise InvalidRequest(
                f"The model's chat template cannot render these messages: {exc}", param="messages"
            ) from exc

    def _in_parts(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        return [
            {**message, "content": [{"type": "text", "text": content}]}
            if message.get("role") in self._roles_in_parts
            and isinstance(content := message.get("content"), str)
            else message
            for message in messages
        ]

    def _wants_parts(self, role: str) -> bool:
        """Templates of multimodal models may pass over text that is not in a list of parts."""
        return not self._shows(role, _MARK) and self._shows(role, [{"type": "text", "text": _MARK}])

    def _shows(self, role: str, content: Any) -> bool:
        other: Any = [{"type": "text", "text": "x"}] if isinstance(content, list) else "x"
        messages: list[dict[str, Any]] = [
            {"role": each, "content": other} for each in _PROBES[role]
        ]
        probed = next(each for each in reversed(messages) if each["role"] == role)
        probed["content"] = content
        variables = {**self._special_tokens, "tools": None, "documents": None}
        try:
            return _MARK in self._template.render(
                variables, messages=messages, add_generation_prompt=True
            )
        except _TEMPLATE_FAILURES:
            return False


def load_chat_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> ChatTemplate | None:
    """From `chat_template.jinja`, else `tokenizer_config.json`; None for a base model.

    Raises ModelError for a template that cannot be read.
    """
    source, tool_source = _sources(folder, tokenizer_config)
    if source is None:
        return None
    special_tokens = {}
    for name in SPECIAL_TOKENS:
        token = tokenizer_config.get(name)
        text = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(text, str):
            special_tokens[name] = text
    return ChatTemplate(source, special_tokens, tool_source)


def _sources(folder: Path, tokenizer_config: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The default template and the one named `tool_use`."""
    named: dict[str, Any] = {}
    found = tokenizer_config.get("chat_template")
    if isinstance(found, list):
        named = {entry["name"]: entry["template"] for entry in found}
    elif isinstance(found, str):
        named["default"] = found
    files = {"default": folder / "chat_template.jinja"}
    files["tool_use"] = folder / "additional_chat_templates" / "tool_use.jinja"
    for name, file in files.items():
        if file.is_file():
            named[name] = file.read_text()
    return named.get("default"), named.get("tool_use")


def _compiled(source: str) -> jinja2.Template:
    try:
        template = _environment().from_string(source)
    except (jinja2.TemplateError, RecursionError) as exc:
        where = f", line {exc.lineno}" if isinstance(exc, jinja2.TemplateSyntaxError) else ""
        raise ModelError(
            f"the model's chat template cannot be read{where}: {exc}",
            remedy="mend `chat_template.jinja`, or `chat_template` in tokenizer_config.json",
        ) from exc
    # A chain of maps otherwise, copied at each rendering for more than that takes by itself.
    template.globals = dict(template.globals)
    return template


class _GenerationMarker(Extension):
    """`{% generation %}...{% endgeneration %}` renders its content."""

    tags = {"generation"}  # noqa: RUF012 (declared so by jinja2)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationMarker, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json_text(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
