"""Contradictions in what a configuration says of positions, of which a library takes one side without a word."""

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

from export.errors import ExportError

_SAME_KIND = {"su": "longrope", "mrope": "default"}
"""Older names of kinds of rotary positions."""
_OLD, _NEW = "rope_scaling", "rope_parameters"
_ORIGINAL = "original_max_position_embeddings"
_BESIDE = ("rope_theta", _ORIGINAL, "partial_rotary_factor")
"""Settings that stand in the scaling, or beside it."""


def check(config: dict[str, Any], where: object) -> None:
    """Refuse a configuration (of the file `where`) that says two things of one setting. Raises ExportError."""
    for place, part in (("", config), ("text_config.", config.get("text_config"))):
        if isinstance(part, dict) and (found := next(_contradictions(part), None)):
            first, second = found
            raise ExportError(
                f"{where} contradicts itself: {place}{first}, and {place}{second}; transformers takes one of them without a "
                "word, so delete the one that is not meant"
            )


def check_loaded(config: dict[str, Any], loaded: PreTrainedConfig, where: object) -> None:
    """Refuse a length that a configuration (of the file `where`) names and transformers, which `loaded` it, does not take."""
    for place, part, taken in (("", config, loaded), ("text_config.", config.get("text_config"), loaded.get_text_config())):
        named = part.get(_ORIGINAL) if isinstance(part, dict) else None
        scaling = getattr(taken, _NEW, None)
        used = scaling.get(_ORIGINAL) if isinstance(scaling, dict) and _is_one_scaling(scaling) else None
        if _differ(named, used):
            raise ExportError(
                f"{where} names {place}{_ORIGINAL} {named!r}, and transformers takes {used!r}: it looks for it within {_OLD}; "
                "put it there"
            )


def _contradictions(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Pairs of entries that say different things of one setting, each as it stands there."""
    scalings = {name: config[name] for name in (_OLD, _NEW) if _is_one_scaling(config.get(name))}
    for name, scaling in scalings.items():
        if "type" in scaling and "rope_type" in scaling and _kind(scaling["type"]) != _kind(scaling["rope_type"]):
            yield f"{name}.type is {scaling['type']!r}", f"{name}.rope_type is {scaling['rope_type']!r}"
        for key in _BESIDE:
            if _differ(scaling.get(key), config.get(key)):
                yield f"{name}.{key} is {scaling[key]!r}", f"{key} is {config[key]!r}"
    if len(scalings) == 2:
        old, new = (dict(scaling) for scaling in scalings.values())
        for scaling in (old, new):
            scaling["rope_type"] = _kind(scaling.pop("rope_type", scaling.pop("type", "default")))
        for key in old.keys() & new.keys():
            if _differ(old[key], new[key]):
                yield f"{_OLD}.{key} is {old[key]!r}", f"{_NEW}.{key} is {new[key]!r}"


def _is_one_scaling(value: object) -> bool:
    """Whether it is a scaling, and not one for each type of layer."""
    return isinstance(value, dict) and not any(isinstance(inner, dict) for inner in value.values())


def _kind(name: object) -> object:
    return _SAME_KIND.get(name, name) if isinstance(name, str) else name


def _differ(one: object, other: object) -> bool:
    return one is not None and other is not None and one != other
