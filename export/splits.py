"""How a byte-level GGUF splits text before the merges: pre-tokenizers by the name in `tokenizer.ggml.pre`.

A GGUF holds vocabulary and merges but only a name for the rest. The names are those of `llm_tokenizer_bpe` in llama.cpp's
src/llama-vocab.cpp; the rules are those of the original models' tokenizer.json, which that file quotes and approximates: it
applies no Unicode normalization, and its regexes are rewritten for an engine without Unicode classes. Where the two differ the
original counts, since the model was trained with it.
"""

from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer


@dataclass(frozen=True)
class Splits:
    """What a name stands for."""

    steps: tuple[PreTokenizer, ...]
    """Applied in turn, each to the pieces of the one before it."""
    nfc: bool = False
    """Composed to NFC first."""
    ignore_merges: bool = False
    """A piece that is a token as a whole is that token, even if the merges lead elsewhere."""
    adds_bos: bool = False
    """Where the file's `tokenizer.ggml.add_bos_token` is absent."""

    @property
    def normalizer(self) -> Normalizer | None:
        """For the tokenizer of such a model."""
        return normalizers.NFC() if self.nfc else None

    @property
    def pre_tokenizer(self) -> PreTokenizer:
        """For the tokenizer of such a model."""
        return self.steps[0] if len(self.steps) == 1 else pre_tokenizers.Sequence(list(self.steps))


def _isolated(*regexes: str) -> tuple[PreTokenizer, ...]:
    return (*(pre_tokenizers.Split(Regex(regex), "isolated") for regex in regexes), _bytes())


def _bytes() -> PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def _gpt2() -> PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits() -> tuple[PreTokenizer, ...]:
    return (pre_tokenizers.Digits(individual_digits=True), _gpt2())


def _falcon() -> tuple[PreTokenizer, ...]:
    return (
        pre_tokenizers.Punctuation("contiguous"),
        _gpt2(),
        pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
    )


_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"

_LLAMA3 = "|".join((_CONTRACTION, _WORD, r"\p{N}{1,3}", _PUNCTUATION, _SPACE))
_QWEN2 = "|".join((_CONTRACTION, _WORD, r"\p{N}", _PUNCTUATION, _SPACE))
_QWEN35 = "|".join((_CONTRACTION, r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r"\p{N}", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", _SPACE))
_TEKKEN = "|".join((*_CASED, r"\p{N}", _SLASHED, _SPACE))
_GPT4O = "|".join((*(word + _CONTRACTION + "?" for word in _CASED), r"\p{N}{1,3}", _SLASHED, _SPACE))
_DEEPSEEK_LETTERS = (
    "\\s?["
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
    "\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102"
    "\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149"
    "\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f"
    "\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f"
    "\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943"
    "]+"
)
_DEEPSEEK_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + _SPACE,
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_LLAMA3_SPLITS = Splits(_isolated(_LLAMA3), ignore_merges=True, adds_bos=True)

SPLITS: dict[str, Splits] = {
    # The one rule that is llama.cpp's own, and no model's.
    "default": Splits(_isolated(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": Splits((_gpt2(),)),
    "phi-2": Splits((_gpt2(),)),
    "mpt": Splits((_gpt2(),), nfc=True),
    "olmo": Splits((_gpt2(),), nfc=True),
    "smollm": Splits(_digits()),
    "starcoder": Splits(_digits()),
    "refact": Splits(_digits()),
    "command-r": Splits(_digits(), nfc=True),
    "llama3": _LLAMA3_SPLITS,
    "llama-v3": _LLAMA3_SPLITS,
    "llama-bpe": _LLAMA3_SPLITS,
    "falcon3": _LLAMA3_SPLITS,
    "lfm2": _LLAMA3_SPLITS,
    "dbrx": Splits(_isolated(_LLAMA3)),  # Phi-4's as well
    "bloom": Splits(_isolated(" ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+")),
    "falcon": Splits(_falcon()),
    "qwen2": Splits(_isolated(_QWEN2), nfc=True),
    "deepseek-r1-qwen": Splits(_isolated(_QWEN2), nfc=True),
    "qwen35": Splits(_isolated(_QWEN35), nfc=True),
    "tekken": Splits(_isolated(_TEKKEN), ignore_merges=True, adds_bos=True),
    "gpt-4o": Splits(_isolated(_GPT4O)),
    "llama4": Splits(_isolated(_GPT4O)),
    "minimax-m2": Splits(_isolated(_GPT4O)),
    "deepseek-llm": Splits(
        _isolated(
            r"[\r\n]",
            _DEEPSEEK_LETTERS,
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            _DEEPSEEK_CJK,
            r"\p{N}+",
        )
    ),
    "deepseek-coder": Splits(_isolated(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}")),
    "deepseek-v3": Splits(_isolated(*_DEEPSEEK_V3)),
}
"""By the file's `tokenizer.ggml.pre`. A name that is not here is refused: guessing costs quality that nobody sees."""
