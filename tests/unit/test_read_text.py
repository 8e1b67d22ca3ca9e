"""export.tokenizer on small files that the tests write: what each kind of source becomes in a bundle."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from gguf import GGUFValueType, GGUFWriter, TokenType
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GenerationConfig, TokenizersBackend

from export.errors import ExportError
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
    folder: Path, kind: str, tokens: Sequence[str], types: Sequence[int], pre: str | None = None, **more: Any
) -> str:
    """A GGUF file without weights; `more` are further metadata of the tokenizer. Its name."""
    writer = GGUFWriter(folder / "tiny.gguf", "llama")
    for key, value in {"block_count": 1, "context_length": 64, "embedding_length": 8, "feed_forward_length": 8}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_uint32("llama.attention.head_count", 1)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    for key, value in more.items():
        name = "tokenizer.chat_template" if key == "chat_template" else f"tokenizer.ggml.{key}"
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
    with pytest.raises(ExportError, match="cannot be read as a GGUF file"):
        read_text(tmp_path, "x.gguf")
    with pytest.raises(ExportError, match="cannot be read as a GGUF file"):
        read_text(tmp_path, "absent.gguf")


def test_a_kind_of_vocabulary_that_nobody_converts_is_refused(tmp_path: Path) -> None:
    name = write_gguf(tmp_path, "bert", ["[PAD]", "[UNK]", "a"], [TokenType.NORMAL] * 3)
    with pytest.raises(ExportError, match=rf"^{tmp_path}/tiny\.gguf has no tokenizer that transformers can load: .*'bert'"):
        read_text(tmp_path, name)


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
    for text in ("the lazy fox", "Hello, wörld 42!", "你好 👩‍🚀", "a  b\n\nc\t", "quick"):
        expected = original.encode(text)
        assert side.tokenizer.encode(text).ids == [original.bos_id(), *expected], text
        assert side.tokenizer.decode(expected) == original.decode(expected) == text


def test_a_conversion_with_other_tokens_than_the_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one was that transformers mixed with the files beside it."""
    other = tmp_path / "other"
    save_folder(other, None)
    foreign = AutoTokenizer.from_pretrained(other)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: foreign)
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
