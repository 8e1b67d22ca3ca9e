"""Texts that show whether two tokenizers are the same, and the comparison."""

from collections.abc import Sequence

from tokenizers import Tokenizer

ORDINARY = (
    "The capital of France is Paris.",
    "Why is the sky blue? Because air scatters blue light more than red.",
    "In 1969, 650841823 people watched; 3.14159 of 1,000,000 did not.",
    "def add(a: int, b: int) -> int:\n    return a + b\n",
    "Der Fluß fließt über die Brücke, naïve façade, señor.",
    "Москва - столица России.",
    "今天天气很好，我们去公园吧。",
    "お元気ですか。東京は大きい街です。",
)
"""What anybody might send: a tokenizer that makes nothing of any of these is none."""

_VARIED = (
    "650841823",
    "1 12 123 1234 12345 0007",
    "1,234.56 -7 +49 30 12:30 1e-9 0xFF",
    "２０２６ ٣٤٥ ४५६",
    "a  b   c    d        e",
    " leading and trailing ",
    "\tindented\n\n\n\twith tabs\r\nand breaks \n ",
    "     ",
    "\n",
    "I'm you're he's we've they'd she'll isn't CAN'T I'M",
    "don\u2019t \u201cquoted\u201d \u2014 and \u2026",
    "camelCaseName snake_case_name SCREAMING_CASE kebab-case",
    "for (int i = 0; i < n; ++i) { a[i] *= 2; } // done",
    "SELECT * FROM t WHERE id = 'x';--\n<div class=\"a\">&amp;</div>",
    "https://example.org/a/b?c=1&d=%20#e user@example.org",
    "!!! ??? ... ### $$$ ((( ))) [[ ]] {{ }} <> == != <= => -> ::",
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "hElLo WORLD HeLLo",
    "Ελληνικά και Türkçe İstanbul ığdır",
    "שלום עולם مرحبا بالعالم",
    "हिन्दी में लिखा हुआ ไทยไม่มีช่องว่าง",
    "한국어 문장입니다. Tiếng Việt có dấu.",
    "\u00e9 e\u0301 \u00c5 A\u030a \ufb01 \u2126",
    "😀 👩‍👩‍👧‍👦 🇩🇪 👍🏽 ❤️",
    "\u200bzero\u200dwidth\ufeff\u00a0space\u3000wide",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𠀀",
    "\x00\x01\x7f",
    "x = {'key': [1, 2, 3], \"other\": None}",
    "▁ ▁▁word Ġ Ċ Â ##ing <0x0A>",
)
MAX_SPECIAL = 16
"""Special tokens that are tried as text, at most."""


def texts(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The corpus, with the special tokens of `tokenizer` spelled out in text."""
    added = [token.content for _, token in sorted(tokenizer.get_added_tokens_decoder().items())][:MAX_SPECIAL]
    return (*ORDINARY, *_VARIED, *(text for token in added for text in (token, f"a {token} b", f"a{token}b")))


def differences(one: Tokenizer, other: Tokenizer, corpus: Sequence[str]) -> list[str]:
    """The texts of `corpus` that the two turn into other tokens, or whose tokens they turn into other text.

    A tokenizer that fails at a text differs there: transformers makes some whose vocabulary lacks what their class needs.
    """
    return [text for text in corpus if not _alike(one, other, text)]


def _alike(one: Tokenizer, other: Tokenizer, text: str) -> bool:
    try:
        ids = one.encode(text).ids
        return bool(ids == other.encode(text).ids) and bool(one.decode(ids) == other.decode(ids))
    except Exception:  # tokenizers raises nothing more specific.
        return False
