"""export.tokenizer on small files that the tests write: what each kind of source becomes in a bundle."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from gguf import GGUFReader, GGUFValueType, GGUFWriter, TokenType
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import GenerationConfig, TokenizersBackend

from export import gguf_file, gguf_tokenizer
from export.errors import ExportError
from export.sampling import read_sampling
from export.splits import SPLITS
from export.tokenizer import read_text, write_text

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = [*ALPHABET, "ll", "Ġh", "12", "<s>", "<|end|>", "<｜turn｜>", "  ", "[PAD]"]
TYPES = [TokenType.NORMAL] * (len(TOKENS) - 5) + [
    TokenType.CONTROL,
    TokenType.CONTROL,
    TokenType.CONTROL,
    TokenType.USER_DEFINED,
    TokenType.UNUSED,
]
BOS, END, TURN, GAP = (TOKENS.index(token) for token in ("<s>", "<|end|>", "<｜turn｜>", "  "))


def write_gguf(
    folder: Path,
    kind: str,
    tokens: Sequence[str],
    types: Sequence[int],
    pre: str | None = None,
    architecture: str = "llama",
    /,
    **more: Any,
) -> str:
    """A GGUF file without weights; `more` are further metadata of the tokenizer, of which those that are None are left out, and
    `name`, the model's. Its path in the folder.
    """
    writer = GGUFWriter(folder / "tiny.gguf", architecture)
    writer.add_tokenizer_model(kind)
    for key, value in ({"tokens": tokens, "token_type": [int(type) for type in types], "pre": pre} | more).items():
        if value is None:
            continue
        elsewhere = {"chat_template": "tokenizer.chat_template", "name": "general.name"}
        name = elsewhere.get(key, f"tokenizer.ggml.{key}")
        writer.add_key_value(name, value, GGUFValueType.get_type(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return "tiny.gguf"


def byte_level_gguf(folder: Path, pre: str | None = "gpt-2", **more: Any) -> str:
    ids = {"bos_token_id": BOS, "eos_token_id": END}
    return write_gguf(folder, "gpt2", TOKENS, TYPES, pre, **({"merges": ["l l", "Ġ h", "1 2"]} | ids | more))


def spelled(tokenizer: Tokenizer, text: str) -> list[str]:
    return tokenizer.encode(text).tokens


def test_a_gguf_says_how_text_is_split(tmp_path: Path) -> None:
    text = " hell 12"
    gpt2 = read_text(tmp_path, byte_level_gguf(tmp_path)).tokenizer
    assert spelled(gpt2, text) == ["Ġh", "e", "ll", "Ġ", "12"]
    smollm = read_text(tmp_path, byte_level_gguf(tmp_path, "smollm")).tokenizer
    assert spelled(smollm, text) == ["Ġh", "e", "ll", "Ġ", "1", "2"]


@pytest.mark.parametrize("pre", ["unheard-of", None])
def test_a_gguf_that_splits_text_in_an_unknown_way_is_refused(tmp_path: Path, pre: str | None) -> None:
    with pytest.raises(ExportError, match=rf"splits text by the rule {pre!r}.*export the original model's folder"):
        read_text(tmp_path, byte_level_gguf(tmp_path, pre))


@pytest.mark.parametrize("pre", SPLITS)
def test_every_known_rule_keeps_every_character(tmp_path: Path, pre: str) -> None:
    words = "I'LL say: don't—12345 + 678,9! Ünïcode été ΑΒΓ ñ $x_1^2~|` <b>a/b"
    text = f"{words}\r\n\n  你好、世界。 한국어 かな  \tx\n أهلا ١٢٣ 👩‍🚀\n\n"
    tokenizer = read_text(tmp_path, byte_level_gguf(tmp_path, pre, add_bos_token=False)).tokenizer
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("llama-bpe", "it'S 12345\n\n x", ["it", "'S", "Ġ", "123", "45", "ĊĊ", "Ġx"]),
        ("qwen2", "it'S 123\n\n x", ["it", "'S", "Ġ", "1", "2", "3", "ĊĊ", "Ġx"]),
        ("tekken", "fooBar 12/\n", ["foo", "Bar", "Ġ", "1", "2", "/Ċ"]),
        ("gpt-4o", "fooBar's 1234", ["foo", "Bar's", "Ġ", "123", "4"]),
        ("dbrx", "it'S 12345", ["it", "'S", "Ġ", "123", "45"]),
        ("bloom", "It's 12,5 (x|y)", ["It's", "Ġ12", ",", "5", "Ġ(", "x", "|", "y", ")"]),
        ("falcon", "a, 1234", ["a", ",", "Ġ", "123", "4"]),
        ("deepseek-llm", "ab\n12 你好", ["ab", "Ċ", "12", "Ġ", "ä½łå¥½"]),
        ("deepseek-v3", "1234你好 a", ["123", "4", "ä½łå¥½", "Ġa"]),
        ("default", "a,1234", ["a", ",", "123", "4"]),
    ],
)
def test_the_rules_split_where_the_models_were_trained_to(pre: str, text: str, pieces: list[str]) -> None:
    assert [piece for piece, _ in SPLITS[pre].pre_tokenizer.pre_tokenize_str(text)] == pieces


def test_a_model_trained_on_composed_characters_gets_them(tmp_path: Path) -> None:
    tokenizer = read_text(tmp_path, byte_level_gguf(tmp_path, "qwen2")).tokenizer
    assert tokenizer.encode("e\u0301").ids == tokenizer.encode("é").ids


def test_tokens_that_are_no_text_are_found_whole(tmp_path: Path) -> None:
    tokenizer = read_text(tmp_path, byte_level_gguf(tmp_path)).tokenizer
    assert tokenizer.encode("l<｜turn｜>l  l[PAD]").ids[:5] == [
        TOKENS.index("l"),
        TURN,
        TOKENS.index("l"),
        GAP,
        TOKENS.index("l"),
    ]
    assert "[PAD]" not in spelled(tokenizer, "[PAD]")
    assert tokenizer.decode([TURN, GAP, END, TOKENS.index("l")]) == "  l"
    assert tokenizer.get_vocab_size() == len(TOKENS)


@pytest.mark.parametrize(
    ("pre", "metadata", "around"),
    [
        ("gpt-2", {}, ([], [])),
        ("llama-bpe", {}, ([BOS], [])),
        ("llama-bpe", {"add_bos_token": False}, ([], [])),
        ("gpt-2", {"add_bos_token": True, "add_eos_token": True}, ([BOS], [END])),
    ],
)
def test_bos_and_eos_are_added_where_the_file_says_so(
    tmp_path: Path, pre: str, metadata: dict[str, bool], around: tuple[list[int], list[int]]
) -> None:
    tokenizer = read_text(tmp_path, byte_level_gguf(tmp_path, pre, **metadata)).tokenizer
    before, after = around
    assert tokenizer.encode("l").ids == [*before, TOKENS.index("l"), *after]
    assert tokenizer.encode("l", add_special_tokens=False).ids == [TOKENS.index("l")]


@pytest.mark.parametrize(
    ("more", "stop_ids"), [(None, (END, TURN)), (BOS, (END, TURN, BOS)), ([TURN, END, BOS], (END, TURN, BOS))]
)
def test_stop_ids_are_what_the_file_and_the_generation_config_name(
    tmp_path: Path, more: int | list[int] | None, stop_ids: tuple[int, ...]
) -> None:
    config = GenerationConfig.from_dict({"eos_token_id": more})
    side = read_text(tmp_path, byte_level_gguf(tmp_path, eot_token_id=TURN), generation_config=config)
    assert side.stop_ids == stop_ids


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"merges": ["l nothing"]}, "merges of .* do not fit its vocabulary"),
        ({"chat_template": "{% if %}"}, "is not valid jinja2"),
    ],
)
def test_a_damaged_gguf_is_refused(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ExportError, match=complaint):
        read_text(tmp_path, byte_level_gguf(tmp_path, **change))


def test_a_gguf_that_names_a_token_twice_is_refused(tmp_path: Path) -> None:
    name = write_gguf(tmp_path, "gpt2", ["a", "b", "a"], [TokenType.NORMAL] * 3, "gpt-2")
    with pytest.raises(ExportError, match="names a token twice"):
        read_text(tmp_path, name)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGML" * 10)
    for read in (lambda: read_text(tmp_path, "x.gguf"), lambda: read_sampling(tmp_path, "x.gguf")):
        with pytest.raises(ExportError, match=r"x\.gguf could not be loaded: .*; it is cut off or not a GGUF"):
            read()
    with pytest.raises(ExportError, match=r"lacks 1 of the 1 parts of absent \(absent\.gguf\)"):
        read_text(tmp_path, "absent.gguf")


@pytest.mark.parametrize("kind", ["bert", "t5", "rwkv", "none"])
@pytest.mark.parametrize("choice", ["file", "transformers"])
def test_a_kind_of_vocabulary_that_is_not_read_is_refused(tmp_path: Path, kind: str, choice: Any) -> None:
    name = write_gguf(tmp_path, kind, ["[PAD]", "[UNK]", "a"], [TokenType.NORMAL] * 3, scores=[0.0] * 3)
    with pytest.raises(ExportError, match=rf"^{tmp_path}/tiny\.gguf has a vocabulary of the kind '{kind}'"):
        read_text(tmp_path, name, choice=choice)


# What a GGUF says of text --------------------------------------------------------------------------------------------------


SPACED = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "▁h", "<|x|>"]
SPACED_TYPES = [
    TokenType.UNKNOWN,
    *[TokenType.CONTROL] * 2,
    *[TokenType.BYTE] * 256,
    *[TokenType.NORMAL] * 3,
    TokenType.CONTROL,
]
SPACED_SCORES = [0.0] * 259 + [-3.0, -2.0, -1.0, 0.0]


def spaced_gguf(folder: Path, architecture: str = "llama", **more: Any) -> str:
    """A vocabulary of SentencePiece's kind."""
    keys = {"scores": SPACED_SCORES, "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0} | more
    return write_gguf(folder, "llama", SPACED, SPACED_TYPES, None, architecture, **keys)


BLANKS = {
    True: {
        "h h": ["▁h", "▁h"],
        " h": ["▁", "▁h"],
        "<s>h": ["<s>", "▁h"],
        "h<|x|>h <|x|> h": ["▁h", "<|x|>", "▁h", "▁", "<|x|>", "▁", "▁h"],
    },
    False: {
        "h h": ["h", "▁h"],
        " h": ["▁h"],
        "<s>h": ["<s>", "h"],
        "h<|x|>h <|x|> h": ["h", "<|x|>", "h", "▁", "<|x|>", "▁h"],
    },
}
"""The tokens of texts with `add_space_prefix` and without, by `llama_vocab::impl::tokenize` in llama.cpp."""


@pytest.mark.parametrize("architecture", ["llama", "phi3", "qwen2", "stablelm", "granite", "gemma", "gemma2", "gemma3"])
@pytest.mark.parametrize("said", [None, True, False])
def test_a_blank_stands_in_front_of_a_text_where_llama_cpp_puts_one(
    tmp_path: Path, architecture: str, said: bool | None
) -> None:
    side = read_text(tmp_path, spaced_gguf(tmp_path, architecture, add_space_prefix=said, add_bos_token=False))
    for text, tokens in BLANKS[said is not False].items():
        assert spelled(side.tokenizer, text) == tokens, text
    for text in ("h h", " h", "  h h", "ü\n h"):
        assert side.tokenizer.decode(side.tokenizer.encode(text).ids) == text


def test_a_byte_level_vocabulary_has_no_blank_in_front(tmp_path: Path) -> None:
    for said in (True, False):
        tokenizer = read_text(tmp_path, byte_level_gguf(tmp_path, add_space_prefix=said)).tokenizer
        assert spelled(tokenizer, "h") == ["h"]


def test_gemma_4_begins_with_bos_whatever_its_file_says(tmp_path: Path) -> None:
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "▁h"]
    types = [*[TokenType.CONTROL] * 3, TokenType.UNKNOWN, *[TokenType.BYTE] * 256, *[TokenType.NORMAL] * 3]
    ids = {"bos_token_id": 2, "eos_token_id": 1, "unknown_token_id": 3, "padding_token_id": 0, "add_bos_token": False}
    name = write_gguf(tmp_path, "gemma4", tokens, types, None, "gemma4", merges=["▁ h"], add_space_prefix=True, **ids)
    side = read_text(tmp_path, name)
    assert spelled(side.tokenizer, "h h") == ["<bos>", "h", "▁h"]
    assert side.stop_ids == (1,)


def test_a_sentencepiece_vocabulary_has_llama_cpps_tokens_where_its_file_names_none(tmp_path: Path) -> None:
    side = read_text(tmp_path, spaced_gguf(tmp_path, bos_token_id=None, eos_token_id=None, unknown_token_id=None))
    assert spelled(side.tokenizer, "h") == ["<s>", "▁h"]
    assert (side.stop_ids, side.special_tokens) == (
        (2,),
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    )


@pytest.mark.parametrize("architecture", ["llama", "gemma"])
@pytest.mark.parametrize("choice", ["file", "transformers"])
def test_no_token_is_made_up_that_the_file_has_not(tmp_path: Path, architecture: str, choice: Any) -> None:
    """The classes in transformers add tokens of their own, with ids that the model has not."""
    tokens = [token.replace("<s>", "<|s|>").replace("</s>", "<|/s|>") for token in SPACED]
    keys = {"scores": SPACED_SCORES, "bos_token_id": 1, "eos_token_id": 2}
    side = read_text(tmp_path, write_gguf(tmp_path, "llama", tokens, SPACED_TYPES, None, architecture, **keys), choice=choice)
    assert max(side.tokenizer.encode("h <s> </s> <bos> <mask> <pad>").ids) < len(tokens) == side.tokenizer.get_vocab_size()


def test_merges_in_a_sentencepiece_file_count_for_nothing(tmp_path: Path) -> None:
    tokenizer = read_text(tmp_path, spaced_gguf(tmp_path, merges=["h h"])).tokenizer
    assert spelled(tokenizer, "h h") == ["<s>", "▁h", "▁h"]


def test_more_tokens_may_end_an_answer(tmp_path: Path) -> None:
    assert read_text(tmp_path, byte_level_gguf(tmp_path, eos_token_ids=[TURN, END])).stop_ids == (END, TURN)


@pytest.mark.parametrize(
    ("texts", "ending"),
    [
        (["<end_of_turn>", "<|x|>"], ["<end_of_turn>"]),
        (["<|end|>", "<|endoftext|>"], ["<|end|>", "<|endoftext|>"]),
        (["<|end|>", "<|return|>", "<|call|>"], ["<|return|>", "<|call|>"]),
        (["<|end|>", "<|flush|>", "<|calls|>"], ["<|flush|>", "<|calls|>"]),
        (["</s>", "<turn|>", "<|tool_response>"], ["<turn|>", "<|tool_response>"]),
    ],
)
def test_tokens_that_end_an_answer_are_found_by_their_texts(tmp_path: Path, texts: list[str], ending: list[str]) -> None:
    tokens = ["<unk>", "<s>", "<z>", "▁h", *texts]
    types = [2, 3, 3, 1, *[3] * len(texts)]
    side = read_text(tmp_path, write_gguf(tmp_path, "llama", tokens, types, None, eos_token_id=2, scores=[0.0] * len(tokens)))
    assert [side.tokenizer.id_to_token(id) for id in side.stop_ids] == ["<z>", *ending]


@pytest.mark.parametrize("name", ["Phi 3 Mini 4k", "Phi-3.5-mini-instruct", "phi3", "Phi 4", None])
def test_phi_3_drops_white_space_behind_its_special_tokens(tmp_path: Path, name: str | None) -> None:
    """As its authors' tokenizer.json (`rstrip`); llama.cpp goes by the name, too."""
    marks = ["<|user|>", "<|end|>", "<|assistant|>", "<|endoftext|>"]
    tokens = ["<unk>", "<s>", "</s>", "▁", "h", "▁h", "<0x0A>", *marks]
    keys = {"scores": [0.0, 0.0, 0.0, -1.0, -2.0, 0.0, 0.0, *[0.0] * 4], "add_bos_token": False}
    file = write_gguf(tmp_path, "llama", tokens, [2, 3, 3, 1, 1, 1, 6, 3, 3, 3, 3], None, "phi3", name=name, **keys)
    ids = read_text(tmp_path, file).tokenizer.encode("<|user|>\nh<|end|>\n<|assistant|>\n<|endoftext|>\n").ids
    said = [tokens[id] for id in ids]
    kept = ["<|endoftext|>", "▁", "<0x0A>"]
    if name in ("Phi 4", None):
        assert said == ["<|user|>", "▁", "<0x0A>", "h", "<|end|>", "▁", "<0x0A>", "<|assistant|>", "▁", "<0x0A>", *kept]
    else:
        assert said == ["<|user|>", "▁h", "<|end|>", "<|assistant|>", *kept]


def test_a_special_token_that_transformers_spells_otherwise_is_refused(tmp_path: Path) -> None:
    file = byte_level_gguf(tmp_path)
    assert read_text(tmp_path, file).tokenizer.encode("<｜turn｜>").ids == [TURN]
    with pytest.raises(ExportError, match=r"other text of the special token '<｜turn｜>' of .*; leave --tokenizer"):
        read_text(tmp_path, file, choice="transformers")


def test_a_key_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"has the key tokenizer\.ggml\.lowercase, which is not known here and may change how"
    ):
        read_text(tmp_path, byte_level_gguf(tmp_path, lowercase=True))
    with pytest.raises(ExportError, match=r"has the key tokenizer\.ggml\.precompiled_charsmap \(the normalization of t5's"):
        read_text(tmp_path, spaced_gguf(tmp_path, precompiled_charsmap=[1, 2]))
    with pytest.raises(ExportError, match=r"has the key tokenizer\.ggml\.add_sep_token \("):
        read_text(tmp_path, spaced_gguf(tmp_path, add_sep_token=True))


def test_a_key_that_changes_no_token_of_a_text_is_taken_or_told_of(tmp_path: Path) -> None:
    harmless = {"add_sep_token": False, "remove_extra_whitespaces": True, "fim_pre_token_id": 3, "token_type_count": 1}
    plain = read_text(tmp_path, spaced_gguf(tmp_path))
    more = read_text(tmp_path, spaced_gguf(tmp_path, "llama", **harmless))
    assert plain.tokenizer.to_str() == more.tokenizer.to_str()
    assert more.notes == ()
    (note,) = read_text(tmp_path, spaced_gguf(tmp_path, suppress_tokens=[5])).notes
    assert note.startswith("tokenizer.ggml.suppress_tokens of tiny.gguf is left out: tokens that are never to be drawn")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"token_type": [1, 2, 3]}, r"has no tokenizer\.ggml\.token_type, or less of it than its \d+ tokens need"),
        ({"token_type": 3}, r"has tokenizer\.ggml\.token_type = 3, where it has to be a list of numbers"),
        ({"scores": [0.0]}, r"has no tokenizer\.ggml\.scores, or less of it"),
        ({"scores": None}, r"has no tokenizer\.ggml\.scores, or less of it"),
        ({"eos_token_id": 1.0}, "names 1.0 as its eos, which is not a token's id"),
        ({"eos_token_id": True}, "names True as its eos, which is not a token's id"),
        ({"eos_token_id": "x"}, "names 'x' as its eos, which is not a token's id"),
        ({"eos_token_id": [1, 2]}, r"names \[1, 2\] as its eos, which is not a token's id"),
        ({"eos_token_id": -1}, r"names token -1 as its eos, of \d+ tokens"),
        ({"padding_token_id": 999}, r"names token 999 as its padding, of \d+ tokens"),
        ({"eos_token_ids": [2, -1]}, r"has tokenizer\.ggml\.eos_token_ids = \[2, -1\], where it has to be ids of its tokens"),
        ({"eos_token_ids": 2}, r"has tokenizer\.ggml\.eos_token_ids = 2, where it has to be a list of numbers"),
        ({"add_bos_token": "false"}, r"has tokenizer\.ggml\.add_bos_token = 'false', where it has to be true or false"),
        ({"add_space_prefix": 0}, r"has tokenizer\.ggml\.add_space_prefix = 0, where it has to be true or false"),
        ({"pre": 5}, r"has tokenizer\.ggml\.pre = 5, where it has to be a text"),
        ({"tokens": [1, 2]}, r"has tokenizer\.ggml\.tokens = \[1, 2\], where it has to be a list of texts"),
        ({"chat_template": 5}, "has a chat template 'default' that cannot be kept"),
    ],
)
def test_metadata_that_cannot_be_meant_is_refused(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ExportError, match=complaint) as refused:
        read_text(tmp_path, spaced_gguf(tmp_path, **change))
    assert str(refused.value).startswith(str(tmp_path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"merges": None}, r"has no tokenizer\.ggml\.merges, or less of it"),
        ({"merges": ["ll"]}, "merges of .* do not fit its vocabulary"),
        ({"add_eos_token": True, "eos_token_id": None}, "adds EOS to a text .* and does not say which token that is"),
    ],
)
def test_bytes_without_what_their_text_needs_are_refused(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ExportError, match=complaint):
        read_text(tmp_path, byte_level_gguf(tmp_path, **change))


def test_the_metadata_is_read_once_while_the_file_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def opening(path: Path) -> GGUFReader:
        opened.append(path.name)
        return GGUFReader(path)

    monkeypatch.setattr(gguf_file, "GGUFReader", opening)
    name = byte_level_gguf(tmp_path)
    gguf_file.read(tmp_path / name)
    first = read_text(tmp_path, name)
    read_sampling(tmp_path, name)
    assert opened == [name]
    byte_level_gguf(tmp_path, eos_token_id=TURN)
    assert first.stop_ids[0] == END
    assert read_text(tmp_path, name).stop_ids[0] == TURN
    assert opened == [name, name]


def trained() -> sentencepiece.SentencePieceProcessor:
    """A small SentencePiece model with bytes for what it does not know."""
    model = io.BytesIO()
    sentences = ["the quick brown fox jumps over the lazy dog", "Hello, world! 12345", "naïve café", "a  b   c"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def sentencepiece_gguf(folder: Path, original: sentencepiece.SentencePieceProcessor) -> str:
    size = original.get_piece_size()
    kinds = {id: TokenType.CONTROL for id in range(size) if original.is_control(id)}
    kinds |= {id: TokenType.BYTE for id in range(size) if original.is_byte(id)} | {original.unk_id(): TokenType.UNKNOWN}
    return write_gguf(
        folder,
        "llama",
        [original.id_to_piece(id) for id in range(size)],
        [kinds.get(id, TokenType.NORMAL) for id in range(size)],
        scores=[original.get_score(id) for id in range(size)],
        bos_token_id=original.bos_id(),
        eos_token_id=original.eos_id(),
        unknown_token_id=original.unk_id(),
    )


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another model's files"])
def test_a_sentencepiece_gguf_has_sentencepieces_own_tokens(tmp_path: Path, beside: bool) -> None:
    original = trained()
    if beside:
        save_folder(tmp_path, "{{ messages }}")
    side = read_text(tmp_path, sentencepiece_gguf(tmp_path, original))
    assert (side.special_tokens["bos_token"], side.stop_ids) == ("<s>", (original.eos_id(),))
    assert side.templates == {}
    for text in ("the lazy fox", "Hello, wörld 42!", "你好 👩‍🚀", "a  b\n\nc\t", "quick", " fox", "  the fox "):
        expected = original.encode(text)
        assert side.tokenizer.encode(text).ids == [original.bos_id(), *expected], text
        assert side.tokenizer.decode(expected) == original.decode(expected) == text


def test_a_conversion_with_other_tokens_than_the_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a"))
    monkeypatch.setattr(gguf_tokenizer, "convert_gguf_tokenizer", lambda *_: (foreign, {}))
    with pytest.raises(ExportError, match=r"makes another tokenizer of .*tiny\.gguf: token \d+ is .* and .* in the file"):
        read_text(tmp_path, sentencepiece_gguf(tmp_path, trained()))


def save_folder(folder: Path, template: str | None) -> None:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(["a b c"], trainers.WordLevelTrainer(special_tokens=["<unk>", "<s>", "</s>"]))
    tokenizer.enable_truncation(2)
    backend: Any = TokenizersBackend
    fast = backend(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def test_a_folders_tokenizer_is_taken_as_it_is(tmp_path: Path) -> None:
    save_folder(tmp_path, "{{ messages }}")
    side = read_text(tmp_path)
    assert (side.special_tokens, side.stop_ids) == ({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, (2,))
    assert side.templates == {"default": "{{ messages }}"}
    assert side.notes == ()
    out = tmp_path / "bundle"
    out.mkdir()
    assert write_text(side, out) == ("tokenizer.json", "chat_template.jinja")
    written = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert len(written.encode("a b c").ids) == 3, "a bundle's tokenizer never cuts"
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"


def test_a_folder_without_a_template_gives_a_bundle_without_one(tmp_path: Path) -> None:
    save_folder(tmp_path, None)
    side = read_text(tmp_path)
    assert side.templates == {}
    assert write_text(side, tmp_path) == ("tokenizer.json",)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ExportError, match=r"has no tokenizer: tokenizer\.json, .*tokenizer\.model, .* were looked for"):
        read_text(tmp_path)


def test_a_tokenizer_without_a_fast_form_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "ctrl"}))
    (tmp_path / "vocab.json").write_text(json.dumps({"<unk>": 0, "a</w>": 1}))
    (tmp_path / "merges.txt").write_text("#version\na </w>\n")
    with pytest.raises(ExportError, match=r"\(CTRLTokenizer\) runs only in Python"):
        read_text(tmp_path)
