"""Which peers there are, in which settings, and which of them are installed."""

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from runtime.bundle import Bundle

FOLDER = Path(__file__).parents[1] / ".peers"
"""Where `make bench-peers` puts virtual environments and models."""


@dataclass(frozen=True)
class Peer:
    """One runtime in one setting."""

    what: str
    """As "llama.cpp Q4_1"."""
    python: Path
    module: str
    """The driver, run with `python -m`."""
    model: Path
    name: str
    """The setting in the driver's own words."""
    bits: int
    """Of most weights: whom it is fair to compare with."""


def own(folder: Path, variant: str) -> Peer:
    """This runtime, on a variant of the bundle in `folder`."""
    bits = {"int4": 4, "int8": 8, "fp16": 16, "bf16": 16}.get(variant.rpartition("-")[2], 32)
    return Peer(f"engineshed {variant}", Path(sys.executable), "bench.peers.own", folder.resolve(), variant, bits)


def catalog(folder: Path = FOLDER) -> dict[str, tuple[Peer, ...]]:
    """Every peer by the name that the command line has for it, installed under `folder` or not."""

    def peer(what: str, home: str, model: str, name: str, bits: int) -> Peer:
        return Peer(what, folder / home / "bin" / "python", f"bench.peers.{home}", folder / model, name, bits)

    return {
        "llama": (
            peer("llama.cpp Q4_1", "llama", "gguf/Q4_1.gguf", "Q4_1", 4),
            peer("llama.cpp Q4_0", "llama", "gguf/Q4_0.gguf", "Q4_0", 4),
            peer("llama.cpp Q8_0", "llama", "gguf/Q8_0.gguf", "Q8_0", 8),
        ),
        "genai": (
            peer("onnxruntime-genai int4", "genai", "genai-int4", "int4", 4),
            peer("onnxruntime-genai fp32", "genai", "genai-fp32", "fp32", 32),
        ),
        "openvino": (
            peer("openvino-genai int4", "openvino", "openvino-int4", "int4", 4),
            peer("openvino-genai int8", "openvino", "openvino-int8", "int8", 8),
        ),
        "transformers": (peer("transformers fp32", "transformers", "model", "fp32", 32),),
    }


def chosen(names: Iterable[str], manifest: Bundle, folder: Path = FOLDER) -> tuple[list[Peer], list[str]]:
    """The peers called `names` ("all" means every one, "none" none) that are installed, and a line about each other.

    Raises ValueError at a name that there is not.
    """
    there = catalog(folder)
    wanted = list(dict.fromkeys(name for given in names for name in (there if given == "all" else [given]) if name != "none"))
    unknown = [name for name in wanted if name not in there]
    if unknown:
        raise ValueError(f"there is no peer {unknown[0]!r}; there are {', '.join(there)}")
    if wanted and not _same_model(manifest, folder):
        return [], [
            f"peers are left out: none are installed for {manifest.name} ({manifest.source.name}); run: make bench-peers"
        ]
    found, missing = [], []
    for name in wanted:
        for peer in there[name]:
            if os.access(peer.python, os.X_OK) and peer.model.exists():
                found.append(peer)
            else:
                missing.append(f"{peer.what} is left out: it is not installed; run: make bench-peers")
    return found, missing


def _same_model(manifest: Bundle, folder: Path) -> bool:
    """Whether the peers' models were made of the weights that the bundle was made of."""
    try:
        source = json.loads((folder / "model" / "source.json").read_text())
    except (OSError, ValueError):
        return False
    return manifest.source.sha256 is not None and source == {"sha256": manifest.source.sha256}
