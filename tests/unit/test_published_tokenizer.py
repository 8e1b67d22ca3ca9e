"""A folder's tokenizer is the one that its authors published, whatever transformers makes of it by its class."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

import engineshed
from export import corpus
from export.errors import ExportError
from export.tokenizer import checked, read_text
from runtime import bundle
from tests import tiny

DIGITS = "650841823"
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("6", "5"), ("65", "0"), ("8", "4"), ("84", "1"), ("8", "2"), ("82", "3"), ("650", "841")]
SPECIAL = ["<s>", "</s>", "<unk>"]
SIZE = len(ALPHABET) + len(MERGES) + len(SPECIAL)


def byte_level(pattern: str = r"\p{N}{1,3}|[^\p{N}]+") -> Tokenizer:
    """Digits split by threes, and their merges."""
    tokens = [*ALPHABET, *("".join(merge) for merge in MERGES), *SPECIAL]
    tokenizer = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    """As Llama 2's, but digits stand alone, as Llama's own SentencePiece model has it and its class in transformers has not."""
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"0123456789", *("".join(merge) for merge in MERGES)]
    model = models.BPE({piece: id for id, piece in enumerate(pieces)}, MERGES, byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return tokenizer


def save(folder: Path, tokenizer: Tokenizer, model_type: str = "llama", **config: Any) -> Path:
    """A folder as far as text is concerned."""
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**named, **config}))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def by_class(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


KINDS = {
    "a class": (byte_level, "qwen3", {"tokenizer_class": "Qwen2Tokenizer"}),
    "a model type": (byte_level, "qwen3", {}),
    "SentencePiece's way": (sentencepiece_like, "llama", {"tokenizer_class": "LlamaTokenizer"}),
    "GPT-2's way": (byte_level, "gpt2", {"tokenizer_class": "GPT2Tokenizer"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_counts_and_a_note_says_where_transformers_differs(tmp_path: Path, kind: str) -> None:
    made, model_type, config = KINDS[kind]
    folder = save(tmp_path, made(), model_type, **config)
    file, rebuilt = Tokenizer.from_file(str(folder / "tokenizer.json")), by_class(folder)
    assert file.encode(DIGITS).ids != rebuilt(DIGITS).input_ids, "the case that this is about"
    side = read_text(folder)
    for text in corpus.texts(file):
        assert side.tokenizer.encode(text).ids == file.encode(text).ids, ascii(text)
    (note,) = side.notes
    assert note.startswith(f"tokenizer.json and transformers' {type(rebuilt).__name__} differ in ")
    assert "tokenizer.json, which the authors publish, is taken (--tokenizer transformers takes the other)" in note


@pytest.mark.parametrize("kind", KINDS)
def test_the_other_is_taken_where_it_is_asked_for(tmp_path: Path, kind: str) -> None:
    made, model_type, config = KINDS[kind]
    folder = save(tmp_path, made(), model_type, **config)
    side, rebuilt = read_text(folder, choice="transformers"), by_class(folder)
    for text in corpus.texts(rebuilt.backend_tokenizer):
        assert side.tokenizer.encode(text).ids == rebuilt(text).input_ids, ascii(text)
    (note,) = side.notes
    assert f"that of {type(rebuilt).__name__} is taken (--tokenizer file takes the authors' tokenizer.json)" in note


def test_where_both_are_alike_nothing_is_said(tmp_path: Path) -> None:
    assert read_text(save(tmp_path, byte_level(), tokenizer_class="PreTrainedTokenizerFast")).notes == ()


def test_the_files_own_way_with_bos_and_eos_stays(tmp_path: Path) -> None:
    """As in transformers, which passes over both fields of the configuration where there is a tokenizer.json."""
    tokenizer = byte_level()
    tokens = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=tokens)
    folder = save(tmp_path, tokenizer, add_bos_token=False, add_eos_token=False)
    side = read_text(folder)
    assert side.tokenizer.encode("a").tokens == ["<s>", "a", "</s>"]
    assert side.tokenizer.encode("a").ids == by_class(folder)("a").input_ids
    assert side.notes == ()


def test_tokens_that_only_the_configuration_adds_are_there(tmp_path: Path) -> None:
    added = {str(SIZE): {"content": "<|tool|>", "special": True}, str(SIZE + 1): {"content": "<extra>", "special": False}}
    folder = save(tmp_path, byte_level(), added_tokens_decoder=added, image_token="<|tool|>")
    side = read_text(folder)
    assert side.tokenizer.encode("a<|tool|><extra>").ids == by_class(folder)("a<|tool|><extra>").input_ids
    assert side.tokenizer.encode("<|tool|>").ids == [SIZE]
    assert side.special_tokens["image_token"] == "<|tool|>"


def test_a_token_that_only_a_class_names_is_not_made_up(tmp_path: Path) -> None:
    folder = save(tmp_path, byte_level(), "qwen3", tokenizer_class="Qwen2Tokenizer")
    assert by_class(folder).pad_token == "<|endoftext|>", "which its class names, and its vocabulary has not"
    side = read_text(folder)
    assert side.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert side.tokenizer.token_to_id("<|endoftext|>") is None


def test_a_class_that_is_code_in_the_folder_is_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    config = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    folder = save(tmp_path, byte_level(), "nonsense", **config)
    (folder / "config.json").write_text(json.dumps({"model_type": "nonsense", "auto_map": {"AutoConfig": "mine.Mine"}}))
    (folder / "mine.py").write_text(f"open({str(ran)!r}, 'w')\nclass Mine: pass\n")
    side = read_text(folder)
    assert not ran.exists()
    assert side.tokenizer.encode(DIGITS).tokens == ["650", "841", "823"]
    told = "tokenizer.json is taken as it is: the tokenizer's class is Python code of the model's own, which was not run"
    assert side.notes == (told,)
    with pytest.raises(ExportError, match="made by Python code of the model's own, which is run only with --trust-remote-code"):
        read_text(folder, choice="transformers")
    assert not ran.exists()


def test_vocabulary_files_alone_go_through_transformers(tmp_path: Path) -> None:
    vocabulary = {token: id for id, token in enumerate([*ALPHABET, "65", "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n6 5\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    side = read_text(tmp_path)
    assert side.tokenizer.encode(DIGITS).tokens == ["65", *DIGITS[2:]]
    assert (side.special_tokens["eos_token"], side.stop_ids) == ("<|endoftext|>", (vocabulary["<|endoftext|>"],))


def test_a_configuration_that_does_not_fit_is_told(tmp_path: Path) -> None:
    folder = save(tmp_path, byte_level(), added_tokens_decoder={"1": 7})
    with pytest.raises(ExportError, match=r"tokenizer_config\.json in .* does not fit tokenizer\.json"):
        read_text(folder)


def test_a_tokenizer_that_transformers_rebuilds_badly_is_told_of(tmp_path: Path) -> None:
    """A class that needs an unknown token, and a vocabulary that has another one or none."""
    tokens = [*ALPHABET, *("".join(merge) for merge in MERGES), "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = save(tmp_path, tokenizer, tokenizer_class="GemmaTokenizerFast", unk_token=None)
    with pytest.raises(Exception, match="Unk token"):
        by_class(folder).backend_tokenizer.encode("a b ▁")
    side = checked(read_text(folder), len(tokens), folder)
    assert side.tokenizer.encode("a b").tokens == ["a", "Ġ", "b"]
    (note,) = side.notes
    assert "tokenizer.json and transformers' GemmaTokenizer differ in " in note
    with pytest.raises(ExportError, match=r"fails at the text '.*' \(Unk token .*\); .* is taken with --tokenizer file"):
        checked(read_text(folder, choice="transformers"), len(tokens), folder)


@pytest.mark.parametrize("apart", [False, True], ids=["in the folder", "outside of it"])
@pytest.mark.parametrize("choice", ["file", "transformers"])
def test_a_configuration_that_names_another_file_is_refused(tmp_path: Path, apart: bool, choice: Any) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    other = (tmp_path if apart else folder) / "tokenizer.4.0.0.json"
    byte_level(r"\p{N}|[^\p{N}]+").save(str(other))
    save(folder, byte_level(), fast_tokenizer_files=["tokenizer.json", str(other) if apart else other.name])
    with pytest.raises(ExportError, match=rf"^{folder}/tokenizer_config\.json has the entry fast_tokenizer_files"):
        read_text(folder, choice=choice)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"[]", "is not a JSON object"),
        (b"null", "is not a JSON object"),
        (b"{", "is not valid JSON"),
        (b"\xff", "is not valid"),
    ],
)
def test_a_file_beside_the_vocabulary_that_is_none_is_named(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (save(tmp_path, byte_level()) / name).write_bytes(content)
    with pytest.raises(ExportError, match=rf"^{tmp_path}/{name} {sentence}"):
        read_text(tmp_path)


def test_a_vocabulary_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    (save(tmp_path, byte_level()) / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(ExportError, match=rf"^{tmp_path}/tokenizer\.json cannot be read \(.*[Dd]irectory"):
        read_text(tmp_path)


def test_what_transformers_says_on_many_lines_becomes_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("The backend failed in one of:\n(1) a file, \n(2) a class\nPlease open an issue.")

    save(tmp_path, byte_level())
    monkeypatch.setattr(PreTrainedTokenizerFast, "from_pretrained", fail)
    with pytest.raises(ExportError) as refused:
        read_text(tmp_path)
    assert "tokenizer.json (The backend failed in one of: (1) a file, (2) a class" in str(refused.value)
    assert "\n" not in str(refused.value)


# What is no tokenizer ------------------------------------------------------------------------------------------------


def test_a_tokenizer_of_unknown_tokens_is_none(tmp_path: Path) -> None:
    """transformers makes an empty one where the file that a class reads is not there."""
    (tmp_path / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ExportError, match=r"turns ordinary text .* into nothing but unknown tokens; .*tokenizer\.json, "):
        checked(read_text(tmp_path), 1000, tmp_path)


def test_a_tokenizer_that_gives_nothing_is_none(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    folder = save(
        tmp_path, tokenizer, tokenizer_class="PreTrainedTokenizerFast", bos_token=None, eos_token=None, unk_token=None
    )
    with pytest.raises(ExportError, match=r"turns ordinary text .* into nothing but unknown tokens"):
        checked(read_text(folder), 1000, folder)


def test_a_tokenizer_of_a_larger_model_is_refused(tmp_path: Path) -> None:
    side = read_text(save(tmp_path, byte_level()))
    checked(side, 300, tmp_path)
    with pytest.raises(
        ExportError, match=r"is not this model's: it turns '.*' into the token \d+ \(.*\), and the model has 200"
    ):
        checked(side, 200, tmp_path)


def test_tokens_around_a_text_count_as_well(tmp_path: Path) -> None:
    tokenizer = byte_level()
    bos = SIZE - len(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    with pytest.raises(ExportError, match=rf"into the token {bos} \('<s>'\), and the model has {bos}"):
        checked(read_text(save(tmp_path, tokenizer)), bos, tmp_path)


def test_a_chat_template_with_a_token_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, byte_level(), chat_template="<s>{{ messages[0].content }}</s>")
    last = SIZE - len(SPECIAL) + 1
    with pytest.raises(ExportError, match=rf"a conversation in the chat template default.* into the token {last}"):
        checked(read_text(folder), last, folder)


def test_an_end_that_the_model_never_gives_is_none(tmp_path: Path) -> None:
    """As where a configuration was written for another vocabulary: banning such a token would reach past the logits."""
    folder = save(tmp_path, byte_level())
    config = GenerationConfig(eos_token_id=[7, 100_000])
    side = read_text(folder, generation_config=config)
    assert side.stop_ids == (SIZE - 2, 7, 100_000)
    assert checked(side, 300, folder).stop_ids == (SIZE - 2, 7)
    with pytest.raises(ExportError, match="has eos_token_id '7', which is not a token's id"):
        read_text(folder, generation_config=GenerationConfig(eos_token_id="7"))


@pytest.mark.parametrize("said", [True, [[2]], {"a": 1}, [True], "7", 2.0, [2, None]])
def test_an_end_that_is_no_token_is_refused(tmp_path: Path, said: Any) -> None:
    config = GenerationConfig()
    config.eos_token_id = said
    with pytest.raises(ExportError, match=r"^generation_config\.json of .* has eos_token_id .*, which is not a token's id"):
        read_text(save(tmp_path, byte_level()), generation_config=config)


@pytest.mark.parametrize("ends", [None, 100_000, -1])
def test_a_model_whose_answers_never_end_is_told_of(tmp_path: Path, ends: int | None) -> None:
    folder = save(tmp_path, byte_level(), eos_token=None)
    side = checked(read_text(folder, generation_config=GenerationConfig(eos_token_id=ends)), 300, folder)
    assert side.stop_ids == ()
    assert side.notes[-1].startswith(f"no token ends an answer of {folder}: neither its tokenizer nor its generation_config")
    assert checked(read_text(folder, generation_config=GenerationConfig(eos_token_id=7)), 300, folder).notes == ()


@pytest.mark.parametrize("task", ["text-generation", "feature-extraction"])
def test_a_folder_without_a_tokenizer_is_refused_before_anything_is_built(tmp_path: Path, task: Any) -> None:
    model = tiny.write_model(tmp_path / "mine")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / name).unlink(missing_ok=True)
    engines = tmp_path / "engines"
    recipe = msgspec.structs.replace(tiny.recipe(model), task=task)
    progress = tiny.Silent()
    with pytest.raises(ExportError, match=r"mine has no tokenizer: tokenizer\.json, .* were looked for; copy "):
        tiny.exporting(engines, progress=progress).run(recipe)
    assert progress.begun == ["fetch", "load", "tokenizer"]


def test_the_command_tells_of_it_and_takes_a_template_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, own = tiny.write_model(tmp_path / "mine"), tmp_path / "own.jinja"
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "Qwen2Tokenizer"}))
    own.write_text("{{ bos_token }}{{ messages[0].content }}")
    options = [
        f"--engines={tmp_path / 'engines'}",
        f"--chat-template={own}",
        "--precision=fp32",
        "--no-verify",
        f"--text={own}",
    ]
    with tiny.tracing_once():
        assert engineshed.main(["export", str(model), *options]) == 0
    said = capsys.readouterr().err
    assert "note: tokenizer.json and transformers' Qwen2Tokenizer differ in " in said
    made = tmp_path / "engines/mine"
    assert (made / "chat_template.jinja").read_text() == own.read_text()
    assert bundle.read(made).templates == {"default": "chat_template.jinja"}
    written, published = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (made, model))
    assert [written.encode(text).ids for text in corpus.texts(published)] == [
        published.encode(text).ids for text in corpus.texts(published)
    ]
