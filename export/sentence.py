"""How an embedding model is meant to be used, as sentence-transformers writes it beside the weights.

`modules.json` lists what a text goes through: a transformer, pooling, perhaps dense layers, perhaps normalization. Each has a
folder with a `config.json` of its own; the transformer's length limit stands in `sentence_bert_config.json`.
https://sbert.net/docs/package_reference/sentence_transformer/models.html
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import msgspec
import torch
from safetensors.torch import load_file

from export.checkpoint_files import check_no_pointers
from export.errors import ExportError, UnsupportedModel
from runtime.bundle import Pooling

MODULES = "modules.json"
TRANSFORMER = "sentence_bert_config.json"

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
    if not (folder / MODULES).exists():
        if wanted is None:
            raise ExportError(
                f"{folder.name} has no {MODULES}, which would say how its hidden states become an embedding; give --pooling "
                f"({', '.join(get_args(Pooling))}) as the model's card says"
            )
        return Sentence(wanted, max_tokens=_max_tokens(folder))
    found = Sentence(
        "mean", normalized=False, max_tokens=_max_tokens(folder), lower=_transformer(folder).get("do_lower_case") is True
    )
    pooling: Pooling | None = None
    for module in _json(folder / MODULES, list):
        kind, path = str(module.get("type", "")).rpartition(".")[2], str(module.get("path", ""))
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise ExportError(
                f"{folder / MODULES} names a module outside of the model's folder ({path}); fetch the model again"
            )
        match kind:
            case "Transformer" if not path:
                pass
            case "Pooling" if pooling is None:
                pooling = _pooling(folder / path / "config.json")
            case "Dense" if pooling is not None and not found.normalized:
                found = replace(found, dense=(*found.dense, _dense(folder / path)))
            case "Normalize" if pooling is not None:
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


def _pooling(path: Path) -> Pooling:
    config = _json(path, dict)
    if "pooling_mode" in config:
        modes = config["pooling_mode"]
        named = [modes] if isinstance(modes, str) else list(modes)
        known: dict[str, Pooling] = _MODES
    else:
        named = [name for name, on in config.items() if name.startswith("pooling_mode_") and on is True]
        known = _POOLINGS
    if len(named) != 1 or named[0] not in known:
        raise UnsupportedModel(
            f"{path} pools by {' and '.join(map(str, named)) or 'nothing'}; exactly one of {', '.join(known)} can be built"
        )
    if config.get("include_prompt") is False:
        raise UnsupportedModel(f"{path} leaves a prompt's tokens out of the pooling (include_prompt), which cannot be built")
    return known[named[0]]


def _dense(folder: Path) -> torch.nn.Module:
    config = _json(folder / "config.json", dict)
    name = str(config.get("activation_function", "")).rpartition(".")[2]
    if name not in _ACTIVATIONS:
        raise UnsupportedModel(f"{folder} has the activation {name!r}; {', '.join(_ACTIVATIONS)} can be built")
    weights = folder / "model.safetensors"
    check_no_pointers(weights)
    try:
        linear = torch.nn.Linear(config["in_features"], config["out_features"], bias=config.get("bias", True))
        linear.load_state_dict({key.removeprefix("linear."): tensor.float() for key, tensor in load_file(weights).items()})
    except (KeyError, OSError, RuntimeError) as error:
        raise ExportError(f"{weights} cannot be read as the dense layer that its config.json describes: {error}") from error
    return torch.nn.Sequential(linear, _ACTIVATIONS[name]()).eval().requires_grad_(False)


def _max_tokens(folder: Path) -> int | None:
    most = _transformer(folder).get("max_seq_length")
    return most if isinstance(most, int) and most > 0 else None


def _transformer(folder: Path) -> dict[str, Any]:
    return _json(folder / TRANSFORMER, dict) if (folder / TRANSFORMER).exists() else {}


def _json(path: Path, kind: type[Any]) -> Any:
    check_no_pointers(path)
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[dict[str, Any]] if kind is list else dict[str, Any])
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}; fetch the model again") from error
    except msgspec.DecodeError as error:
        raise ExportError(f"{path} is damaged ({error}); fetch the model again") from error
