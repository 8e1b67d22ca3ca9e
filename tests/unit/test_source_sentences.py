"""What cannot be exported is refused in one sentence that says what it is and what to do, before anything is loaded or
built.
"""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import (
    Mistral3Config,
    PreTrainedConfig,
    Qwen2AudioConfig,
    Qwen2VLConfig,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import engineshed
from export import cli, decoder, library_messages, recipe, sentence, source
from export.errors import ExportError
from export.recipe import Build, ModelReference
from tests import tiny

LLAMA = '{"model_type": "llama"}'
FP32 = Build("cpu", "fp32")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 269060552\n"


@pytest.fixture
def model(tmp_path: Path, tiny_model: Path) -> Path:
    """The tiny model in a folder to be changed."""
    return shutil.copytree(tiny_model, tmp_path / "mine")


def refused(model: Path | str, **options: Any) -> str:
    """The sentence with which loading `model`, as the command line names it, ends."""
    reference = recipe.of(str(model), "name", None, (FP32,)).model
    with pytest.raises(ExportError) as error:
        source.load(source.fetch(reference, Path("cache")), **options)
    sentence = str(error.value)
    assert "\n" not in sentence
    return sentence


def configure(folder: Path, **entries: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


# What a folder holds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer.model", "vocab.txt"])
def test_given_a_git_lfs_pointer_when_fetched_then_it_is_named(model: Path, name: str) -> None:
    (model / name).write_text(POINTER)
    with pytest.raises(ExportError) as error:  # before anything is hashed
        source.fetch(ModelReference(path=str(model)), Path("cache"))
    assert str(error.value) == (
        f"{model / name} is a git-lfs pointer, a few lines in the place of the file; run `git lfs install` and `git lfs pull` "
        f"in {model}, or fetch the model with `hf download`"
    )


@pytest.mark.parametrize("kind", ["sharded", "pickled", "pickled shards", "named"])
def test_given_a_git_lfs_pointer_for_weights_of_another_form_when_fetched_then_it_is_named(model: Path, kind: str) -> None:
    files = {
        "sharded": ("model-00001-of-00001.safetensors", "model.safetensors.index.json"),
        "pickled": ("pytorch_model.bin", None),
        "pickled shards": ("pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"),
        "named": ("weights.safetensors", None),
    }
    name, index = files[kind]
    (model / "model.safetensors").unlink()
    (model / name).write_text(POINTER)
    if index is not None:
        (model / index).write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": name}}))
    if kind == "named":
        configure(model, transformers_weights=name)
    assert f"{model / name} is a git-lfs pointer" in refused(model)


def test_given_git_lfs_pointers_in_files_that_are_not_loaded_when_loaded_then_the_model_is(model: Path) -> None:
    others = "onnx/model.onnx original/consolidated.00.pth consolidated.safetensors assets/cat.png mine-Q4_K_M.gguf x.bin"
    for name in others.split():
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(POINTER)
    source.load(source.fetch(ModelReference(path=str(model)), Path("cache")))


@pytest.mark.parametrize("name", ["1_Pooling/config.json", "2_Dense/model.safetensors"])
def test_given_a_git_lfs_pointer_in_a_module_of_sentence_transformers_when_read_then_it_is_named(
    tmp_path: Path, name: str
) -> None:
    modules = [{"path": path, "type": f"x.{path.partition('_')[2] or 'Transformer'}"} for path in ("", "1_Pooling", "2_Dense")]
    dense = {"in_features": 4, "out_features": 4, "activation_function": "torch.nn.modules.linear.Identity"}
    contents = {"modules.json": modules, "1_Pooling/config.json": {"pooling_mode": "mean"}, "2_Dense/config.json": dense}
    for path, content in contents.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(json.dumps(content))
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(ExportError, match="is a git-lfs pointer") as error:
        sentence.read(tmp_path, None)
    assert str(error.value).startswith(str(tmp_path / name))


def test_given_a_git_lfs_pointer_for_a_gguf_when_fetched_then_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text(POINTER)
    assert f"{tmp_path / 'model.gguf'} is a git-lfs pointer" in refused(tmp_path / "model.gguf")
    assert f"{tmp_path / 'model.gguf'} is a git-lfs pointer" in refused(tmp_path)


def test_given_an_adapter_when_fetched_then_its_base_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/base", "peft_type": "LORA"}')
    (tmp_path / "adapter_model.safetensors").touch()
    said = refused(tmp_path)
    assert said.startswith(
        f"{tmp_path} holds an adapter (LoRA) for someone/base, not a model; merge it into someone/base first ("
    )


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"model_index.json": "{}"}, "is a diffusion pipeline, which makes images"),
        ({"model.onnx": ""}, "holds a model in ONNX (model.onnx)"),
        ({"onnx/model.onnx": "", "config.json": LLAMA}, "holds a model in ONNX"),
        ({"params.json": "{}", "consolidated.00.pth": ""}, "holds a model in its authors' own format (params.json)"),
        ({"mmproj-x.gguf": ""}, "has no language model, only what reads images for one (mmproj)"),
        ({"a.gguf": "", "b.gguf": ""}, "several GGUF files (a.gguf, b.gguf); name one file"),
        ({"v1/config.json": "{}", "v2/config.json": "{}"}, "has no config.json, but v1, v2 in it does; name that folder"),
        ({"notes.txt": "hello"}, "has no config.json and no GGUF file; a model is a folder with"),
        ({"config.json": LLAMA, "tf_model.h5": ""}, "has weights for TensorFlow only (tf_model.h5)"),
        ({"config.json": LLAMA, "flax_model.msgpack": ""}, "has weights for Flax only (flax_model.msgpack)"),
        ({"config.json": LLAMA, "x.gguf": ""}, "has no model.safetensors, but x.gguf; name that file to"),
        ({"config.json": LLAMA, "x.safetensors": ""}, "it has x.safetensors, which transformers would not"),
        ({"config.json": LLAMA}, "has a config.json but no weights"),
        ({"config.json": "[1, 2]"}, "config.json is not a model's configuration: it holds a list, not an object"),
        ({"config.json": "{}"}, "config.json is empty"),
        ({"config.json": "model"}, "config.json is not valid JSON"),
        ({"config.json": "[" * 100_000}, "config.json is not valid JSON"),
        ({"config.json": '{"hidden_size": 64}'}, "config.json does not say of which kind the model is (model_type)"),
        ({"config.json": '{"_class_name": "UNet", "_diffusers_version": "1"}'}, "is a part of a diffusion pipeline (UNet)"),
        ({"config.json": LLAMA, "model.safetensors": "no"}, "is cut off or not a safetensors file"),
        (
            {"config.json": LLAMA, "shard-00001-model-00001-of-00001.safetensors": ""},
            "holds a distributed checkpoint",
        ),
    ],
)  # fmt: skip
def test_given_a_folder_that_is_no_model_when_loaded_then_it_is_told_what_it_is(
    tmp_path: Path, files: dict[str, str], said: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert said in refused(tmp_path)


def test_given_a_gguf_beside_what_reads_images_when_fetched_then_the_model_is_taken(tmp_path: Path) -> None:
    (tmp_path / "mmproj-x.gguf").write_text("a")
    (tmp_path / "x.gguf").write_text("b")
    assert source.fetch(ModelReference(path=str(tmp_path)), tmp_path / "cache").gguf_file == "x.gguf"


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (
            {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}},
            "lacks model-00001-of-00002.safetensors, which its model.saf",
        ),
        ({"weight_map": {}}, "does not say which file holds which weight"),
        ([], "does not say which file holds which weight"),
    ],
)
def test_given_an_index_that_is_not_complete_when_loaded_then_it_is_refused(model: Path, index: object, said: str) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert said in refused(model)


def test_given_weights_of_which_the_end_is_missing_when_loaded_then_both_sizes_are_told(model: Path) -> None:
    path = model / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    assert f"{path} is cut off: it has {size - 1} bytes where its header declares {size}" in refused(model)


def test_given_a_weight_file_in_a_models_folder_when_fetched_then_the_folder_is_named(model: Path) -> None:
    path = model / "model.safetensors"
    assert refused(path) == f"{path} is not a GGUF file; give its folder, {model}, or a .gguf file"


# What kind of model it is -------------------------------------------------------------------------------------------------


def test_given_a_model_of_another_kind_when_loaded_then_it_is_named(tmp_path: Path) -> None:
    T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=32, d_ff=48, num_layers=1, num_heads=2)).save_pretrained(
        tmp_path / "t5"
    )
    vit = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=32)
    ViTForImageClassification(vit).save_pretrained(tmp_path / "vit")
    for name, kind in (("t5", "T5"), ("vit", "ViT")):
        assert refused(tmp_path / name).startswith(
            f"{name} is not a causal LM that transformers can load: a {kind} is not a decoder that continues text"
        )


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (Mistral3Config(), "a Mistral3 reads images beside text, and only models of text alone can be exported"),
        (Qwen2VLConfig(), "a Qwen2VL reads images beside text, and only models of text alone can be exported"),
        (Qwen2AudioConfig(), "a Qwen2Audio hears sound beside text, and only models of text alone can be exported"),
    ],
    ids=["Mistral 3", "Qwen2-VL", "Qwen2-Audio"],
)
def test_given_a_model_that_reads_more_than_text_when_loaded_then_it_is_said(
    model: Path, config: PreTrainedConfig, said: str
) -> None:
    (model / "config.json").write_text(config.to_json_string())
    assert refused(model) == f"mine is not a causal LM that transformers can load: {said}; give one of those"


def test_given_a_generation_config_that_transformers_cannot_read_when_loaded_then_it_is_named(model: Path) -> None:
    path = model / "generation_config.json"
    path.write_text(json.dumps({"watermarking_config": {"a": 1}}))
    said = refused(model)
    assert said.startswith(f"{path} cannot be read by transformers (")
    assert said.endswith("); correct that entry, or remove the file")


def test_given_an_unknown_type_when_loaded_then_it_is_named(model: Path) -> None:
    configure(model, model_type="of-tomorrow")
    assert "its model type 'of-tomorrow' is unknown to transformers 5" in refused(model)


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        ({"rope_type": "dynamic"}, "Missing required keys in `rope_parameters` for 'rope_type'='dynamic': {'factor'}"),
        ({"rope_type": "nonsense"}, "nonsense (Missing validation function in 'RotaryEmbeddingConfigMixin' for"),
        ({"rope_type": "yarn", "factor": "x"}, "`rope_parameters`'s factor field must be a float or int >= 1, got x"),
    ],
)
def test_given_a_configuration_that_contradicts_itself_when_loaded_then_the_entry_is_named(
    model: Path, rope: dict[str, Any], said: str
) -> None:
    configure(model, rope_parameters=rope | {"rope_theta": 10000.0})
    assert said in refused(model)


@pytest.mark.parametrize("entry", [{"num_attention_heads": 0}, {"hidden_act": "x"}, {"hidden_size": "64"}, {"vocab_size": -1}])
def test_given_an_entry_that_makes_no_model_when_loaded_then_it_is_one_sentence(model: Path, entry: dict[str, Any]) -> None:
    configure(model, **entry)
    refused(model)


def test_given_a_trace_that_fails_when_exported_then_only_its_sentence_is_shown(
    tmp_path: Path, model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    configure(model, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    assert export(model, "--engines", tmp_path / "engines", "--precision", "fp32") in (0, 1)
    out, shown = capfd.readouterr()
    stages = re.compile(r"  \S.*\d\.\d s  |Exporting |  note: |.* is ready in ")
    others = [line for line in shown.splitlines() if not stages.match(line)]
    assert [line for line in others if not line.startswith("engineshed: ")] == []
    assert out == ""


# Weights that a target's numbers do not hold ------------------------------------------------------------------------------


def test_given_a_weight_beyond_float16_when_taken_there_then_it_is_named_with_its_size() -> None:
    made = tiny.random_model()
    with torch.no_grad():
        made.model.layers[1].mlp.up_proj.weight[3, 4] = -70_000.0
    with pytest.raises(ExportError) as error:
        decoder.in_dtype(made, torch.float16)
    assert str(error.value) == (
        "the weights of LlamaForCausalLM do not fit into float16: model.layers.1.mlp.up_proj.weight reaches 70,000, which ends "
        "at "
        "65,504; give --precision bf16, or a target for the CPU"
    )
    assert decoder.in_dtype(made, torch.bfloat16).dtype == torch.bfloat16


# What the command line says -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "reference"),
    [
        ("https://huggingface.co/Qwen/Qwen3-0.6B", ModelReference(hub="Qwen/Qwen3-0.6B")),
        ("https://hf.co/Qwen/Qwen3-0.6B/", ModelReference(hub="Qwen/Qwen3-0.6B")),
        ("https://huggingface.co/a/b/tree/v1.0", ModelReference(hub="a/b", revision="v1.0")),
        ("https://huggingface.co/a/b/tree/refs%2Fpr%2F1", ModelReference(hub="a/b", revision="refs/pr/1")),
        ("https://huggingface.co/a/b/blob/main/x/y.gguf", ModelReference(hub="a/b", revision="main", file="x/y.gguf")),
        (
            "https://huggingface.co/a/b/resolve/main/y.gguf?download=true",
            ModelReference(hub="a/b", revision="main", file="y.gguf"),
        ),
        ("https://huggingface.co/a/b/blob/main/config.json", ModelReference(hub="a/b", revision="main")),
    ],
)
def test_given_the_address_of_a_model_when_read_then_it_is_the_hubs(given: str, reference: ModelReference) -> None:
    assert recipe.of(given, None, None, (FP32,)).model == reference


@pytest.mark.parametrize(
    "given",
    [
        "https://example.com/a/b",
        "https://huggingface.co/datasets/a/b",
        "https://huggingface.co/a",
        "ftp://x",
        "https://huggingface.co/../b",
        "http://[::1",
        "https://[x]/a/b",
    ],
)
def test_given_another_address_when_read_then_it_is_refused(given: str) -> None:
    with pytest.raises(ExportError, match="is not the address of a model on the Hugging Face hub"):
        recipe.of(given, None, None, (FP32,))


@pytest.mark.parametrize(
    ("name", "expected"), [("My Model!", "my-model"), ("Modèle.v2", "modele.v2"), ("模型-7b", "7b"), ("x" * 200, "x" * 100)]
)
def test_given_a_folder_of_any_name_when_read_then_the_bundle_is_named_after_it(
    tmp_path: Path, name: str, expected: str
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    assert recipe.of(str(folder), None, None, (FP32,)).name == expected


def test_given_this_folder_when_read_then_its_own_name_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    monkeypatch.chdir(model)
    wanted = recipe.of(".", None, None, (FP32,))
    assert wanted.name == "mine"
    assert source.fetch(wanted.model, tmp_path).source.name == "mine"
    (model / "sub").mkdir()
    monkeypatch.chdir(model / "sub")
    assert recipe.of("..", None, None, (FP32,)).name == "mine"


@pytest.mark.parametrize("name", ["模型", "!!"])
def test_given_a_name_of_which_nothing_remains_when_read_then_another_is_asked_for(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ExportError, match=r"no bundle can be named after .* give a name with --name"):
        recipe.of(str(tmp_path / name), None, None, (FP32,))
    assert recipe.of(str(tmp_path / name), "mine", None, (FP32,)).name == "mine"


@pytest.mark.parametrize("given", ["./mien", "models/mien", "mien.gguf", "/nowhere/at/all", "a/b/c", "mien/"])
def test_given_a_path_that_is_not_there_when_read_then_it_is_not_taken_for_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert recipe.of(given, None, None, (FP32,)).model.hub is None
    said = refused(given)
    assert said.startswith(f"there is no {Path(given)}")
    assert ("or a hub id (https://huggingface.co/models/mien if the hub's is meant)" in said) == (given == "models/mien")


@pytest.mark.parametrize("there", ["", "Qwen3-1.7B", "Qwen3-0.6B-FP8", "unlike"])
@pytest.mark.parametrize("file", ["", "Qwen3-0.6B-Q8_0.gguf"])
def test_given_a_folder_of_an_organizations_name_when_read_then_a_model_that_is_not_in_it_is_the_hubs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str, file: str
) -> None:
    (tmp_path / "Qwen" / there).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    wanted = recipe.of("Qwen/Qwen3-0.6B" + (f":{file}" if file else ""), None, None, (FP32,)).model
    assert wanted == ModelReference(hub="Qwen/Qwen3-0.6B", file=file or None)
    (tmp_path / "Qwen" / "Qwen3-0.6B").mkdir()
    assert recipe.of("Qwen/Qwen3-0.6B", None, None, (FP32,)).model == ModelReference(path="Qwen/Qwen3-0.6B")


def test_given_a_typo_in_a_folders_name_when_fetched_then_the_folder_is_offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert refused("./mien").startswith("there is no mien (did you mean mine?); a model is a folder")
    assert refused(tmp_path / "mein").startswith(f"there is no {tmp_path / 'mein'} (did you mean {model}?); a model")
    said = refused("mien")
    assert said.startswith(
        "there is no folder or file mien here (did you mean mine?), and it could not be fetched from the hub"
    )
    assert "cache" not in said


def export(*arguments: str | Path) -> int:
    return engineshed.main(["export", *map(str, arguments)])


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda path: path.write_text(""), "{path} cannot be written: {path} is a file; give a folder with --engines"),
        (lambda path: path.symlink_to("/dev/full"), "{path} cannot be written: {path} is a file; give a folder with --engines"),
        (lambda path: path.symlink_to("/proc"), "{path} cannot be written: "),
        (
            lambda path: path.symlink_to("nowhere"),
            "{path} cannot be written: {path} is a link that leads nowhere; give a folder",
        ),
    ],
    ids=["a file", "a device", "not writable", "a link to nothing"],
)
def test_given_engines_that_cannot_be_written_when_exported_then_nothing_is_loaded_first(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str], prepare: Callable[[Path], object], said: str
) -> None:
    path = tmp_path / "engines"
    prepare(path)
    assert export(tiny_model, "--engines", path) == 1
    *before, last = capsys.readouterr().err.splitlines()
    assert last.startswith("engineshed: " + said.format(path=path))
    assert not [line for line in before if "load" in line]


@pytest.mark.parametrize(
    "arguments",
    [
        ("{long}",),
        ("./{long}",),
        ("{model}", "--engines", "{engines}/{long}"),
        ("{model}", "--engines", "{engines}/{long}/below"),
        ("--recipe", "{recipe}"),
        ("{circle}",),
        ("{model}", "--engines", "{circle}"),
    ],
)
def test_given_a_path_that_cannot_be_looked_up_when_exported_then_a_sentence_says_so(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    long, engines = "a" * 300, tmp_path / "engines"
    circle, written = tmp_path / "circle", tmp_path / "recipe.toml"
    circle.symlink_to(circle)
    written.write_text(f'name = "tiny"\n[model]\npath = "{model}"\nfile = "{long}.gguf"\n')
    known = {"long": long, "engines": engines, "model": model, "recipe": written, "circle": circle}
    assert export("--engines", engines, *(argument.format(**known) for argument in arguments)) == 1
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("engineshed: ")
    assert " cannot be looked up (" in last
    assert last.endswith("); correct the path, or the rights of the folders that it leads through")
    assert not engines.exists()


def test_given_a_user_who_is_not_there_when_a_path_is_read_then_a_sentence_says_so() -> None:
    said = "^~nobody-of-this-name/x begins with a user's home that cannot be found; write the path out$"
    with pytest.raises(ExportError, match=said):
        recipe.of("~nobody-of-this-name/x", None, None, (FP32,))
    with pytest.raises(ExportError, match=said):
        source.fetch(ModelReference(path="~nobody-of-this-name/x"), Path("cache"))


def test_given_a_null_byte_in_a_path_when_fetched_then_a_sentence_says_so(model: Path) -> None:
    for reference in (ModelReference(path="a\0b"), ModelReference(path=str(model), file="a\0b")):
        with pytest.raises(ExportError, match=r"cannot be looked up \(embedded null byte\)"):
            source.fetch(reference, Path("cache"))


def without_rights(*arguments: str | Path) -> list[str]:
    """What `engineshed export` says on stderr as a user whom the files' modes bind, which the superuser is not by itself."""
    line = [sys.executable, "-m", "engineshed", "export", *map(str, arguments)]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("nobody but the superuser is here, and no setpriv")
        line = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *line]
    done = subprocess.run(line, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    return done.stderr.splitlines()


@pytest.mark.parametrize(
    ("closed", "arguments", "named"),
    [
        ("mine", ("{place}/mine",), "{place}/mine/config.json"),
        ("closed", ("{place}/closed/model",), "{place}/closed/model"),
        ("closed", ("{place}/mine", "--engines", "{place}/closed/engines"), "{place}/closed/engines"),
        ("engines/mine", ("{place}/mine",), "{place}/engines/mine/bundle.json"),
    ],
)
def test_given_a_folder_that_may_not_be_entered_when_exported_then_a_sentence_says_so(
    tmp_path: Path, model: Path, closed: str, arguments: tuple[str, ...], named: str
) -> None:
    (tmp_path / closed).mkdir(parents=True, exist_ok=True)
    (tmp_path / closed).chmod(0)
    try:
        *_, last = without_rights(
            "--engines", tmp_path / "engines", *(argument.format(place=tmp_path) for argument in arguments)
        )
    finally:
        (tmp_path / closed).chmod(0o700)
    assert last == (
        f"engineshed: {named.format(place=tmp_path)} cannot be looked up (Permission denied); correct the path, or the rights "
        "of the folders that it leads through"
    )


@pytest.mark.parametrize("option", ["--engines", "--cache", "--text", "--recipe"])
def test_given_an_empty_path_for_an_option_when_exported_then_it_is_not_taken_for_this_folder(
    capsys: pytest.CaptureFixture[str], option: str
) -> None:
    with pytest.raises(SystemExit):
        export("./model", option, "")
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"argument {option}: the path is empty (`.` is this folder)")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("",), "MODEL is empty; give a hub id (ORG/NAME), a folder or a .gguf file (`.` is this folder)"),
        (("./m", "--chat-template", ""), "recipe 'm': chat_template is empty; give one, or leave it out"),
        (("a/m", "--revision", ""), "recipe 'm': revision is empty; give one, or leave it out"),
        (("./m", "--name", ""), "bundle name '': use small letters, digits, '.', '_' and '-'; begin with a letter or digit"),
        (
            ("--recipe", "{recipe}", "--name", ""),
            "bundle name '': use small letters, digits, '.', '_' and '-'; begin with a letter or digit",
        ),
        (
            (
                "--recipe",
                "{empty}",
            ),
            "recipe 'm': path is empty; give one, or leave it out",
        ),
    ],
)
def test_given_an_empty_word_when_exported_then_it_is_not_taken_for_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    for name, path in (("recipe", "x"), ("empty", "")):
        (tmp_path / name).write_text(f'name = "m"\n[model]\npath = "{path}"\n')
    known = {"recipe": tmp_path / "recipe", "empty": tmp_path / "empty"}
    assert export(*(argument.format(**known) for argument in arguments)) == 1
    assert capsys.readouterr().err == f"engineshed: {said}\n"


def test_given_names_with_controls_for_the_terminal_when_shown_then_they_are_written_out(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "a\x1b]0;owned\x07\nengines/m is \u202eready\x9b2J"
    path = model / "model.safetensors"
    save_file(load_file(path) | {name: torch.ones(1)}, path, metadata={"format": "pt"})
    assert export(model, "--engines", model.parent / "engines") == 1
    said = capsys.readouterr().err
    assert all(line.isprintable() for line in said.splitlines())
    assert r"(a\x1b]0;owned\x07\nengines/m is \u202eready\x9b2J, for one)" in said


def test_given_notes_with_controls_for_the_terminal_when_reported_then_they_are_written_out() -> None:
    screen = io.StringIO()
    with cli.Report(Console(file=screen, force_terminal=True, width=200)) as report:
        report.begin("load\x1b[2J")
        report.advance("load\x1b[2J", 0.5)
        report.end("load\x1b[2J", 1.0, "a model\x1b[2J\r[red]:smile:")
        report.notice("of note\x1b[2J\nengines/m is ready")
    shown = screen.getvalue()
    assert "\x1b[2J" not in shown
    assert r"a model\x1b[2J\r[red]:smile:" in shown
    assert r"of note\x1b[2J\nengines/m is ready" in shown


# What libraries say -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "kept"),
    [
        ("Weights could not be tied. Please set `tie_word_embeddings`.", "Weights could not be tied."),
        ("Sliding window is ignored.\nYou can use another attention.", "Sliding window is ignored."),
        ("Please install X.", "Please install X."),
        ("word " * 100, ("word " * 100)[:297].rstrip() + "..."),
    ],
)
def test_given_a_librarys_message_when_told_then_its_advice_is_left_out(message: str, kept: str) -> None:
    assert library_messages.in_few_words(message) == kept


def test_given_chatter_when_told_then_what_concerns_the_model_remains_once() -> None:
    heard = ["`torch_dtype` is deprecated! Use `dtype` instead!", "The weights differ.", "The weights differ."]
    assert library_messages.concerning(heard) == ["The weights differ."]


def test_given_an_unsupported_model_when_refused_then_no_librarys_advice_is_in_it(model: Path) -> None:
    configure(model, model_type="of-tomorrow")
    said = refused(model)
    assert "pip install" not in said
    assert "If you" not in said


# Files that libraries stumble over -----------------------------------------------------------------------------------------


def test_given_a_configuration_with_a_byte_order_mark_when_loaded_then_it_is_told(model: Path) -> None:
    content = (model / "config.json").read_bytes()
    (model / "config.json").write_bytes(b"\xef\xbb\xbf" + content)
    assert f"{model / 'config.json'} begins with a byte order mark" in refused(model)


def test_given_an_index_without_metadata_when_loaded_then_it_is_told(model: Path) -> None:
    names = list(safetensors.torch.load_file(model / "model.safetensors"))
    (model / "model.safetensors").rename(model / "m.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, "m.safetensors")}))
    assert 'has no "metadata"' in refused(model)


def test_given_an_index_with_a_name_that_no_file_can_have_when_loaded_then_it_is_one_sentence(model: Path) -> None:
    (model / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"a": "x" * 300}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"lacks {'x' * 80}, which its model.safetensors.index.json names" in refused(model)


def test_given_a_contradiction_of_positions_when_loaded_then_both_entries_are_told(model: Path) -> None:
    configure(model, rope_theta=123.0)
    assert "config.json contradicts itself: rope_parameters.rope_theta is 10000.0, and rope_theta is 123.0" in refused(model)


@pytest.mark.parametrize("code", [None, "raise SystemExit('gone')", "import nowhere_at_all"])
def test_given_code_that_is_trusted_and_does_not_do_when_loaded_then_it_is_one_sentence(model: Path, code: str | None) -> None:
    configure(model, auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})
    if code is not None:
        (model / "modeling_mine.py").write_text(code)
    checkpoint = source.fetch(ModelReference(path=str(model)), Path("cache"), trust_remote_code=True)
    with pytest.raises(ExportError) as error:
        source.load(checkpoint, trust_remote_code=True)
    expected = {None: "lacks modeling_mine.py, the model's own code", "raise SystemExit('gone')": "gone"}.get(
        code, "nowhere_at_all"
    )
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
