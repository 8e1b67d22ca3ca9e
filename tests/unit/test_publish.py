"""Publishing replaces bundles and nothing else: what stands in a bundle's place, or looks like one of its leftovers, stays."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import engineshed
from export import publish
from export.errors import ExportError
from export.recipe import Build
from runtime import bundle
from runtime.bundle import MANIFEST
from tests import tiny

FP32 = Build("cpu", "fp32")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under `folder` by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def export(*arguments: str | Path) -> int:
    """`engineshed export` in this process."""
    return engineshed.main(["export", *map(str, arguments)])


def copy(tiny_model: Path, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for file in tiny_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


# What is not replaced -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engines", [".", "../downloads", "link"])
def test_given_the_models_own_folder_in_the_bundles_place_when_exported_then_it_is_refused_before_anything_is_fetched(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], engines: str
) -> None:
    model = copy(tiny_model, tmp_path / "downloads" / "my-model")
    (model.parent / "link").symlink_to(".")
    monkeypatch.chdir(model.parent)
    before = contents(model.parent)
    assert export("./my-model", "--engines", engines, "--precision", "fp32", "--no-verify") == 1
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("Exporting my-model")
    assert last == (
        f"engineshed: {Path(engines) / 'my-model'} is there already and is no bundle (it has no bundle.json), and publishing "
        "would delete it; give another name with --name, or another folder with --engines"
    )
    assert contents(model.parent) == before


@pytest.mark.parametrize(
    "prepare",
    [
        lambda place: place.mkdir(),
        lambda place: (place / "notes").mkdir(parents=True),
        lambda place: place.write_text("mine"),
        lambda place: place.symlink_to("nowhere"),
        lambda place: place.symlink_to(place.parent.parent),
    ],
    ids=["an empty folder", "a folder", "a file", "a link to nothing", "a link to a folder"],
)
def test_given_something_else_in_the_bundles_place_when_checked_or_replaced_then_it_is_refused_and_stays(
    tmp_path: Path, prepare: Callable[[Path], object]
) -> None:
    engines, new = tmp_path / "engines", tmp_path / "engines" / ".tiny.1.new"
    new.mkdir(parents=True)
    prepare(engines / "tiny")
    before = sorted(os.listdir(engines))
    with pytest.raises(ExportError, match=r"tiny is there already and is no bundle"):
        publish.check_writable(engines, "tiny", None)
    with pytest.raises(ExportError, match=r"tiny is there already and is no bundle"):
        publish.replace(engines / "tiny", new, None)
    assert sorted(os.listdir(engines)) == before


def test_given_a_bundle_that_holds_the_model_when_exported_then_it_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    engines = tmp_path / "engines"
    model = copy(tiny_model, engines / tiny.NAME / "original")
    (engines / tiny.NAME / MANIFEST).write_text("{}")
    before = contents(engines)
    with pytest.raises(ExportError, match=r"tiny holds the model that is exported \(.*original\), which publishing there"):
        tiny.exporting(engines, verify=False).run(tiny.recipe(model, FP32))
    with pytest.raises(ExportError, match="holds the model"):
        publish.replace(engines / tiny.NAME, tmp_path / ".tiny.1.new", model / "model.safetensors")
    assert contents(engines) == before


def test_given_a_folder_that_appears_during_the_export_when_published_then_it_is_refused_and_stays(
    tmp_path: Path, tiny_model: Path
) -> None:
    place = tmp_path / "engines" / tiny.NAME

    class Busy(tiny.Silent):
        def begin(self, stage: str) -> None:
            if stage == "publish":
                place.mkdir()
                (place / "mine").write_text("mine")

    with pytest.raises(ExportError, match="is no bundle"), tiny.tracing_once():
        tiny.exporting(place.parent, verify=False, progress=Busy()).run(tiny.recipe(tiny_model, FP32))
    assert contents(place.parent) == {"tiny/mine": b"mine"}
    assert os.listdir(place.parent) == ["tiny"]


# What is replaced ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("manifest", ["", "{}", '{"format": 1}', "\x00" * 9])
def test_given_a_damaged_or_older_bundle_when_exported_then_it_is_replaced(
    tmp_path: Path, tiny_model: Path, manifest: str
) -> None:
    place = tmp_path / "engines" / tiny.NAME
    place.mkdir(parents=True)
    (place / MANIFEST).write_text(manifest)
    (place / "rest").touch()
    with tiny.tracing_once():
        assert tiny.exporting(place.parent, verify=False).run(tiny.recipe(tiny_model, FP32)) == place
    assert list(bundle.read(place).by_name) == ["cpu-fp32"]
    assert os.listdir(place.parent) == ["tiny"]
    assert not (place / "rest").exists()


def test_given_a_link_to_a_bundle_when_replaced_then_the_bundle_behind_it_stays(tmp_path: Path) -> None:
    elsewhere, engines = tmp_path / "elsewhere", tmp_path / "engines"
    elsewhere.mkdir()
    (elsewhere / MANIFEST).write_text("old")
    engines.mkdir()
    (engines / "tiny").symlink_to(elsewhere)
    with publish.workshop(engines, "tiny") as new:
        (new / MANIFEST).write_text("new")
        publish.replace(engines / "tiny", new, None)
    assert contents(engines) == {"tiny/bundle.json": b"new"}
    assert os.listdir(engines) == ["tiny"]
    assert (elsewhere / MANIFEST).read_text() == "old"


# What is left behind ------------------------------------------------------------------------------------------------------


def test_given_an_export_that_was_killed_while_publishing_when_exported_again_then_the_older_bundle_was_put_back(
    tmp_path: Path, dead: int
) -> None:
    retired = tmp_path / f".tiny.{dead}.old"
    retired.mkdir()
    (retired / MANIFEST).write_text("{}")
    (tmp_path / f".tiny.{dead}.new").mkdir()
    with publish.workshop(tmp_path, "tiny"):
        assert (tmp_path / "tiny" / MANIFEST).read_text() == "{}"
    assert os.listdir(tmp_path) == ["tiny"]


def test_given_what_an_export_of_this_number_left_when_exported_again_then_it_is_removed(tmp_path: Path) -> None:
    left = tmp_path / f".tiny.{os.getpid()}.new"
    left.mkdir()
    (left / "weights.bin").touch()
    with publish.workshop(tmp_path, "tiny") as folder:
        assert list(folder.iterdir()) == []


def test_given_folders_that_only_look_like_leftovers_when_exported_then_they_stay(tmp_path: Path, dead: int) -> None:
    theirs = [
        f".tiny.{dead}",
        f".tiny.{dead}.old.backup",
        f".tiny.5.{os.getppid()}.new",  # of a bundle tiny.5, which is being made
        f".tiny.{dead}5000000.new",
        ".tiny.².new",
        f".tiny.{dead}.old",  # is no bundle, and was none
    ]
    for name in theirs:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()
    with publish.workshop(tmp_path, "tiny"):
        pass
    assert sorted(os.listdir(tmp_path)) == sorted(theirs)
