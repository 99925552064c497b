"""Grammars that clients write in EBNF (GBNF, xgrammar's), as Lark."""

from __future__ import annotations

from serving.errors import InvalidRequest

_MAX_BYTES = 64 * 1024
"""Converting is slow: about 2 ms for a kilobyte."""


def as_lark(text: str) -> str:
    """`text` itself if it is Lark. Raises InvalidRequest if it is EBNF that cannot be converted."""
    from llguidance.gbnf_to_lark import gbnf_to_lark, is_lark_syntax

    if "::=" not in text or is_lark_syntax(text):
        return text
    if len(text) > _MAX_BYTES:
        raise _wrong(f"in EBNF it may have {_MAX_BYTES} bytes")
    try:
        return str(gbnf_to_lark(text))
    except RecursionError:
        raise _wrong("it is nested too deeply") from None
    except Exception as exc:  # it raises nothing narrower
        raise _wrong(" ".join(str(exc).split())[:300]) from exc


def _wrong(why: str) -> InvalidRequest:
    return InvalidRequest(f"The grammar cannot be used: {why}", code="invalid_grammar")
