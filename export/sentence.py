"""How an embedding model is meant to be used, as sentence-transformers writes it beside the weights.

`modules.json` lists what a text goes through: a transformer, pooling, perhaps dense layers, perhaps normalization. Each has a
folder with a `config.json` of its own; the transformer's length limit stands in `sentence_bert_config.json`.
https://sbert.net/docs/package_reference/sentence_transformer/models.html
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import msgspec
import torch
from msgspec import Meta
from safetensors import SafetensorError
from safetensors.torch import load_file

from export.checkpoint_files import AGAIN, FLOATS, check_no_pointers, header, read_json
from export.errors import ExportError, UnsupportedModel
from export.library_messages import in_few_words
from export.paths import check_inside, exists
from runtime.bundle import Pooling

MODULES = "modules.json"
TRANSFORMER = "sentence_bert_config.json"
_CONFIG, _WEIGHTS, _PICKLED = "config.json", "model.safetensors", "pytorch_model.bin"
_EMBEDDING = "sentence_embedding"
"""What a text's embedding is called where a module says what it takes and gives; there are others, as `token_embeddings`."""

_POOLINGS: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}
"""The flags of `1_Pooling/config.json`, of which one is set, and what can be built for them."""
_MODES: dict[str, Pooling] = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
"""Likewise, of `pooling_mode`, which newer files have in the flags' place."""
_ACTIVATIONS: dict[str, Callable[[], torch.nn.Module]] = {
    "Identity": torch.nn.Identity,
    "Tanh": torch.nn.Tanh,
    "ReLU": torch.nn.ReLU,
    "GELU": torch.nn.GELU,
}


T = TypeVar("T")


class _Module(msgspec.Struct):
    type: str = ""
    path: str = ""


class _Transformer(msgspec.Struct):
    max_seq_length: int | None = None
    do_lower_case: bool | None = None


class _Names(msgspec.Struct):
    """What a module that may stand behind the pooling takes and gives."""

    module_input_name: str | None = None
    module_output_name: str | None = None


class _Dense(msgspec.Struct):
    in_features: Annotated[int, Meta(ge=1)]
    out_features: Annotated[int, Meta(ge=1)]
    bias: bool = True
    activation_function: str = ""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of its tensors by their names."""
        shapes: dict[str, tuple[int, ...]] = {"linear.weight": (self.out_features, self.in_features)}
        return shapes | {"linear.bias": (self.out_features,)} if self.bias else shapes


@dataclass(frozen=True)
class Sentence:
    """What becomes of a model's hidden states, and what goes into it."""

    pooling: Pooling
    normalized: bool = True
    """Embeddings are brought to length 1."""
    dense: tuple[torch.nn.Module, ...] = ()
    """Layers between the two."""
    max_tokens: int | None = None
    """Of a text, special tokens included; None leaves it to the model."""
    lower: bool = False
    """Texts are made lower case first."""


def read(folder: Path, wanted: Pooling | None) -> Sentence:
    """What the files in `folder` say; `wanted` is the pooling where they say nothing, and embeddings are then normalized.

    Raises ExportError where neither says how to pool, or both and differently; UnsupportedModel for what cannot be built.
    """
    check_inside(folder, folder / MODULES, folder / TRANSFORMER)
    if not exists(folder / MODULES):
        if wanted is None:
            raise ExportError(
                f"{folder.name} has no {MODULES}, which would say how its hidden states become an embedding; give --pooling "
                f"({', '.join(get_args(Pooling))}) as the model's card says"
            )
        return Sentence(wanted, max_tokens=_max_tokens(folder))
    lower = _transformer(folder).do_lower_case is True
    found = Sentence("mean", normalized=False, max_tokens=_max_tokens(folder), lower=lower)
    pooling: Pooling | None = None
    for module in _parsed(folder / MODULES, list[_Module]):
        kind, path = module.type.rpartition(".")[2], module.path
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise ExportError(
                f"{folder / MODULES} names a module outside of the model's folder ({path}); fetch the model again"
            )
        check_inside(folder, folder / path, folder / path / _CONFIG, folder / path / _WEIGHTS)
        match kind:
            case "Transformer" if not path:
                pass
            case "Pooling" if pooling is None:
                pooling = _pooling(folder / path / _CONFIG)
            case "Dense" if pooling is not None and not found.normalized:
                found = replace(found, dense=(*found.dense, _dense(folder / path)))
            case "Normalize" if pooling is not None:
                _check_names(folder / path / _CONFIG)
                found = replace(found, normalized=True)
            case _:
                raise UnsupportedModel(
                    f"{folder / MODULES} has a module {kind or module!r} (in {path or folder}) that cannot be built there; a "
                    "transformer, pooling, dense layers and normalization can, in this order"
                )
    if pooling is None:
        raise UnsupportedModel(
            f"{folder / MODULES} names no pooling: the model gives an embedding for each token, not for a text"
        )
    if wanted is not None and wanted != pooling:
        raise ExportError(f"{folder.name} was made for pooling {pooling!r}; leave --pooling {wanted} out")
    return replace(found, pooling=pooling)


def check_width(sentence: Sentence, hidden: int) -> None:
    """Refuse dense layers that do not take what is before them, of which the first is `hidden` numbers. Raises ExportError."""
    width = hidden
    for number, layer in enumerate(sentence.dense, start=1):
        linear = layer.get_submodule("0")
        assert isinstance(linear, torch.nn.Linear)
        if linear.in_features != width:
            raise ExportError(
                f"dense layer {number} in {MODULES} takes {linear.in_features} numbers where it is given {width}; the files do "
                f"not belong together, {AGAIN}"
            )
        width = linear.out_features


def _pooling(path: Path) -> Pooling:
    config = _parsed(path, dict[str, Any])
    if "pooling_mode" in config:
        modes = config["pooling_mode"]
        named = [str(mode) for mode in (modes if isinstance(modes, list) else [modes])]
        known: dict[str, Pooling] = _MODES
    else:
        named = [name for name, on in config.items() if name.startswith("pooling_mode_") and on]
        known = _POOLINGS
    if len(named) != 1 or named[0] not in known:
        raise UnsupportedModel(
            f"{path} pools by {' and '.join(named) or 'nothing'}; exactly one of {', '.join(known)} can be built"
        )
    if not config.get("include_prompt", True):
        raise UnsupportedModel(f"{path} leaves a prompt's tokens out of the pooling (include_prompt), which cannot be built")
    return known[named[0]]


def _dense(folder: Path) -> torch.nn.Module:
    config = _parsed(folder / _CONFIG, _Dense)
    _check_names(folder / _CONFIG)
    name = config.activation_function.rpartition(".")[2]
    if name not in _ACTIVATIONS:
        raise UnsupportedModel(f"{folder} has the activation {name!r}; {', '.join(_ACTIVATIONS)} can be built")
    weights = _dense_weights(folder, config)
    linear = torch.nn.Linear(config.in_features, config.out_features, bias=config.bias)
    linear.load_state_dict(weights)
    return torch.nn.Sequential(linear, _ACTIVATIONS[name]()).eval().requires_grad_(False)


def _dense_weights(folder: Path, config: _Dense) -> dict[str, torch.Tensor]:
    """The tensors of a dense layer in float32, by the names that torch has for them."""
    path = folder / _WEIGHTS
    if not exists(path) and exists(folder / _PICKLED):
        raise UnsupportedModel(
            f"{folder / _PICKLED} is pickled, and a dense layer is read from {_WEIGHTS} alone; load the model with "
            "sentence-transformers and save it again"
        )
    stored = header(path)
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    if shapes != config.shapes:
        raise ExportError(
            f"{path} holds {_described(shapes)} where its {_CONFIG} makes {_described(config.shapes)} of it; the two do not "
            f"belong together, {AGAIN}"
        )
    for name, tensor in stored.items():
        if tensor.dtype not in FLOATS:
            raise UnsupportedModel(
                f"{path} stores {name} as {tensor.dtype}, which are codes or counts and no weights as they are; export a "
                f"version that has it in {', '.join(sorted(FLOATS))}"
            )
    try:
        weights = {name.removeprefix("linear."): tensor.float() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{path} cannot be read ({in_few_words(str(error))}); {AGAIN}") from error
    for name, weight in weights.items():
        if not bool(torch.isfinite(weight).all()):
            raise ExportError(f"{path} is damaged: its linear.{name} is not finite in float32; {AGAIN}")
    return weights


def _described(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items()) or "no tensors"


def _check_names(path: Path) -> None:
    """Refuse a module behind the pooling whose configuration, if there is one, names something else than a text's embedding."""
    names = _parsed(path, _Names) if exists(path) else _Names()
    for name in (names.module_input_name, names.module_output_name):
        if name not in (None, _EMBEDDING):
            raise UnsupportedModel(
                f"{path} has a module that takes or gives {name!r}, where only what is behind the pooling ({_EMBEDDING}) can "
                "be built"
            )


def _max_tokens(folder: Path) -> int | None:
    most = _transformer(folder).max_seq_length
    return most if most is not None and most > 0 else None


def _transformer(folder: Path) -> _Transformer:
    return _parsed(folder / TRANSFORMER, _Transformer) if exists(folder / TRANSFORMER) else _Transformer()


def _parsed(path: Path, kind: type[T]) -> T:
    """The content of a JSON file. Raises ExportError where it is not of that kind."""
    check_no_pointers(path)
    try:
        return msgspec.convert(read_json(path), kind)
    except msgspec.ValidationError as error:
        raise ExportError(f"{path} is not as sentence-transformers writes it ({error}); {AGAIN}") from error
