"""Guided decoding: which tokens may come next, by a JSON schema, expression or grammar.

`check` tries a guide in a process of its own, before a frontend accepts it. `grammars` keeps the
compiled guides of an engine, and `matcher` follows a text in one of them. `lark` writes grammars.
llguidance does the work, and only this package knows it.
"""
