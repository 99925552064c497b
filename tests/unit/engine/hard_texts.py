"""Texts on which tokenizers that are nearly the same give different tokens."""

from __future__ import annotations

HARD_TEXTS = (
    "Hello world",
    "  leading and   multiple    spaces  ",
    "\n\n\nnewlines\r\n\r\nand \n \n\t\ttabs\t\t\t",
    "12345 1 12 123 1234 3.14159 1,000,000 ２０２６ ٣٤٥ ½ ² Ⅷ",
    "I'm you're HE'LL they'd DON'T It'S can’t 'tis ''s",
    'def add(a: int) -> str:\n    return f"{a!r}"  # x\n\n\tif a == 19:\n\t\tpass\n',
    "HelloWorld camelCase XMLHttpRequest iPhone15Pro snake_case SCREAMING ÉCOLE ǅ ʰ ª",
    "東京から、你好，世界！今天是2026年8月13日 안녕하세요 カタカナ",
    "🙂🎉👨‍👩‍👧‍👦🇩🇪 ❤️ 👍🏽",
    "สวัสดีครับ नमस्ते दुनिया مرحبا שלום ក្មែរ",
    "e\u0301 cafe\u0301 A\u030a n\u0303 \u1100\u1161 ﬁ ①",
    "\u00a0nbsp\u2003em\u3000wide\u200bzwsp\u200d\ufeff\u2028",
    "\x00\x01\x7f control \ue000 \U000e0001 \U0010ffff",
    "https://example.com/a/b?c=d&e=f#g user@mail.org C:\\path // ///",
    '{"a": [1, 2.5e-10, null], "b\\n": "\\u00e9"}',
    "!!! ??? ... --- *** ~~~ ((())) [[]] «x» “y” — …",
    "a▁b▁▁c Ġ Ċ <0x41> <0x0A>",
    " " * 70,
    "\n" * 45,
    "x" * 300,
    "word\n",
    " word",
    "mixed123abc456 v1.2.3-beta 0xDEADBEEF #ff00aa $100 50%",
    "\r carriage \r\r\n",
    "  \n  \n\n   a",
)
