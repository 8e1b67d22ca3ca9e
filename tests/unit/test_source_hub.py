"""A model of the hub: the files that make it are fetched, and what does not make one is told in the hub's words."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from export import recipe, source
from export.errors import ExportError
from export.recipe import Build
from tests import hub

FP32 = Build("cpu", "fp32")
OTHERS = ("consolidated.safetensors", "original/model.safetensors", "fp16/model.safetensors")
"""The same weights again, and others, which nothing loads."""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The repository a/b of the hub, still empty."""
    folder = tmp_path / "hub" / "a" / "b"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def fetched(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The hub's files that were fetched, by their paths."""
    monkeypatch.chdir(tmp_path)
    with hub.serving(repository.parents[1], tmp_path / "cache", monkeypatch) as fetched:
        yield fetched


def fetch(model: str, revision: str | None = None) -> source.Checkpoint:
    return source.fetch(recipe.of(model, "name", revision, (FP32,)).model, Path("wheels"))


def refused(model: str, revision: str | None = None) -> str:
    with pytest.raises(ExportError) as error:
        fetch(model, revision)
    assert "\n" not in str(error.value)
    assert "cache" not in str(error.value)
    return str(error.value)


def fill(repository: Path, *names: str) -> None:
    for name in names:
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text('{"model_type": "llama"}' if name == "config.json" else "content")


def test_given_a_model_when_fetched_then_it_is_loaded_from_its_safetensors_alone(
    repository: Path, fetched: list[str], tiny_model: Path
) -> None:
    shutil.copytree(tiny_model, repository, dirs_exist_ok=True)
    fill(repository, "pytorch_model.bin", "model.gguf", "onnx/model.onnx", "own.py", *OTHERS)
    found = fetch("a/b")
    assert (found.source.kind, found.source.name, found.source.revision) == ("hub", "a/b", hub.COMMIT)
    assert [name for name in fetched if name.endswith(".safetensors")] == ["model.safetensors"]
    assert not {"pytorch_model.bin", "model.gguf", "onnx/model.onnx", "own.py"} & set(fetched)
    source.load(found)


def test_given_shards_when_fetched_then_those_are_that_the_index_names(
    repository: Path, fetched: list[str], tiny_model: Path
) -> None:
    shutil.copytree(tiny_model, repository, dirs_exist_ok=True)
    weights = safetensors.torch.load_file(repository / "model.safetensors")
    (repository / "parts").mkdir()
    (repository / "model.safetensors").rename(repository / "parts" / "one.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "parts/one.safetensors")}
    (repository / "model.safetensors.index.json").write_text(json.dumps(index))
    fill(repository, *OTHERS)
    source.load(fetch("a/b"))
    assert [name for name in fetched if name.endswith(".safetensors")] == ["parts/one.safetensors"]


@pytest.mark.parametrize("sharded", [False, True])
def test_given_a_model_of_pickled_weights_alone_when_fetched_then_they_are_loaded(
    repository: Path, fetched: list[str], tiny_model: Path, sharded: bool
) -> None:
    shutil.copytree(tiny_model, repository, dirs_exist_ok=True)
    weights = safetensors.torch.load_file(repository / "model.safetensors")
    (repository / "model.safetensors").unlink()
    name = "pytorch_model-00001-of-00001.bin" if sharded else "pytorch_model.bin"
    torch.save(weights, repository / name)
    fill(repository, "rewards.safetensors")  # which is nothing that transformers looks at
    if sharded:
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
        (repository / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    state = source.load(fetch("a/b")).state_dict()
    assert name in fetched
    assert all(torch.equal(state[key], weight) for key, weight in weights.items())


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ("x-Q4.gguf x-Q8.gguf mmproj-x.gguf", "holds only GGUF files (x-Q4.gguf, x-Q8.gguf); name one of them: a/b:x-Q4.gguf"),
        ("config.json x.gguf", "holds only GGUF files (x.gguf); name one of them: a/b:x.gguf"),
        ("x-00001-of-00002.gguf x-00002-of-00002.gguf", "holds only GGUF files (x-00001-of-00002.gguf); name one of them: "),
        ("config.json", "has a config.json but no weights (model.safetensors, pytorch_model.bin)"),
        ("config.json training_args.bin", "; it has training_args.bin, which transformers does not load"),
        ("config.json tf_model.h5", "(model.safetensors, pytorch_model.bin); it has tf_model.h5, which transformers does not"),
        ("adapter_config.json adapter_model.safetensors", "/adapter_config.json is not valid JSON (Expecting value: line 1"),
        ("config.json model.safetensors", "/model.safetensors is cut off or not a safetensors file (its header cannot be rea"),
        ("README.md model.nemo", "has no config.json and no GGUF file (it has README.md, model.nemo), so it is not a language"),
        ("README.md model_index.json", " is a diffusion pipeline, which makes images; a language model is a folder with "),
    ],
)
def test_given_a_repository_that_is_no_model_when_fetched_then_it_is_told_what_it_holds(
    repository: Path, fetched: list[str], files: str, said: str
) -> None:
    fill(repository, *files.split())
    sentence = refused("a/b")
    assert sentence.startswith("a/b")
    assert said in sentence


def test_given_a_typo_in_a_ggufs_name_when_fetched_then_those_of_the_repository_are_named(
    repository: Path, fetched: list[str]
) -> None:
    fill(repository, "my-model-Q4_K_M.gguf", "other.gguf", "z-00001-of-00002.gguf")
    assert refused("a/b:my-model-Q4_KM.gguf") == "a/b has no file my-model-Q4_KM.gguf; it has my-model-Q4_K_M.gguf"
    assert refused("a/b:z-00001-of-00002.gguf").startswith("a/b has no file z-00002-of-00002.gguf; it has ")
    assert fetched == []


def test_given_a_part_of_a_gguf_when_fetched_then_all_parts_are(repository: Path, fetched: list[str]) -> None:
    parts = ["my-model-00001-of-00002.gguf", "my-model-00002-of-00002.gguf"]
    fill(repository, *parts, "other.gguf")
    found = fetch(f"a/b:{parts[1]}", "v1")
    assert found.gguf_file == parts[0]
    assert sorted(fetched) == parts


def test_given_what_the_hub_does_not_have_when_fetched_then_it_says_so(repository: Path, fetched: list[str]) -> None:
    fill(repository, "config.json", "model.safetensors")
    assert refused("a/c") == (
        "there is no folder or file a/c here, and the hub has no such model, or it is not open to you; check its name, or "
        "`hf auth login`"
    )
    assert refused("a/b", "v2").endswith("and the hub has no revision 'v2' of it; check --revision")


def test_given_a_model_that_was_fetched_when_the_hub_is_gone_then_it_is_taken_from_here(
    repository: Path, fetched: list[str], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_model, repository, dirs_exist_ok=True)
    first = fetch("a/b")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fetch("a/b") == first
