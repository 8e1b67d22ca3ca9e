"""Models for embeddings from a folder to a bundle: tiny random ones of many kinds, and transformers beside their engines."""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from export import cli, embeddings, sentence
from export.errors import ExportError, UnsupportedModel
from export.recipe import Build
from runtime import bundle, encoder
from tests import embedders, tiny

Floats = npt.NDArray[np.float32]

EXACT, COARSE = Build("cpu", "fp32"), (Build("cpu", "int8"), Build("cpu", "int4"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny BERT's folder, with sentence-transformers' files, to be changed."""
    return embedders.write_model(tmp_path / "bert", "bert", most=40)


def publish(model: Path, *builds: Build, verify: bool = True, **options: Any) -> Path:
    return tiny.exporting(model.parent / "engines", verify=verify).run(embedders.recipe(model, *builds, **options))


def embed(published: Path, texts: list[list[int]], variant: str = "cpu-fp32") -> Floats:
    """The engine's embeddings of `texts` as one ragged batch; what pads it is no padding token."""
    manifest = bundle.read(published)
    engine = encoder.start(published, manifest, manifest.variant(variant), context=None, threads=1)
    lengths = np.array([len(text) for text in texts], np.int64)
    ids = np.full((len(texts), lengths.max()), 7, np.int64)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = text
    return engine.embed(ids, lengths)


def ragged(longest: int, count: int = 12, seed: int = 5) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    lengths = [longest, 1, 2, *draw.integers(1, longest + 1, count - 3)]
    return [draw.integers(0, tiny.VOCAB, length).tolist() for length in lengths]


@pytest.mark.parametrize("kind", embedders.TYPES)
def test_given_any_architecture_when_exported_then_ragged_texts_get_transformers_embeddings(tmp_path: Path, kind: str) -> None:
    pooling = embedders.TYPES[kind][1]
    published = publish(embedders.write_model(tmp_path / "model", kind), EXACT, *COARSE)
    manifest = bundle.read(published)
    longest = embedders.POSITIONS - embedders.OFFSET.get(kind, 0)
    assert (manifest.task, manifest.pooling, manifest.architecture) == ("feature-extraction", pooling, kind)
    assert (manifest.max_length, manifest.vocab_size) == (longest, tiny.VOCAB)
    texts = ragged(longest)
    model = embedders.random_model(kind)
    expected = np.stack([embedders.by_hand(model, pooling, text) for text in texts])
    got = embed(published, texts)
    assert np.abs(got - expected).max() < 1e-5
    alone = np.concatenate([embed(published, [text]) for text in texts[:4]])
    assert np.abs(got[:4] - alone).max() < 1e-5
    for variant, least in (("cpu-int8", 0.99), ("cpu-int4", 0.7)):
        cosines = (embed(published, texts, variant) * expected).sum(1)
        assert cosines.min() > least, variant
        proof = manifest.variant(variant).verification
        assert proof is not None
        assert proof.cosine is not None
        assert least < proof.cosine < 1
    proof = manifest.variant("cpu-fp32").verification
    assert proof is not None
    assert proof.cosine == pytest.approx(1, abs=1e-5)
    assert proof.equal == proof.tokens == proof.prompts > 10


def test_given_sentence_transformers_files_when_read_then_they_are_kept_to(folder: Path) -> None:
    published = publish(folder)
    manifest = bundle.read(published)
    assert (manifest.pooling, manifest.max_length) == ("cls", 40)
    assert manifest.encoder is not None
    assert manifest.encoder.normalized
    tokenizer = Tokenizer.from_file(str(published / "tokenizer.json"))
    ids = tokenizer.encode("Gold").ids
    assert (ids[0], ids[-1]) == (0, 2), "special tokens are the tokenizer's own matter"
    assert not (published / "chat_template.jinja").exists()


def test_given_no_normalize_module_when_exported_then_embeddings_keep_their_length(tmp_path: Path) -> None:
    published = publish(embedders.write_model(tmp_path / "model", "bert", normalized=False))
    manifest = bundle.read(published)
    assert manifest.encoder is not None
    assert not manifest.encoder.normalized
    texts = ragged(128)
    expected = [embedders.by_hand(embedders.random_model("bert"), "cls", text, normalized=False) for text in texts]
    assert np.abs(embed(published, texts) - np.stack(expected)).max() < 1e-4
    assert abs(np.linalg.norm(expected[0]) - 1) > 0.1


def add_dense(
    folder: Path, weights: dict[str, torch.Tensor], path: str = "2_Dense", outside: Path | None = None, **entries: Any
) -> Path:
    """Put a dense layer of 64 to 24 numbers between pooling and normalization, with these `entries` in its config.json."""
    dense = outside or folder / path
    dense.mkdir(parents=True)
    activation = "torch.nn.modules.activation.Tanh"
    config = {"in_features": 64, "out_features": 24, "bias": True, "activation_function": activation} | entries
    (dense / "config.json").write_text(json.dumps(config))
    save_file(weights, dense / "model.safetensors")
    modules = json.loads((folder / "modules.json").read_text())
    modules.insert(2, {"idx": 2, "name": "2", "path": path, "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    return dense


def dense_weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {"linear.weight": torch.randn(24, 64) * 0.1, "linear.bias": torch.randn(24)}


def test_given_a_dense_module_when_exported_then_it_is_part_of_the_graph(folder: Path) -> None:
    weight, bias = dense_weights().values()
    add_dense(folder, dense_weights())
    published = publish(folder)
    manifest = bundle.read(published)
    assert manifest.encoder is not None
    assert manifest.encoder.dimensions == 24
    texts = ragged(40)
    model = embedders.random_model("bert")
    hidden = np.stack([embedders.by_hand(model, "cls", text, normalized=False) for text in texts])
    expected = np.tanh(hidden @ weight.numpy().T + bias.numpy())
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.abs(embed(published, texts) - expected).max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float8_e4m3fn, torch.uint8, torch.bool])
@pytest.mark.parametrize("name", ["linear.weight", "linear.bias"])
def test_given_a_dense_module_of_codes_when_read_then_they_are_not_taken_for_weights(
    folder: Path, dtype: torch.dtype, name: str
) -> None:
    weights = dense_weights()
    add_dense(folder, weights | {name: weights[name].to(dtype)})
    with pytest.raises(UnsupportedModel, match=rf"2_Dense/model.safetensors stores {name} as \w+, which are codes or counts"):
        sentence.read(folder, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_given_a_dense_module_of_other_floats_when_read_then_they_are_its_weights(folder: Path, dtype: torch.dtype) -> None:
    weights = {name: weight.to(dtype) for name, weight in dense_weights().items()}
    add_dense(folder, weights)
    (layer,) = sentence.read(folder, None).dense
    linear = layer.get_submodule("0")
    assert isinstance(linear, torch.nn.Linear)
    assert torch.equal(linear.weight, weights["linear.weight"].float())
    assert torch.equal(linear.bias, weights["linear.bias"].float())


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda dense: (dense / "model.safetensors").write_bytes(b"xx"), "is cut off or not a safetensors file"),
        (lambda dense: (dense / "model.safetensors").write_bytes(overlapping()), r"model.safetensors cannot be read \("),
        (lambda dense: (dense / "model.safetensors").unlink(), "model.safetensors cannot be read: No such file"),
        (lambda dense: (dense / "config.json").write_text("{"), "is not valid JSON"),
        (lambda dense: (dense / "config.json").write_text("[1]"), "is not as sentence-transformers writes it"),
    ],
)
def test_given_a_damaged_dense_module_when_read_then_a_sentence_says_so(
    folder: Path, damage: Callable[[Path], object], said: str
) -> None:
    damage(add_dense(folder, dense_weights()))
    with pytest.raises(ExportError, match=f"2_Dense.*{said}"):
        sentence.read(folder, None)


def overlapping() -> bytes:
    """A safetensors file whose header can be read and contradicts itself: both tensors begin at 0."""
    entries = {
        "linear.weight": {"dtype": "F32", "shape": [24, 64], "data_offsets": [0, 6144]},
        "linear.bias": {"dtype": "F32", "shape": [24], "data_offsets": [0, 96]},
    }
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + bytes(6144)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"linear.weight": torch.full((24, 64), torch.nan)}, "its linear.weight is not finite"),
        ({"linear.bias": torch.full((24,), 1e300, dtype=torch.float64)}, "its linear.bias is not finite in float32"),
        ({"linear.weight": torch.ones(64, 24)}, r"linear.weight \[64, 24\].* where its config.json makes .*\[24, 64\]"),
        ({"more": torch.ones(1)}, r"holds .*more \[1\].* where its config.json makes"),
    ],
)
def test_given_weights_that_are_no_dense_layers_when_read_then_a_sentence_says_so(
    folder: Path, weights: dict[str, torch.Tensor], said: str
) -> None:
    add_dense(folder, dense_weights() | weights)
    with pytest.raises(ExportError, match=said):
        sentence.read(folder, None)


@pytest.mark.parametrize(
    "entries",
    [
        {"in_features": "a"},
        {"in_features": -1},
        {"in_features": True},
        {"out_features": None},
        {"bias": "no"},
        {"activation_function": 5},
    ],
)
def test_given_entries_that_make_no_dense_layer_when_read_then_the_entry_is_named(
    folder: Path, entries: dict[str, Any]
) -> None:
    add_dense(folder, dense_weights(), **entries)
    (name,) = entries
    with pytest.raises(ExportError, match=rf"2_Dense/config.json is not as sentence-transformers writes it \(.*\$.{name}"):
        sentence.read(folder, None)


def test_given_a_dense_layer_of_enormous_size_when_read_then_no_memory_is_taken_for_it(folder: Path) -> None:
    add_dense(folder, dense_weights(), in_features=2**40, out_features=2**40)
    with pytest.raises(ExportError, match="the two do not belong together"):
        sentence.read(folder, None)


def test_given_a_dense_layer_of_another_width_than_the_models_when_exported_then_it_is_said(folder: Path) -> None:
    add_dense(folder, {"linear.weight": torch.ones(24, 32), "linear.bias": torch.ones(24)}, in_features=32)
    with pytest.raises(ExportError, match=r"dense layer 1 in modules.json takes 32 numbers where it is given 64"):
        publish(folder)


def test_given_a_module_behind_the_pooling_that_takes_something_else_when_read_then_it_is_refused(folder: Path) -> None:
    add_dense(folder, dense_weights(), module_input_name="token_embeddings")
    with pytest.raises(UnsupportedModel, match="takes or gives 'token_embeddings'"):
        sentence.read(folder, None)


@pytest.mark.parametrize("path", ["2_Dense", ".h", "deep/.h"])
@pytest.mark.parametrize("linked", ["the folder", "the weights", "the configuration"])
def test_given_a_module_that_is_a_link_out_of_the_folder_when_read_then_it_is_refused(
    tmp_path: Path, folder: Path, path: str, linked: str
) -> None:
    if linked == "the folder":
        add_dense(folder, dense_weights(), path, outside=tmp_path / "outside")
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).symlink_to(tmp_path / "outside")
    else:
        name = "model.safetensors" if linked == "the weights" else "config.json"
        file = add_dense(folder, dense_weights(), path) / name
        file.rename(tmp_path / name)
        file.symlink_to(tmp_path / name)
    with pytest.raises(ExportError, match=rf"{path}.* leads out of the model's folder \(to {tmp_path}"):
        sentence.read(folder, None)


@pytest.mark.parametrize("name", ["modules.json", "sentence_bert_config.json"])
def test_given_a_list_of_modules_that_is_a_link_out_of_the_folder_when_read_then_it_is_refused(
    tmp_path: Path, folder: Path, name: str
) -> None:
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(ExportError, match=rf"{name} leads out of the model's folder"):
        sentence.read(folder, None)


def test_given_a_hub_snapshot_when_read_then_its_modules_links_into_its_blobs_are_followed(
    tmp_path: Path, folder: Path
) -> None:
    add_dense(folder, dense_weights())
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    for number, file in enumerate(path for path in folder.rglob("*") if path.is_file()):
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file.rename(blobs / str(number)))
    assert len(sentence.read(snapshot, None).dense) == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("modules.json", {}),
        ("modules.json", [5]),
        ("modules.json", [{"type": "x.Pooling", "path": 5}]),
        ("sentence_bert_config.json", {"max_seq_length": "many"}),
        ("sentence_bert_config.json", {"max_seq_length": True}),
        ("sentence_bert_config.json", {"do_lower_case": "no"}),
        ("sentence_bert_config.json", []),
        ("1_Pooling/config.json", [5]),
        ("3_Normalize/config.json", {"module_output_name": 5}),
    ],
)
def test_given_files_of_another_form_when_read_then_a_sentence_names_them(folder: Path, name: str, content: object) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    modules[2]["path"] = "3_Normalize"
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(ExportError, match=f"{name} is not as sentence-transformers writes it"):
        sentence.read(folder, None)


@pytest.mark.parametrize("path", ["a\0b", "a" * 300])
def test_given_a_module_in_a_place_that_cannot_be_when_read_then_a_sentence_says_so(folder: Path, path: str) -> None:
    (folder / "modules.json").write_text(json.dumps([{"type": "x.Pooling", "path": path}]))
    with pytest.raises(ExportError, match=r"cannot be (looked up|read)"):
        sentence.read(folder, None)


def test_given_a_folder_that_says_nothing_when_exported_then_the_pooling_is_asked_for_and_taken(tmp_path: Path) -> None:
    model = embedders.write_model(tmp_path / "model", "roberta", files=False)
    with pytest.raises(ExportError, match="give --pooling"):
        publish(model)
    assert not (tmp_path / "engines" / "tiny-embedder").exists()
    published = publish(model, pooling="cls")
    texts = ragged(126)
    expected = np.stack([embedders.by_hand(embedders.random_model("roberta"), "cls", text) for text in texts])
    assert np.abs(embed(published, texts) - expected).max() < 1e-5


def test_given_another_pooling_than_the_models_own_when_exported_then_it_is_refused(folder: Path) -> None:
    with pytest.raises(ExportError, match="was made for pooling 'cls'; leave --pooling mean out"):
        publish(folder, pooling="mean")


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "cls", "word_embedding_dimension": 64}, "cls"),
        ({"pooling_mode": ["lasttoken"]}, "last"),
        ({"pooling_mode_max_tokens": True}, None),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, None),
        ({"pooling_mode": "weightedmean"}, None),
        ({"pooling_mode": 5}, None),
        ({"pooling_mode": [["x"]]}, None),
        ({"pooling_mode": {"mean": 1}}, None),
        ({"pooling_mode": None}, None),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": 1}, None),
        ({"pooling_mode_mean_tokens": False}, None),
        ({"pooling_mode_mean_tokens": True, "include_prompt": False}, None),
    ],
)
def test_given_a_pooling_configuration_when_read_then_it_is_known_or_named(
    folder: Path, config: dict[str, Any], pooling: str | None
) -> None:
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    if pooling is not None:
        assert sentence.read(folder, None).pooling == pooling
        return
    with pytest.raises(UnsupportedModel, match="1_Pooling"):
        sentence.read(folder, None)


@pytest.mark.parametrize(
    ("modules", "says"),
    [
        ([("", "Transformer")], "names no pooling"),
        ([("", "Transformer"), ("1_Pooling", "Pooling"), ("2_CNN", "CNN")], "module 'CNN'"),
        ([("0_Transformer", "Transformer"), ("1_Pooling", "Pooling")], "module 'Transformer'"),
        ([("", "Transformer"), ("2_Normalize", "Normalize"), ("1_Pooling", "Pooling")], "module 'Normalize'"),
        ([("", "Transformer"), ("9_Pooling", "Pooling")], "cannot be read"),
    ],
)
def test_given_modules_that_cannot_be_built_when_read_then_they_are_named(
    folder: Path, modules: list[tuple[str, str]], says: str
) -> None:
    listed = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in modules]
    (folder / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(ExportError, match=says):
        sentence.read(folder, None)


def test_given_texts_that_are_made_lower_case_when_exported_then_the_tokenizer_does_it(folder: Path) -> None:
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 1000, "do_lower_case": True}))
    published = publish(folder, verify=False)
    tokenizer = Tokenizer.from_file(str(published / "tokenizer.json"))
    assert tokenizer.encode("GOLD and Silver").ids == tokenizer.encode("gold and silver").ids
    assert bundle.read(published).max_length == 128, "the model has no more positions"


def test_given_weights_without_a_pooler_when_exported_then_it_is_not_missed(folder: Path) -> None:
    model = embedders.random_model("bert")
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("pooler.")}
    assert len(state) < len(model.state_dict())
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert bundle.read(publish(folder)).max_length == 40
    del state["encoder.layer.0.attention.self.query.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match="lacks 1 of the weights"):
        publish(folder)


def test_given_an_engine_with_other_embeddings_when_proved_then_nothing_is_published(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = embedders.random_model("bert", seed=9)
    real = embeddings.reference
    monkeypatch.setattr(embeddings, "reference", lambda model, use, text: real(other, use, text))
    with pytest.raises(UnsupportedModel, match="an embedding has cosine"):
        publish(folder)
    assert not (folder.parent / "engines" / "tiny-embedder").exists()
    assert publish(folder, verify=False).exists()


def test_given_a_bundle_of_another_use_when_exported_then_its_variants_are_not_kept(folder: Path) -> None:
    assert len(bundle.read(publish(folder, EXACT, verify=False)).variants) == 1
    assert len(bundle.read(publish(folder, COARSE[0], verify=False)).variants) == 2
    shutil.rmtree(folder / "1_Pooling")
    (folder / "modules.json").unlink()
    again = bundle.read(publish(folder, COARSE[0], verify=False, pooling="mean"))
    assert [variant.name for variant in again.variants] == ["cpu-int8"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--target", "cuda"], "on the CPU only"),
        (["--pooling", "mean"], "was made for pooling 'cls'"),
        (["--precision", "fp16"], "has no precision fp16"),
    ],
)
def test_given_what_cannot_be_when_the_command_exports_then_it_says_so_in_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    assert command(str(folder), "--task", "feature-extraction", *options, engines=folder.parent / "engines") == 1
    complaint = capsys.readouterr().err
    assert says in complaint
    assert "Traceback" not in complaint


def test_given_pooling_without_the_task_when_the_command_exports_then_it_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(str(folder), "--pooling", "mean", engines=folder.parent / "engines") == 1
    assert "pooling is for embeddings" in capsys.readouterr().err


def test_given_a_recipe_for_embeddings_when_the_command_exports_then_it_is_built(tmp_path: Path) -> None:
    model = embedders.write_model(tmp_path / "model", "qwen3", files=False)
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        f'name = "mine"\ntask = "feature-extraction"\npooling = "last"\n[model]\npath = "{model}"\n'
        '[[variants]]\ntarget = "cpu"\nprecision = "fp32"\n'
    )
    assert command("--recipe", str(recipe), engines=tmp_path / "engines") == 0
    manifest = bundle.read(tmp_path / "engines" / "mine")
    assert (manifest.task, manifest.pooling) == ("feature-extraction", "last")
    assert command("--recipe", str(recipe), "--if-missing", engines=tmp_path / "engines") == 0


def command(*arguments: str, engines: Path) -> int:
    """`engineshed export` with these arguments; gives its exit code."""
    parser = argparse.ArgumentParser()
    cli.configure(parser)
    return cli.run(parser.parse_args([*arguments, "--engines", str(engines)]))
