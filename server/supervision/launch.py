"""How a bundle's engine is started on a device, and what it will take there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from runtime import devices
from runtime.bundle import MANIFEST, BundleError, SamplingDefaults, Variant
from runtime.devices import CPU_SLOTS, LOGIT_ROWS, WORKSPACE, DeviceError
from runtime.footprint import encoder_footprint, footprint
from server.supervision.catalog import Catalog, Entry
from server.supervision.placement import Seat
from server.supervision.process import command

CONTEXT = 4096
"""Tokens a slot holds unless the model has fewer or somebody says otherwise: memory grows with it."""

Positive = Annotated[int, Meta(ge=1)]
GenerationConfig = Literal["auto", "none"]
"""auto: what a model's authors recommend, as its bundle has it. none: OpenAI's defaults. vLLM's names."""


class ModelOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a table `[models.NAME]` of the configuration says of one model; what is left out is as for every model."""

    device: tuple[str, ...] | None = None
    """Those of the server's devices that it may run on."""
    replicas: Positive | None = None
    """Engines, each on a device of its own, at most; without it one on each device."""
    variant: str | None = None
    slots: Positive | None = None
    context: Positive | None = None
    draft: str | None = None
    """A bundle with the same tokenizer, to guess tokens with."""
    draft_variant: str | None = None
    pinned: bool = False
    """It never makes room for another."""
    generation_config: GenerationConfig | None = None
    """Whether its authors' sampling holds where a request does not say."""
    sampling: SamplingDefaults | None = None
    """How tokens are drawn then; what is left out is as its authors recommend."""


@dataclass(frozen=True)
class Common:
    """What holds for every model that has no options of its own."""

    options: ModelOptions
    worker: Mapping[str, str | float | bool | None]
    """Further options of `runtime.worker`, by their names with underscores."""
    models: Mapping[str, ModelOptions]
    """By model."""

    def of(self, model: str) -> ModelOptions:
        """The options of a model, the common ones in place of what it leaves out."""
        own = self.models.get(model, ModelOptions())
        common = {name: getattr(self.options, name) for name in self.options.__struct_fields__ if getattr(own, name) is None}
        if own.sampling is not None and self.options.sampling is not None:
            common["sampling"] = own.sampling.over(self.options.sampling)
        return msgspec.structs.replace(own, **common)


def sampling_of(entry: Entry, options: ModelOptions) -> SamplingDefaults:
    """How tokens are drawn of a model with such options where a request does not say."""
    authors = SamplingDefaults() if options.generation_config == "none" else entry.bundle.sampling
    return (options.sampling or SamplingDefaults()).over(authors)


@dataclass(frozen=True)
class Launch:
    """An engine that can be started on a seat."""

    seat: Seat
    variant: str
    command: list[str]
    need: int
    """Bytes of the seat's memory, at its fullest."""
    why: str
    """How they come about."""


def launches(entry: Entry, common: Common, seats: Sequence[Seat], catalog: Catalog) -> list[Launch]:
    """How the engine of `entry` starts on each seat that it may and can run on.

    Raises BundleError or DeviceError, with the first seat's reason, where there is no such seat.
    """
    options = common.of(entry.name)
    allowed = [seat for seat in seats if options.device is None or {seat.name, str(seat.device)} & set(options.device)]
    if not allowed:
        raise DeviceError(
            f"the model {entry.name!r} may only run on {', '.join(options.device or ())}; this server has "
            f"{', '.join(seat.name for seat in seats)}"
        )
    found: list[Launch] = []
    reasons: list[BundleError | DeviceError] = []
    for seat in allowed:
        try:
            found.append(_launch(entry, options, common, seat, catalog))
        except (BundleError, DeviceError) as error:
            reasons.append(error)
    if not found:
        raise reasons[0]
    return found


def _launch(entry: Entry, options: ModelOptions, common: Common, seat: Seat, catalog: Catalog) -> Launch:
    variant = entry.bundle.for_device(seat.device.kind, options.variant)
    longest = entry.bundle.longest(variant)
    if entry.bundle.encoder is not None:
        return _launch_encoder(entry, variant, min(options.context or CONTEXT, longest), common, seat)
    context = options.context or min(CONTEXT, longest)
    if context > longest:
        raise BundleError(
            f"{variant.name} of bundle {entry.name!r} is made for {longest} tokens; a context of {context} is more"
        )
    on_cpu = variant.target == "cpu"
    slots = options.slots or (CPU_SLOTS if on_cpu else None)
    draft = None if options.draft is None else catalog.find(options.draft)
    guessing = None if draft is None else draft.bundle.for_device(seat.device.kind, options.draft_variant)
    need, why = _need(entry, variant, slots, context, seat)
    if draft is not None and guessing is not None and slots is not None:
        beside, reason = _need(draft, guessing, slots, context, seat)
        need, why = need + beside, f"{why}; and for {draft.name} {reason}"
    line = command(
        entry.folder,
        variant.name,
        build=entry.build,
        device=str(seat.device),
        slots=slots,
        context=context,
        cores=",".join(map(str, seat.cores)) or None,
        draft=None if draft is None else draft.folder,
        draft_variant=None if guessing is None else guessing.name,
        **common.worker,
    )
    return Launch(seat, variant.name, line, need, why)


def _launch_encoder(entry: Entry, variant: Variant, context: int, common: Common, seat: Seat) -> Launch:
    """For embeddings: there are no slots and no guesses, and a context that is meant for longer models is cut to this one's."""
    assert entry.bundle.encoder is not None
    full = encoder_footprint(variant, entry.bundle.encoder, context=context)
    cores = ",".join(map(str, seat.cores)) or None
    line = command(
        entry.folder, variant.name, build=entry.build, device=str(seat.device), context=context, cores=cores, **common.worker
    )
    return Launch(seat, variant.name, line, full.total, full.arithmetic())


def _need(entry: Entry, variant: Variant, slots: int | None, context: int, seat: Seat) -> tuple[int, str]:
    """Bytes that an engine takes at its fullest, and how they come about."""
    if variant.target == "cpu":
        full = footprint(variant, entry.bundle.vocab_size, slots=slots or CPU_SLOTS, context=context)
        return full.total, full.arithmetic()
    if slots is None:
        return seat.budget, "all that it may take, in as many slots as fit"
    weights = sum(file.size for file in entry.bundle.served(variant)) + LOGIT_ROWS * entry.bundle.vocab_size * 4
    rows = slots * variant.kv_bytes_per_token * context
    return (
        weights + rows + WORKSPACE,
        f"{weights >> 20:,} MiB of weights and logits, {slots} slots x {context} tokens x {variant.kv_bytes_per_token:,} bytes "
        f"= {rows >> 20:,} MiB, {WORKSPACE >> 20} MiB of workspace",
    )


def seats(wanted: Sequence[devices.Device], memory: int | None, gpu_share: float) -> list[Seat]:
    """The devices that were asked for, with what engines may take of each; a CPU that is named several times is shared out.

    `memory` is all that engines on the CPU may take, in bytes; None is `CPU_SHARE` of what the machine, or the container, has.
    Raises DeviceError.
    """
    shares = [device for device in wanted if device.kind == "cpu"]
    cores, there = devices.core_numbers(), memory or int(CPU_SHARE * devices.memory_limit())
    found: list[Seat] = []
    for device in wanted:
        if device.kind == "cuda":
            gpu = devices.gpu(device)
            found.append(Seat(str(device), device, int(gpu_share * gpu.total)))
        elif len(shares) == 1:
            found.append(Seat("cpu", device, there))
        else:
            place = sum(seat.device.kind == "cpu" for seat in found)
            own = tuple(cores[place * len(cores) // len(shares) : (place + 1) * len(cores) // len(shares)])
            own = own or (cores[place % len(cores)],)  # more engines than cores: some share one
            found.append(Seat(f"cpu#{place + 1}", device, there // len(shares), own))
    return found


CPU_SHARE = 0.8
"""Of the machine's memory, for engines on the CPU: the rest is for the other processes and the files that they read."""


def bytes_of(text: str) -> int:
    """The bytes that `12GiB`, `500MiB` or `8G` stand for. Raises ValueError."""
    units = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
    lower = text.strip().lower().removesuffix("b").removesuffix("i")
    unit = lower[-1:] if lower[-1:].isalpha() else ""
    number = float(lower.removesuffix(unit))
    if unit not in units or not 0 < number < float("inf"):
        raise ValueError(text)
    return int(number * units[unit])


def named(models: Sequence[str]) -> list[Path]:
    """Those of `models` that are folders of bundles rather than names."""
    return [Path(model) for model in models if (Path(model) / MANIFEST).is_file()]
