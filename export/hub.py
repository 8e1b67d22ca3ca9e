"""What a repository of the Hugging Face hub holds, and which of its files make a model, before any of them is fetched."""

import difflib
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from export import gguf_parts
from export.checkpoint_files import CONFIG, read_config, weight_names
from export.errors import ExportError
from export.library_messages import in_few_words
from export.recipe import ModelReference
from export.sentence import MODULES

TIMEOUT_SECONDS = 10.0
"""How long the hub may take to say what a repository holds."""
_TEXTS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "LICENSE*")
_WEIGHTS = "*.safetensors"
_PICKLED = "pytorch_model*.bin"
_CODE = "*.py"
_ELSEWHERE = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".safetensors")
"""Ends the names of weights that transformers does not look at where they are."""


def listing(reference: ModelReference) -> tuple[str, ...] | None:
    """The paths of all files of the repository; None where the hub does not say, and fetching will say why.

    Raises HFValidationError for what is not a hub id.
    """
    assert reference.hub is not None
    try:
        found = HfApi().model_info(reference.hub, revision=reference.revision, timeout=TIMEOUT_SECONDS).siblings
    except HFValidationError:
        raise
    except Exception:  # whatever the network does; a model that was fetched earlier is taken without it
        return None
    return None if found is None else tuple(sorted(file.rfilename for file in found))


def patterns(reference: ModelReference, names: Sequence[str] | None, *, trust_remote_code: bool) -> list[str]:
    """The files to fetch first, of those called `names`: the GGUF that is named, else all but the weights (see `weights`).

    Where the hub does not tell the names, weights are among them. Raises ExportError where all of them make no model.
    """
    if names is not None:
        _check(reference, names)
    if reference.file is not None:
        return list(gguf_parts.names(reference.file))
    return [*_TEXTS, *([_WEIGHTS] if names is None else []), *([_CODE] if trust_remote_code else [])]


def weights(folder: Path, names: Sequence[str]) -> list[str]:
    """The files of weights to fetch, of those called `names`, by what is in `folder` already. Raises ExportError.

    What transformers loads, and what stands behind it in an embedding model; not the same again in its authors' own format.
    """
    loaded, _ = weight_names(folder, read_config(folder), names.__contains__)
    behind = [name for name in names if name.count("/") == 1 and name.endswith("/model.safetensors")]
    return [*loaded, *(behind if MODULES in names else [])]


def unreachable(reference: ModelReference, error: Exception) -> str:
    """Why the hub did not give the model, and what to do."""
    match error:
        case GatedRepoError():
            return "the hub gives it only to those who accepted its terms: do so on its page, then `hf auth login`"
        case RepositoryNotFoundError():
            return "the hub has no such model, or it is not open to you; check its name, or `hf auth login`"
        case RevisionNotFoundError():
            return f"the hub has no revision {reference.revision!r} of it; check --revision"
        case HfHubHTTPError():
            return f"the hub refused it ({in_few_words(str(error))}); try again later"
        case _:
            return "it could not be fetched from the hub; check the network, or give a local folder"


def _check(reference: ModelReference, names: Sequence[str]) -> None:
    """Refuse a repository without the file that is named, or without a model that can be loaded from it."""
    ggufs = sorted({gguf_parts.names(name)[0] for name in names if name.endswith(".gguf") and "mmproj" not in name})
    if reference.file is not None:
        lost = [name for name in gguf_parts.names(reference.file) if name not in names]
        if lost:
            close = difflib.get_close_matches(lost[0], ggufs, 3, 0.6) or ggufs
            there = f"it has {_listed(close)}" if close else "it has no GGUF files"
            raise ExportError(f"{reference.hub} has no file {lost[0]}; {there}")
        return
    weights = [name for name in names if "/" not in name and (name.endswith(".safetensors") or fnmatch(name, _PICKLED))]
    if ggufs and (CONFIG not in names or not weights):
        raise ExportError(
            f"{reference.hub} holds only GGUF files ({_listed(ggufs)}); name one of them: {reference.hub}:{ggufs[0]}"
        )
    if not any(name.endswith(".json") for name in names):
        raise ExportError(
            f"{reference.hub} has no {CONFIG} and no GGUF file (it has {_listed(names) or 'nothing'}), so it is not a language "
            "model that transformers can load; give another"
        )
    if CONFIG in names and not weights:
        others = [name for name in names if name.endswith(_ELSEWHERE)]
        has = f"; it has {_listed(others)}, which transformers does not load" if others else ""
        raise ExportError(f"{reference.hub} has a {CONFIG} but no weights (model.safetensors, pytorch_model.bin){has}")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
