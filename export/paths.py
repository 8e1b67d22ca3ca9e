"""Paths that someone gave, or that a model's files name: what the system says of them in a sentence, and which of them are the
model's own.
"""

from pathlib import Path

from export.errors import ExportError


def exists(path: Path) -> bool:
    """Whether something is at `path`; a link that leads nowhere is nothing. Raises ExportError where that cannot be told."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # without the right to look, too long, links in a circle; a null byte
        raise _not_looked_up(path, error) from error
    return True


def expanded(path: str) -> Path:
    """`path`, whose `~` stands for a user's home. Raises ExportError where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ExportError(f"{path} begins with a user's home that cannot be found; write the path out") from error


def check_inside(folder: Path, *paths: Path) -> None:
    """Refuse paths that lead out of the folder of a model, through links or without; a hub snapshot's links into its own blobs
    are meant. Raises ExportError.
    """
    home = folder.resolve()
    above = (home, *home.parents)
    inside = [home, *((place.parent.parent / "blobs").resolve() for place in above if place.parent.name == "snapshots")]
    for path in paths:
        try:
            target = path.resolve()
        except (OSError, RuntimeError, ValueError) as error:  # links that lead in a circle are a RuntimeError
            raise _not_looked_up(path, error) from error
        if not any(target.is_relative_to(place) for place in inside):
            raise ExportError(
                f"{path} leads out of the model's folder (to {target}), so what would be read is not part of the model; put "
                "the file itself there"
            )


def _not_looked_up(path: Path, error: Exception) -> ExportError:
    said = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return ExportError(
        f"{path} cannot be looked up ({said}); correct the path, or the rights of the folders that it leads through"
    )
