"""How a bundle comes into being: built in a hidden folder beside its place, then renamed, so that it is whole or not there."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from export.errors import ExportError
from export.paths import exists
from runtime import bundle
from runtime.bundle import MANIFEST, Bundle, Variant

COMING, RETIRED = ".new", ".old"
"""End the names of a bundle-to-be, and of the bundle that it replaces."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def workshop(engines: Path, name: str) -> Iterator[Path]:
    """A folder in `engines` for the bundle-to-be, which is gone afterwards whatever happens.

    Turns errors of the disk into ExportError. Folders that a killed export has left behind are removed first.
    """
    folder = engines / f".{name}.{os.getpid()}{COMING}"
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


def check_writable(engines: Path, name: str, source: Path | None) -> None:
    """Refuse a place where the bundle `name` cannot be written or would take the place of something else, before anything is
    fetched; `source` is where the model is, if that is known. Raises ExportError.
    """
    place, missing = engines, []
    while not exists(place) and place != place.parent:
        if place.is_symlink():
            raise ExportError(
                f"{engines} cannot be written: {place} is a link that leads nowhere; give a folder with --engines"
            )
        missing.append(place.name)
        place = place.parent
    if not place.is_dir():
        raise ExportError(f"{engines} cannot be written: {place} is a file; give a folder with --engines")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        if error.errno not in _FULL:  # of which is told later, with how much is free
            raise ExportError(f"{engines} cannot be written: {error.strerror}; give another folder with --engines") from error
    for part in missing:
        exists(place / part)  # which is refused where the name is too long, and could not be told below what is not there
    check_replaceable(engines / name, source)


def check_replaceable(folder: Path, source: Path | None) -> None:
    """Refuse to put a bundle in the place of anything but a bundle, or of the model at `source`. Raises ExportError.

    What has a manifest is a bundle, damaged or of another format though it may be.
    """
    if not os.path.lexists(folder):
        return
    if not exists(folder / MANIFEST):
        raise ExportError(
            f"{folder} is there already and is no bundle (it has no {MANIFEST}), and publishing would delete it; give another "
            "name with --name, or another folder with --engines"
        )
    if source is not None and exists(source) and _holds(folder, source):
        raise ExportError(
            f"{folder} holds the model that is exported ({source}), which publishing there would delete; give another name "
            "with --name, or another folder with --engines"
        )


def _holds(folder: Path, path: Path) -> bool:
    """Whether `path` is `folder` or lies in it, by whatever names and links."""
    path = path.resolve()
    return any(folder.samefile(place) for place in (path, *path.parents))


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


def replace(folder: Path, new: Path, source: Path | None) -> None:
    """Put `new` in the place of `folder` by two renames: a reader sees the old bundle, for a moment none, or the new one.

    Raises ExportError where `folder` is no bundle, or holds the model at `source`.
    """
    check_replaceable(folder, source)
    retired = new.with_suffix(RETIRED)
    if folder.exists():
        folder.rename(retired)
    try:
        new.rename(folder)
    except OSError:
        if retired.exists():
            retired.rename(folder)
        raise
    _remove(retired)


def _remove(folder: Path) -> None:
    """Delete a folder as far as possible; of a link to one the link alone."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(engines: Path, name: str) -> None:
    """Remove what a killed export of the bundle `name` has left, or put the older bundle back that it had taken away.

    It may have had the number of this process: a container's have the same few.
    """
    ours = re.compile(rf"\.{re.escape(name)}\.(?P<pid>[0-9]{{1,7}})(?:{re.escape(COMING)}|{re.escape(RETIRED)})")
    for left in engines.glob(f".{name}.*"):
        found = ours.fullmatch(left.name)
        if found is None or (int(found["pid"]) != os.getpid() and psutil.pid_exists(int(found["pid"]))):
            continue
        if left.suffix == RETIRED and not os.path.lexists(engines / name):
            if exists(left / MANIFEST):
                left.rename(engines / name)  # killed between the two renames of `replace`
        else:
            _remove(left)
