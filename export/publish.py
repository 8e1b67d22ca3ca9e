"""How a bundle comes into being: built in a hidden folder beside its place, then renamed, so that it is whole or not there."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from export.errors import ExportError
from runtime import bundle
from runtime.bundle import Bundle, Variant

RETIRED = ".old"
"""Ends the name of a bundle that is being replaced."""


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def workshop(engines: Path, name: str) -> Iterator[Path]:
    """A folder in `engines` for the bundle-to-be, which is gone afterwards whatever happens.

    Turns errors of the disk into ExportError. Folders that a killed export has left behind are removed first.
    """
    folder = engines / f".{name}.{os.getpid()}"
    try:
        _sweep(engines, name)
        folder.mkdir(parents=True)
        yield folder
    except OSError as error:
        if error.errno in _FULL:
            free = shutil.disk_usage(engines).free >> 20
            raise ExportError(
                f"the disk that holds {engines} is full ({free} MiB free): {error.strerror}; free some space or give "
                "another folder with --engines. Nothing was published"
            ) from error
        raise ExportError(f"{engines} cannot be written: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_writable(engines: Path) -> None:
    """Refuse a place where no bundle can be written, before anything is loaded. Raises ExportError."""
    place = engines
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise ExportError(f"{engines} cannot be written: {place} is a file; give a folder with --engines")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        if error.errno in _FULL:
            return  # what is written later says how much is free
        raise ExportError(f"{engines} cannot be written: {error.strerror}; give another folder with --engines") from error


def keep_variants(old: Path, new: Path, made: Bundle) -> tuple[Variant, ...]:
    """Carry variants of the bundle `old` that `made` lacks into its folder `new`, if weights and use are the same.

    A variant whose files are not those that were exported is left behind.
    """
    try:
        previous = bundle.read(old)
    except bundle.BundleError:
        return ()
    if previous.source.sha256 is None or previous.source.sha256 != made.source.sha256:
        return ()
    if _use(previous) != _use(made):
        return ()
    built = {variant.name for variant in made.variants}
    kept = tuple(variant for variant in previous.variants if variant.name not in built and _intact(old, variant))
    for file in (file for variant in kept for file in variant.files):
        target = new / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(old / file.path, target)
        except OSError:  # a file system without hard links
            shutil.copyfile(old / file.path, target)
    return kept


def _use(of: Bundle) -> tuple[object, ...]:
    """What the variants of a bundle have in common: how they were made, and what they were proved for."""
    return of.task, of.pooling, of.encoder, of.architecture, of.vocab_size, of.max_length


def _intact(folder: Path, variant: Variant) -> bool:
    return all(bundle.sha256(folder / file.path) == file.sha256 for file in variant.files)


def replace(folder: Path, new: Path) -> None:
    """Put `new` in the place of `folder` by two renames: a reader sees the old bundle, for a moment none, or the new one."""
    retired = new.with_name(new.name + RETIRED)
    if folder.exists():
        folder.rename(retired)
    try:
        new.rename(folder)
    except OSError:
        if retired.exists():
            retired.rename(folder)
        raise
    shutil.rmtree(retired, ignore_errors=True)


def _sweep(engines: Path, name: str) -> None:
    for left in engines.glob(f".{name}.*"):
        pid = left.name.removeprefix(f".{name}.").partition(".")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            if left.suffix == RETIRED and not (engines / name).exists():
                left.rename(engines / name)  # killed between the two renames of `replace`
            else:
                shutil.rmtree(left, ignore_errors=True)
