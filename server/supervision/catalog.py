"""The bundles that can be served: those in the engines' folder, and those that were named by a path of their own."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime import bundle as bundles
from runtime.bundle import MANIFEST, Bundle, BundleError


@dataclass(frozen=True)
class Entry:
    """A bundle as it stood when its manifest was read."""

    name: str
    """What requests call it: its folder's name, or with a path of its own the bundle's."""
    folder: Path
    bundle: Bundle
    build: str
    """The manifest's SHA-256 in hexadecimal."""


class Catalog:
    """What can be asked for by which name; a name is looked up here and never becomes part of a path."""

    def __init__(self, engines: Path, named: Sequence[Path] = ()) -> None:
        """`named` are folders of bundles outside `engines`."""
        self._engines, self._named = engines, named
        self._entries: dict[str, Entry | BundleError] = {}
        self._stamps: dict[Path, tuple[int, int, int]] = {}
        self.refresh()

    @property
    def entries(self) -> dict[str, Entry | BundleError]:
        """By name in alphabetical order, those with a path of their own first; a damaged bundle is an error in its place."""
        return self._entries

    def find(self, name: str) -> Entry:
        """The bundle called `name`. Raises BundleError, which names those there are."""
        match self._entries.get(name):
            case Entry() as entry:
                return entry
            case BundleError() as error:
                raise error
            case None:
                there = ", ".join(self._entries)
                raise BundleError(
                    f"there is no bundle {name!r} in {self._engines}, which has {there}; see: engineshed engines"
                    if there
                    else f"there is no engine bundle in {self._engines}; build one with: engineshed export"
                )

    def refresh(self) -> bool:
        """Look for bundles that came, went or were built anew; True if any did. Reads only what changed."""
        folders = [*self._named, *(manifest.parent for manifest in sorted(self._engines.glob(f"*/{MANIFEST}")))]
        stamps = {folder: stamp for folder in folders if not folder.name.startswith(".") and (stamp := _stamp(folder))}
        if stamps == self._stamps:
            return False
        known = {entry.folder: entry for entry in self._entries.values() if isinstance(entry, Entry)}
        entries: dict[str, Entry | BundleError] = {}
        for folder, stamp in stamps.items():
            unchanged = known.get(folder) if self._stamps.get(folder) == stamp else None
            name, entry = (unchanged.name, unchanged) if unchanged is not None else self._read(folder)
            entries.setdefault(name, entry)
        self._entries, self._stamps = entries, stamps
        return True

    def _read(self, folder: Path) -> tuple[str, Entry | BundleError]:
        name = folder.name
        try:
            build = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
            bundle = bundles.read(folder)
        except OSError as error:
            return name, BundleError(f"{folder / MANIFEST} cannot be read ({error.strerror})")
        except BundleError as error:
            return name, error
        if folder in self._named:
            name = bundle.name
        return name, Entry(name, folder, bundle, build)


def _stamp(folder: Path) -> tuple[int, int, int] | None:
    """Changes when the manifest is written or replaced; None where there is none."""
    try:
        status = (folder / MANIFEST).stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
