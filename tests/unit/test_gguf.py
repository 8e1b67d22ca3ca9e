"""What a GGUF says of its model is carried over, compared or refused; its tokens are llama.cpp's own."""

import json
import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from transformers import PreTrainedModel
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS

from export import gguf_file, gguf_metadata, gguf_model, source, tokenizer
from export.errors import ExportError, UnsupportedModel
from export.gguf_file import Value
from export.gguf_metadata import ARCHITECTURE, Hyperparameters
from export.recipe import Build, ModelReference, Recipe, of
from runtime import bundle
from runtime.bundle import sha256
from runtime.ort import OrtEngine
from tests import families, gguf_page, tiny, tiny_gguf

DATA = Path(__file__).parents[1] / "data"
RECORDED: dict[str, list[dict[str, Any]]] = json.loads((DATA / "gguf_tokens.json").read_text())["kinds"]
FP32 = Build("cpu", "fp32")
NEAR, NEAR_GELU = 1e-4, 3e-3
"""By what part of itself llama.cpp's best logit may differ; its GELU is read from a table of half precision."""
GELU = {"bloom", "falcon", "gemma", "gemma2", "gemma3", "gemma4", "gpt2", "starcoder2"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the files of this module."""
    return tmp_path_factory.mktemp("gguf")


@cache
def model(path: Path) -> PreTrainedModel:
    """The model as export loads it."""
    return source.load(source.fetch(ModelReference(path=str(path)), path.parent))


def kind(name: str, folder: Path) -> Path:
    """The tiny GGUF of that kind, written once."""
    path = folder / f"{name}.gguf"
    return path if path.exists() else tiny_gguf.write(name, path)


def prompt(case: dict[str, Any]) -> list[int]:
    return tiny_gguf.Prompt(case["length"]).ids(case["salt"])


def best(reference: PreTrainedModel, case: dict[str, Any]) -> tuple[list[int], list[float]]:
    """The reference's own choice after each of llama.cpp's tokens, and its logit."""
    ids = prompt(case)
    rows = families.logits(reference, [*ids, *case["tokens"][:-1]])[len(ids) - 1 :]
    return rows.argmax(-1).tolist(), rows.max(-1).values.tolist()


# The tokens of llama.cpp ---------------------------------------------------------------------------------------------------


def test_given_the_kinds_of_files_when_counted_then_llama_cpp_was_asked_for_each() -> None:
    assert list(RECORDED) == list(tiny_gguf.KINDS)
    assert {kind.architecture for kind in tiny_gguf.KINDS.values()} == set(gguf_model.ARCHITECTURES)
    assert all(len(case["tokens"]) == tiny_gguf.TOKENS for cases in RECORDED.values() for case in cases)


@pytest.mark.parametrize("name", tiny_gguf.KINDS)
def test_given_a_gguf_when_loaded_then_its_tokens_and_logits_are_those_of_llama_cpp(name: str, files: Path) -> None:
    reference = model(kind(name, files))
    for case in RECORDED[name]:
        tokens, logits = best(reference, case)
        assert tokens == case["tokens"]
        near = NEAR_GELU if tiny_gguf.KINDS[name].architecture in GELU else NEAR
        assert logits == pytest.approx(case["best"], rel=near)


SAME = ("llama", "llama-none", "qwen2", "phi3")
"""Kinds that compute what the first one with their weights does."""
SCALED = [name for name, kind in tiny_gguf.KINDS.items() if kind.seed and name not in SAME]


@pytest.mark.parametrize("name", SCALED)
def test_given_the_same_weights_without_the_key_when_run_then_the_tokens_are_others(name: str, files: Path) -> None:
    plain = model(kind(tiny_gguf.KINDS[name].seed, files))
    assert any(best(plain, case)[0] != case["tokens"] for case in RECORDED[name])


@pytest.mark.parametrize("name", ["llama-frequencies", "granite", "gemma2", "phi3-longrope"])
def test_given_a_gguf_when_exported_then_the_engine_gives_the_tokens_of_llama_cpp(
    name: str, files: Path, tmp_path: Path
) -> None:
    path = kind(name, files)
    (tmp_path / "engines").mkdir()
    folder = tiny.exporting(tmp_path / "engines").run(Recipe("tiny", ModelReference(path=str(path)), (FP32,)))
    manifest = bundle.read(folder)
    assert (manifest.source.kind, manifest.source.name, manifest.source.sha256) == ("gguf", path.name, sha256(path))
    variant = manifest.variants[0]
    engine = OrtEngine(folder, variant, manifest.vocab_size, slots=2, context=manifest.max_length, threads=1)
    cases = RECORDED[name]
    assert families.greedy(engine, [prompt(case) for case in cases], tiny_gguf.TOKENS) == [case["tokens"] for case in cases]


# Metadata ------------------------------------------------------------------------------------------------------------------


def test_given_every_key_that_the_gguf_package_writes_when_looked_up_then_its_fate_is_known() -> None:
    assert [key for key in gguf_metadata.written() if gguf_metadata.fate(key) is None] == []
    assert "{arch}.rope.scaling.attn_factor" in gguf_metadata.written()


def test_given_every_architecture_when_interpreted_then_the_table_says_which_keys_it_takes(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: set[str] = set()

    class Recording(Hyperparameters):
        def value(self, key: str) -> Value | None:
            taken.add(key)
            return super().value(key)

    monkeypatch.setattr(gguf_model, "Hyperparameters", Recording)
    for name in tiny_gguf.KINDS:
        gguf_model.interpret(gguf_file.read(kind(name, files)))
    assert {key for key, fate in ARCHITECTURE.items() if fate.kind != "refused"} == taken


def test_given_the_tables_when_written_as_a_page_then_the_documentation_is_that_page() -> None:
    assert gguf_page.PAGE.read_text() == gguf_page.page(), "run: python -m tests.gguf_page"
    assert [line for line in gguf_page.page().splitlines() if len(line) > gguf_page.WIDTH and not line.startswith("|")] == []


@pytest.mark.parametrize("name", ["mixtral", "minimax-m2", "gpt-oss"])
def test_given_how_experts_are_chosen_when_compared_then_it_is_with_what_the_documentation_says(name: str, files: Path) -> None:
    path = kind(name, files)
    architecture = str(gguf_file.read(path).metadata["general.architecture"])
    said = ARCHITECTURE["expert_gating_func"].note
    documented: dict[str, str] = dict(pair[::-1] for pair in re.findall(r"(\d) \([^)]*\) for ([\w-]+)", said))
    right = int(documented.get(architecture, documented["others"]))
    for gating in (1, 2, 3):
        with nullcontext() if gating == right else pytest.raises(UnsupportedModel, match="where the model computes with"):
            interpreted(path, **{f"{architecture}.expert_gating_func": gating})


def interpreted(path: Path, **keys: Any) -> gguf_model.Model:
    """What `path` comes to where its metadata says `keys` too; dots are written as double underscores."""
    file = gguf_file.read(path)
    changes = {key.replace("__", "."): value for key, value in keys.items()}
    file.__dict__["metadata"] = {key: value for key, value in (dict(file.metadata) | changes).items() if value is not None}
    return gguf_model.interpret(file)


NOT_LLAMAS = sorted(
    key
    for key, fate in ARCHITECTURE.items()
    if fate.kind == "refused"
    or key in ("logit_scale", "residual_scale", "embedding_scale", "attention.scale", "attn_logit_softcapping")
    or key in ("attention.shared_kv_layers", "embedding_length_per_layer_input")
    or key in ("final_logit_softcapping", "attention.sliding_window", "attention.sliding_window_pattern")
)


@pytest.mark.parametrize("key", NOT_LLAMAS)
def test_given_a_key_that_is_not_carried_when_loaded_then_it_is_refused_by_its_name(key: str, files: Path) -> None:
    path, said = kind("llama", files), key.format(dense="dense_2")
    with pytest.raises(UnsupportedModel) as error:
        interpreted(path, **{f"llama.{said}": 3})
    assert str(error.value).startswith(f"{path} has llama.{said} = 3, which is not carried into a model of this architecture")
    for value in ARCHITECTURE[key].neutral:
        interpreted(path, **{f"llama.{said}": value})


@pytest.mark.parametrize(
    ("name", "keys", "sentence"),
    [
        (
            "llama",
            {"llama.novel_trick": 2.5},
            "has llama.novel_trick = 2.5, a key that is not known here",
        ),
        ("llama", {"llama.attention.causal": False}, "has llama.attention.causal = False where the model computes with True"),
        ("llama", {"llama.attention.value_length": 8}, "has llama.attention.value_length = 8 where the model computes with 16"),
        ("llama", {"llama.rope.dimension_count": 8}, "has llama.rope.dimension_count = 8 where the model computes with 16"),
        (
            "llama",
            {"llama.rope.freq_base_swa": 9.0},
            "llama.rope.freq_base_swa = 9.0 where the model computes with 10000.0",
        ),
        ("llama", {"llama.tensor_data_layout": "mine"}, "where the model computes with Meta AI original pth"),
        (
            "llama",
            {"llama.feed_forward_length": [96, 64]},
            "has llama.feed_forward_length = [96, 64]; layers that differ",
        ),
        ("llama", {"llama.attention.head_count_kv": [2, 4]}, "layers that differ in it are not carried over"),
        ("llama", {"llama.context_length": None}, "does not say llama.context_length"),
        ("llama", {"llama.attention.layer_norm_rms_epsilon": None}, "does not say llama.attention.layer_norm_rms_epsilon"),
        ("llama", {"llama.rope.scaling.type": "ntk"}, "scales its positions by the rule 'ntk'"),
        ("llama", {"llama.rope.scaling.type": "longrope"}, "scales its positions by longrope"),
        (
            "llama",
            {"llama.rope.scaling.attn_factor": 1.5},
            "llama.rope.scaling.attn_factor = 1.5 where the model",
        ),
        ("llama-linear", {"llama.rope.scaling.attn_factor": 1.5}, "rope.scaling.attn_factor = 1.5"),
        ("llama-yarn", {"llama.rope.scaling.yarn_beta_fast": 64.0}, "rope.scaling.yarn_beta_fast = 64.0 where"),
        ("llama-yarn", {"llama.rope.scaling.yarn_beta_slow": 2.0}, "rope.scaling.yarn_beta_slow = 2.0 where"),
        ("llama-yarn", {"llama.rope.scaling.yarn_ext_factor": 0.5}, "rope.scaling.yarn_ext_factor = 0.5 where"),
        ("llama-yarn", {"llama.rope.scaling.yarn_attn_factor": 1.0}, "rope.scaling.yarn_attn_factor = 1.0 where"),
        ("llama-yarn", {"llama.rope.scaling.yarn_log_multiplier": 0.1}, "rope.scaling.yarn_log_multiplier = 0.1"),
        ("llama-longrope", {"llama.rope.scaling.type": "linear"}, "scales its positions by the rule 'linear' in a way"),
        ("llama-longrope", {"llama.rope.scaling.factor": 4.0}, "rope.scaling.factor = 4.0 where"),
        ("mixtral", {"llama.expert_weights_scale": 2.5}, "has llama.expert_weights_scale = 2.5, which is not carried"),
        ("mixtral", {"llama.expert_gating_func": 2}, "has llama.expert_gating_func = 2 where the model computes with 1"),
        ("qwen2moe", {"qwen2moe.expert_weights_norm": True}, "has qwen2moe.expert_weights_norm = True where"),
        ("qwen3moe", {"qwen3moe.expert_used_count": [2, 3]}, "layers that differ in it are not carried over"),
        ("minimax-m2", {"minimax-m2.expert_gating_func": None}, "does not say minimax-m2.expert_gating_func"),
        ("qwen2", {"qwen2.attention.key_length": 24}, "has qwen2.attention.key_length = 24 where the model computes with 16"),
        ("gemma2", {"gemma2.rope.freq_base_swa": 9.0}, "has gemma2.rope.freq_base_swa = 9.0 where"),
        ("gemma3", {"gemma3.rope.scaling.type": "yarn"}, "scales the positions of full and sliding layers by the rule 'yarn'"),
        ("granite", {"granite.rope.scaling.finetuned": False}, "has granite.rope.scaling.finetuned = False where"),
        ("llama", {"general.type": "adapter"}, "is not a model but of the type 'adapter'"),
        ("llama", {"clip.has_vision_encoder": True}, "has the key clip.has_vision_encoder (the projector of a model"),
        ("llama", {"general.architecture": "mamba"}, "is of the architecture 'mamba', which is not read from a GGUF here"),
    ],
)
def test_given_metadata_that_the_model_does_not_compute_when_loaded_then_a_sentence_says_which(
    name: str, keys: dict[str, Any], sentence: str, files: Path
) -> None:
    with pytest.raises(UnsupportedModel) as error:
        interpreted(kind(name, files), **keys)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("llama", {"general.name": "mistral", "general.sampling.temp": 0.5, "quantize.imatrix.file": "x"}),
        ("llama", {"llama.vocab_size": 300, "llama.rope.dimension_count": 16, "llama.attention.layer_norm_epsilon": 1e-5}),
        ("llama", {"llama.tensor_data_layout": "Meta AI original pth", "llama.pooling_type": 3}),
        ("llama", {"llama.feed_forward_length": [96, 96], "llama.attention.head_count_kv": [2, 2]}),
        ("llama", {"llama.rope.scaling.finetuned": True, "llama.rope.scaling.original_context_length": 64}),
        (
            "llama-yarn",
            {"llama.rope.scaling.yarn_attn_factor": 0.1 * float(np.log(4)) + 1, "llama.rope.scaling.yarn_ext_factor": 1.0},
        ),
        ("llama-yarn", {"llama.rope.scaling.yarn_beta_fast": 32.0, "llama.rope.scaling.yarn_beta_slow": 1.0}),
        ("stablelm", {"stablelm.use_parallel_residual": True}),
    ],
)
def test_given_metadata_that_changes_no_number_when_loaded_then_the_model_is_the_same(
    name: str, keys: dict[str, Any], files: Path
) -> None:
    path = kind(name, files)
    assert interpreted(path, **keys).settings == interpreted(path).settings


OTHERS = sorted({*GGUF_CONFIG_MAPPING, *GGUF_CONFIG_ARCHS, "t5encoder"} - {"general", "tokenizer"})
"""What transformers' own reader knows, by its names."""
RENAMED = {
    "gpt_oss": "gpt-oss",
    "minimax_m2": "minimax-m2",
    "mistral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
}


@pytest.mark.parametrize("name", [name for name in OTHERS if RENAMED.get(name, name) not in gguf_model.ARCHITECTURES])
def test_given_an_architecture_that_is_read_by_transformers_alone_when_loaded_then_it_is_refused(
    name: str, files: Path
) -> None:
    assert name in ("deci", "lfm2", "mamba", "qwen35", "qwen35moe", "t5", "t5encoder", "umt5")
    with pytest.raises(UnsupportedModel, match=f"is of the architecture '{name}', which is not read from a GGUF here"):
        interpreted(kind("llama", files), **{"general.architecture": name})


def test_given_a_gguf_when_loaded_for_embeddings_then_it_has_no_head_and_every_other_weight(files: Path) -> None:
    path = kind("qwen3", files)
    whole = model(path).state_dict()
    told: list[float] = []
    headless = gguf_model.load(path, "feature-extraction", told.append)
    assert {f"model.{name}" for name in headless.state_dict()} == whole.keys() - {"lm_head.weight"}
    assert all(torch.equal(value, whole[f"model.{name}"]) for name, value in headless.state_dict().items())
    assert told == sorted(told)
    assert told[-1] == 1


def test_given_a_gemma_4_with_keys_in_layers_that_share_them_when_loaded_then_they_are_left_out(
    files: Path, tmp_path: Path
) -> None:
    spare = {"attn_k.weight": (48, 64), "attn_v.weight": (48, 64), "attn_k_norm.weight": (24,)}
    tensors = {f"blk.5.{name}": np.ones(shape, np.float32) for name, shape in spare.items()}
    path = rewritten(kind("gemma4", files), tmp_path / "model.gguf", tensors)
    case = RECORDED["gemma4"][0]
    assert best(model(path), case)[0] == case["tokens"]


def test_given_a_head_count_that_is_not_said_when_loaded_then_all_heads_have_keys_of_their_own(files: Path) -> None:
    assert interpreted(kind("llama", files), **{"llama.attention.head_count_kv": None}).settings["num_key_value_heads"] == 4


def test_given_gemma_3_27b_when_interpreted_then_its_queries_are_scaled_by_the_hidden_size_per_head(files: Path) -> None:
    path = kind("gemma3", files)
    assert interpreted(path).settings["query_pre_attn_scalar"] == 24
    assert interpreted(path, **{"gemma3.block_count": 62}).settings["query_pre_attn_scalar"] == 16


def test_given_a_phi_3_when_interpreted_then_its_window_is_the_one_in_the_file(files: Path) -> None:
    path = kind("phi3", files)
    assert interpreted(path).settings["sliding_window"] == 100
    assert interpreted(path, **{"phi3.attention.sliding_window": 0}).settings["sliding_window"] is None


def test_given_a_key_that_was_taken_twice_when_the_rest_is_refused_then_it_is_not_among_it() -> None:
    keys = Hyperparameters("llama", {"llama.block_count": 2}, Path("x.gguf"))
    assert (keys.whole("block_count"), keys.whole("block_count")) == (2, 2)
    keys.refuse_rest()


@pytest.mark.parametrize("keys", [{"attention.head_count": 0}, {"attention.head_count": "x"}, {"rope.freq_base": [1, 2]}])
def test_given_metadata_that_is_nonsense_when_loaded_then_a_sentence_says_so(
    keys: dict[str, tiny_gguf.Value], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tiny_gguf.KINDS["llama"]
    monkeypatch.setitem(tiny_gguf.KINDS, "llama", replace(plain, keys={**plain.keys, **keys}))
    path = tiny_gguf.write("llama", tmp_path / "model.gguf")
    with pytest.raises(ExportError) as error:
        source.load(source.fetch(ModelReference(path=str(path)), tmp_path))
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


# Text ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny_gguf.KINDS)
def test_given_a_gguf_with_its_own_kind_of_vocabulary_when_its_text_is_read_then_every_character_comes_back(
    name: str, files: Path
) -> None:
    path = kind(name, files)
    side = tokenizer.checked(tokenizer.read_text(path.parent, path.name), tiny_gguf.VOCAB, path)
    for text in ("Is it there?", "  two blanks,   three\n\n and Ünïcode", "\tt t"):
        assert side.tokenizer.decode(side.tokenizer.encode(text).ids) == text
    assert side.stop_ids
    assert side.notes == ()


def test_given_a_key_of_the_tokenizer_that_is_not_known_when_loaded_then_no_weight_is_read(files: Path) -> None:
    file = gguf_file.read(kind("llama", files))
    strange = replace(file, keys={**file.keys, "tokenizer.ggml.lowercase": True})
    with pytest.raises(UnsupportedModel, match=r"has the key tokenizer\.ggml\.lowercase, which is not known here"):
        gguf_model.interpret(strange)


# Tensors -------------------------------------------------------------------------------------------------------------------


def rewritten(path: Path, target: Path, tensors: Mapping[str, tiny_gguf.Array | None]) -> Path:
    """`path` with tensors added, replaced or (None) left out."""
    reader = gguf.GGUFReader(path)
    writer = GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kinds = field.types
            writer.add_key_value(name, field.contents(), kinds[0], kinds[-1] if len(kinds) > 1 else None)
    held = {tensor.name: np.array(tensor.data) for tensor in reader.tensors} | dict(tensors)
    for name, values in held.items():
        if values is not None:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


ONES = np.ones(8, np.float32)


@pytest.mark.parametrize(
    ("name", "tensors", "sentence"),
    [
        (
            "llama",
            {"blk.0.attn_gate.weight": ONES},
            "holds blk.0.attn_gate.weight, which a model of the architecture llama",
        ),
        ("llama", {"blk.0.ffn_up.scale": ONES, "x.weight": ONES}, "holds blk.0.ffn_up.scale and 1 more tensors, which"),
        ("llama", {"blk.0.attn_norm.bias": ONES}, "has no place for (model.layers.0.input_layernorm.bias)"),
        ("llama", {"blk.2.attn_norm.weight": ONES}, "has no place for (model.layers.2.input_layernorm.weight)"),
        (
            "llama",
            {"blk.0.attn_norm.weight": None},
            "lacks 1 of the weights that LlamaForCausalLM has (model.layers.0.in",
        ),
        ("llama", {"token_embd.weight": None}, "lacks token_embd.weight"),
        (
            "llama",
            {"blk.0.attn_norm.weight": ONES},
            "layernorm.weight has the shape (8,), by the metadata it is (64,)",
        ),
        ("llama", {"token_embd.weight": np.ones((9, 64), np.float32)}, "embeddings for 9 tokens and a vocabulary of 261;"),
        ("llama", {"rope_freqs.weight": ONES[:4]}, "rope_freqs.weight has 4 numbers for 8 frequencies"),
        ("llama-longrope", {"rope_factors_short.weight": None}, "scales its positions by longrope, but not with just"),
        ("llama-longrope", {"rope_freqs.weight": ONES}, "scales its positions by longrope, but not with just"),
        (
            "qwen3",
            {"rope_freqs.weight": ONES},
            "holds rope_freqs.weight, which llama.cpp does not read for",
        ),
        ("mixtral", {"blk.1.ffn_up_exps.weight": None}, "lacks 1 of the weights that MixtralForCausalLM has"),
        ("gemma2", {"output.weight": ONES}, "holds output.weight, which a model of the architecture gemma2 has no place for"),
    ],
)
def test_given_tensors_that_the_model_has_not_or_lacks_when_loaded_then_a_sentence_names_them(
    name: str, tensors: dict[str, Any], sentence: str, files: Path, tmp_path: Path
) -> None:
    path = rewritten(kind(name, files), tmp_path / "model.gguf", tensors)
    with pytest.raises(ExportError) as error:
        source.load(source.fetch(ModelReference(path=str(path)), tmp_path))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


# Files in parts ------------------------------------------------------------------------------------------------------------


def split(folder: Path) -> list[Path]:
    """The llama of tests/tiny_gguf.py in parts of 8 tensors."""
    folder.mkdir()
    kind = tiny_gguf.KINDS["llama"]
    plain = gguf.GGUFReader(tiny_gguf.write("llama", folder / "whole.gguf"))
    writer = GGUFWriter(folder / "My Model.gguf", kind.architecture, split_max_tensors=8)
    for name, field in plain.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for tensor in plain.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / "whole.gguf").unlink()
    return sorted(folder.iterdir())


def test_given_a_gguf_in_parts_when_loaded_by_any_of_them_then_it_is_the_whole_model(files: Path, tmp_path: Path) -> None:
    parts = split(tmp_path / "parts")
    assert [part.name for part in parts] == [f"My Model-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    whole = model(kind("llama", files)).state_dict()
    for given in (parts[0], parts[2], parts[0].parent):
        checkpoint = source.fetch(ModelReference(path=str(given)), tmp_path)
        assert checkpoint.path == parts[0]
        assert checkpoint.source.name == parts[0].name
        assert all(torch.equal(value, whole[name]) for name, value in source.load(checkpoint).state_dict().items())
    named = source.fetch(ModelReference(path=str(parts[0].parent), file=parts[1].name), tmp_path)
    assert named.path == parts[0]
    text = tokenizer.read_text(named.folder, named.gguf_file)
    assert text.tokenizer.decode(text.tokenizer.encode("Is it there?").ids) == "Is it there?"


def test_given_a_gguf_in_parts_when_fetched_then_its_digest_is_of_all_of_them(tmp_path: Path) -> None:
    parts = split(tmp_path / "parts")
    before = source.fetch(ModelReference(path=str(parts[0])), tmp_path).source.sha256
    changed = bytearray(parts[2].read_bytes())
    changed[-1] ^= 1
    parts[2].write_bytes(changed)
    assert source.fetch(ModelReference(path=str(parts[0])), tmp_path).source.sha256 != before


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_given_a_part_that_is_not_there_when_fetched_then_a_sentence_names_it(lost: int, tmp_path: Path) -> None:
    parts = split(tmp_path / "parts")
    parts[lost].unlink()
    for given in (parts[lost - 1], parts[0].parent):
        with pytest.raises(ExportError) as error:
            source.fetch(ModelReference(path=str(given)), tmp_path)
        assert str(error.value) == (
            f"{parts[0].parent} lacks 1 of the 3 parts of My Model ({parts[lost].name}); fetch them too, into the same folder"
        )


def test_given_parts_of_other_places_when_loaded_then_they_are_refused(tmp_path: Path) -> None:
    parts = split(tmp_path / "parts")
    kept = parts[1].read_bytes()
    parts[1].write_bytes(parts[2].read_bytes())
    parts[2].write_bytes(kept)
    with pytest.raises(ExportError, match="says that it is part 3 of 3, its name that it is part 2 of 3; give the parts"):
        source.load(source.fetch(ModelReference(path=str(parts[0])), tmp_path))


@pytest.mark.parametrize("told", [True, False], ids=["counted", "not counted"])
def test_given_a_tensor_in_two_parts_when_loaded_then_it_is_refused_by_its_name(told: bool, tmp_path: Path) -> None:
    kind = tiny_gguf.KINDS["llama"]
    whole = gguf.GGUFReader(tiny_gguf.write("llama", tmp_path / "whole.gguf"))
    held = [tensor.name for tensor in whole.tensors]
    for part, names in enumerate((held, ["token_embd.weight"])):
        writer = GGUFWriter(tmp_path / f"x-0000{part + 1}-of-00002.gguf", kind.architecture)
        for name, field in whole.fields.items() if part == 0 else ():
            if not name.startswith("GGUF.") and name != "general.architecture":
                writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
        writer.add_uint16("split.no", part)
        writer.add_uint16("split.count", 2)
        if told:
            writer.add_int32("split.tensors.count", len(held) + 1)
        for name in names:
            writer.add_tensor(name, np.zeros((tiny_gguf.VOCAB, 64), np.float32) if part else np.array(tensor_of(whole, name)))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    first = tmp_path / "x-00001-of-00002.gguf"
    with pytest.raises(ExportError, match=r"^the parts of .* hold token_embd\.weight more than once"):
        source.load(source.fetch(ModelReference(path=str(first)), tmp_path))


def tensor_of(reader: gguf.GGUFReader, name: str) -> Any:
    return next(tensor.data for tensor in reader.tensors if tensor.name == name)


def test_given_one_part_under_a_name_of_its_own_when_loaded_then_it_is_refused(tmp_path: Path) -> None:
    part = split(tmp_path / "parts")[0].rename(tmp_path / "model.gguf")
    with pytest.raises(ExportError, match="says that it is part 1 of 3, its name that it is part 1 of 1"):
        source.load(source.fetch(ModelReference(path=str(part)), tmp_path))


def test_given_a_gguf_in_parts_when_named_on_the_command_line_then_the_bundle_has_the_models_name(tmp_path: Path) -> None:
    parts = split(tmp_path / "parts")
    assert of(str(parts[1]), None, None, (FP32,)).name == "my-model"


@pytest.mark.parametrize("number", [0, 1])
def test_given_a_part_that_is_a_link_out_of_the_folder_when_fetched_then_it_is_refused_unless_it_was_named_itself(
    tmp_path: Path, number: int
) -> None:
    parts = split(tmp_path / "parts")
    outside = parts[number].rename(tmp_path / "outside.gguf")
    parts[number].symlink_to(outside)
    folder = parts[0].parent
    for given in (
        ModelReference(path=str(parts[2])),
        ModelReference(path=str(folder)),
        *(ModelReference(path=str(folder), file=part.name) for part in parts),
    ):
        with pytest.raises(ExportError) as error:
            source.fetch(given, tmp_path)
        assert "leads out of the model's folder (to " in str(error.value)
        assert str(outside) in str(error.value)
    assert source.fetch(ModelReference(path=str(parts[number])), tmp_path).path == parts[0]


@pytest.mark.parametrize("name", ["whole.gguf", "deep/whole.gguf"])
def test_given_a_recipes_file_that_is_a_link_out_of_the_folder_when_fetched_then_it_is_refused(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "outside").mkdir()
    tiny_gguf.write("llama", tmp_path / "outside" / "whole.gguf")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "deep").symlink_to(tmp_path / "outside")
    (tmp_path / "model" / "whole.gguf").symlink_to("deep/whole.gguf")
    with pytest.raises(ExportError, match=r"leads out of the model's folder \(to .*outside/whole.gguf\)"):
        source.fetch(ModelReference(path=str(tmp_path / "model"), file=name), tmp_path)
    with pytest.raises(ExportError, match=r"leads out of the model's folder \(to .*outside\)"):
        source.fetch(ModelReference(path=str(tmp_path / "model"), file="deep"), tmp_path)


def test_given_a_gguf_that_is_itself_a_link_when_named_by_its_path_then_it_is_followed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "m.gguf").symlink_to(tiny_gguf.write("llama", tmp_path / "blobs" / "0123"))
    assert source.fetch(ModelReference(path=str(tmp_path / "m.gguf")), tmp_path).path == tmp_path / "m.gguf"


def test_given_parts_in_a_hub_snapshot_when_fetched_then_their_links_into_its_blobs_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    (snapshot / "Q4").mkdir(parents=True)
    parts = split(blobs)
    links = [snapshot / "Q4" / part.name for part in parts]
    for link, part in zip(links, parts, strict=True):
        link.symlink_to(Path("../../../blobs") / part.name)
    for given in (
        ModelReference(path=str(links[1])),
        ModelReference(path=str(snapshot), file=f"Q4/{links[1].name}"),
    ):
        assert source.fetch(given, tmp_path).path == links[0]
