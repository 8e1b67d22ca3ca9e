"""OpenAI's system_fingerprint: as long as it is the same, the same seed gives the same tokens."""

import hashlib
from collections.abc import Iterable
from typing import Any

import msgspec

from runtime.bundle import Bundle, SamplingDefaults, Variant


def fingerprint(bundle: Bundle, variant: Variant, kernels: str, sampling: SamplingDefaults) -> str:
    """Changes with all that decides a token of `variant`, and with nothing else: its graph and weights, its tokenizer,
    templates and stop tokens, what computes (`kernels`), and how tokens are drawn where a request does not say.

    A draft engine is not among it: what it guesses is verified.
    """
    decisive = (
        sorted((file.path, file.sha256) for file in bundle.served(variant)),
        (variant.name, variant.kv_dtype),
        (bundle.special_tokens, bundle.stop_ids, bundle.tools),
        kernels,
        sampling,
    )
    return _hash(decisive)


def together(fingerprints: Iterable[str]) -> str:
    """That of a request's answers, which engines with these `fingerprints` give: where all have the same, it is that one."""
    different = sorted(set(fingerprints))
    return different[0] if len(different) == 1 else _hash(different)


def _hash(decisive: Any) -> str:
    return f"fp_{hashlib.sha256(msgspec.json.encode(decisive, order='deterministic')).hexdigest()[:10]}"
