"""runtime.bundle: what is read back is what was written, and nothing damaged, foreign or outside passes for a bundle."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from runtime import bundle
from runtime.bundle import (
    MANIFEST,
    TOKENIZER,
    Bundle,
    BundleError,
    File,
    Layer,
    Perplexity,
    Precision,
    Source,
    Target,
    Variant,
    Verification,
)

AGAIN = "export the model again"
Change = Callable[[dict[str, Any]], object]


def variant(folder: Path, target: Target, precision: Precision, size: int) -> Variant:
    """A variant whose model is `size` bytes under `folder`."""
    name = f"{target}-{precision}"
    (folder / name).mkdir()
    (folder / name / "model.onnx").write_bytes(b"m" * size)
    file = bundle.describe(folder, f"{name}/model.onnx")
    return Variant(
        name=name,
        target=target,
        precision=precision,
        kv_dtype="float32",
        model=file.path,
        files=(file,),
        layers=(Layer(0, 2, 16, 24), Layer(3, 1, 8, 8)),
        builder="test 1.0",
        verification=Verification("transformers 5, fp32", 6, 144, 140),
        perplexity=Perplexity("text.txt", 600, 12.5, 12.25),
    )


@pytest.fixture
def written(tmp_path: Path) -> Bundle:
    """The manifest of the bundle at `folder`."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / TOKENIZER).write_text("{}")
    manifest = Bundle(
        format=bundle.FORMAT,
        name="tiny",
        source=Source("hub", "me/tiny", revision="abc", sha256="0" * 64, license="MIT"),
        architecture="llama",
        vocab_size=512,
        max_length=256,
        stop_ids=(2, 7),
        special_tokens={"bos_token": "<s>"},
        files=(bundle.describe(folder, TOKENIZER),),
        variants=(
            variant(folder, "cpu", "fp32", 400),
            variant(folder, "cpu", "int4", 100),
            variant(folder, "cuda", "fp16", 50),
        ),
        created=1_700_000_000,
    )
    (folder / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    return manifest


@pytest.fixture
def folder(tmp_path: Path, written: Bundle) -> Path:
    return tmp_path / written.name


def change(folder: Path, how: Change) -> None:
    """Edit the manifest in `folder` as the JSON that it is."""
    manifest = json.loads((folder / MANIFEST).read_text())
    how(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def refusal(folder: Path) -> str:
    """The sentence with which the bundle in `folder` is refused."""
    with pytest.raises(BundleError) as refused:
        bundle.read(folder)
    return str(refused.value)


def test_given_a_written_bundle_when_read_then_nothing_is_lost(folder: Path, written: Bundle) -> None:
    assert bundle.read(folder) == written


def test_given_a_variant_when_its_kv_is_counted_then_all_layers_keys_and_values_are_in_it(written: Bundle) -> None:
    assert written.by_name["cpu-fp32"].kv_bytes_per_token == 4 * (2 * (16 + 24) + 1 * (8 + 8))
    half = msgspec.structs.replace(written.by_name["cpu-fp32"], kv_dtype="bfloat16")
    assert half.kv_bytes_per_token == 2 * (2 * (16 + 24) + 1 * (8 + 8))


def test_given_several_variants_when_none_is_named_then_the_smallest_for_the_target_is_taken(written: Bundle) -> None:
    assert written.variant().name == "cpu-int4"
    assert written.variant(target="cuda").name == "cuda-fp16"
    assert written.variant("cpu-fp32").name == "cpu-fp32"


def test_given_an_unknown_variant_when_asked_for_then_the_error_lists_those_there_are(written: Bundle) -> None:
    with pytest.raises(BundleError, match=r"'tiny' has no variant 'cpu-int8'; it has cpu-fp32, cpu-int4, cuda-fp16"):
        written.variant("cpu-int8")


def test_given_no_variant_for_a_target_when_asked_for_then_the_error_says_how_to_build_one(written: Bundle) -> None:
    with pytest.raises(BundleError, match="engineshed export --target tensorrt me/tiny"):
        written.variant(target="tensorrt")


def test_given_a_folder_without_a_manifest_when_read_then_the_error_says_what_to_run(tmp_path: Path) -> None:
    assert "build one with: engineshed export" in refusal(tmp_path)
    assert "build one with: engineshed export" in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "{}",
        '{"format": "1"}',
        f'{{"format": {bundle.FORMAT}}}',
        f'{{"format": {bundle.FORMAT}, "x": ' + "[" * 100_000,
        "\ud800",
    ],
    ids=["empty", "cut off", "null", "a list", "no format", "format a text", "only format", "bottomless", "no UTF-8"],
)
def test_given_damaged_json_when_read_then_it_is_refused_as_damaged(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_bytes(text.encode("utf-8", "surrogatepass"))
    assert refusal(folder).startswith(f"{folder / MANIFEST} is damaged (")
    assert AGAIN in refusal(folder)


def test_given_a_manifest_that_is_no_file_when_read_then_the_error_says_why(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).mkdir()
    assert refusal(folder) == f"{folder / MANIFEST} cannot be read: Is a directory"


def test_given_a_manifest_of_another_format_when_read_then_both_formats_are_named_before_its_fields(folder: Path) -> None:
    change(folder, lambda manifest: manifest.update(format=bundle.FORMAT + 1, invention=1))
    assert f"has format {bundle.FORMAT + 1}, this program reads format {bundle.FORMAT}" in refusal(folder)
    assert AGAIN in refusal(folder)


@pytest.mark.parametrize(
    ("how", "place"),
    [
        (lambda manifest: manifest.update(colour="red"), "colour"),
        (lambda manifest: manifest["variants"][1].update(colour="red"), "colour` - at `$.variants[1]"),
        (lambda manifest: manifest["variants"][1].update(precision="int3"), "int3"),
        (lambda manifest: manifest["variants"][1]["layers"][0].pop("kv_heads"), "kv_heads"),
        (lambda manifest: manifest.update(vocab_size="many"), "$.vocab_size"),
    ],
)
def test_given_fields_that_are_unknown_or_wrong_when_read_then_the_error_names_them(
    folder: Path, how: Change, place: str
) -> None:
    change(folder, how)
    assert place in refusal(folder)
    assert "is damaged" in refusal(folder)


@pytest.mark.parametrize("path", [TOKENIZER, "cpu-int4/model.onnx"])
def test_given_a_missing_file_when_read_then_the_error_names_it(folder: Path, path: str) -> None:
    (folder / path).unlink()
    assert refusal(folder) == f"{folder / path} is missing; {AGAIN}"


def test_given_a_file_of_another_size_when_read_then_the_error_gives_both(folder: Path) -> None:
    (folder / "cpu-int4" / "model.onnx").write_bytes(b"m" * 99)
    assert "has 99 bytes where the manifest says 100" in refusal(folder)
    assert AGAIN in refusal(folder)


@pytest.mark.parametrize("path", ["../outside", "/etc/hostname", "cpu-int4/../../outside", "link/outside", "linked"])
def test_given_a_path_outside_the_folder_when_read_then_it_is_refused(folder: Path, path: str) -> None:
    (folder.parent / "outside").write_text("x")
    (folder / "link").symlink_to(folder.parent)
    (folder / "linked").symlink_to(folder.parent / "outside")
    change(folder, lambda manifest: manifest["files"].append({"path": path, "sha256": "", "size": 1}))
    assert refusal(folder) == f"{folder / MANIFEST} names {path!r}, which lies outside the bundle; {AGAIN}"


@pytest.mark.parametrize("path", ["circle", "circle/model.onnx", "null\0byte", "long" * 100])
def test_given_a_path_that_leads_nowhere_when_read_then_it_is_refused(folder: Path, path: str) -> None:
    (folder / "circle").symlink_to(folder / "circle")
    change(folder, lambda manifest: manifest["files"].append({"path": path, "sha256": "", "size": 1}))
    sentences = (f"names {path!r}, which cannot be looked up", f"{folder / path} is missing")  # as the Python version has it
    assert any(sentence in refusal(folder) for sentence in sentences)
    assert AGAIN in refusal(folder)


def test_given_a_bundle_behind_a_link_when_read_then_its_files_count_as_inside(folder: Path, written: Bundle) -> None:
    (folder.parent / "alias").symlink_to(folder)
    assert bundle.read(folder.parent / "alias") == written


def test_given_a_variant_whose_model_is_not_among_its_files_when_read_then_it_is_refused(folder: Path) -> None:
    change(folder, lambda manifest: manifest["variants"][1].update(model="cpu-fp32/model.onnx"))
    assert "variant 'cpu-int4' needs 'cpu-fp32/model.onnx', which is not among its files" in refusal(folder)
    assert AGAIN in refusal(folder)


def test_given_an_untouched_bundle_when_verified_then_nothing_is_raised(folder: Path, written: Bundle) -> None:
    for one in written.variants:
        bundle.verify(folder, written.served(one))


@pytest.mark.parametrize("path", [TOKENIZER, "cpu-int4/model.onnx"])
def test_given_a_changed_byte_when_verified_then_the_file_is_named(folder: Path, written: Bundle, path: str) -> None:
    data = bytearray((folder / path).read_bytes())
    data[-1] ^= 1
    (folder / path).write_bytes(data)
    assert bundle.read(folder) == written
    with pytest.raises(BundleError, match=rf"{path} is not the file that was exported .*{AGAIN}"):
        bundle.verify(folder, written.served(written.by_name["cpu-int4"]))


def test_given_a_changed_byte_in_another_variant_when_verified_then_it_does_not_matter(folder: Path, written: Bundle) -> None:
    (folder / "cpu-fp32" / "model.onnx").write_bytes(b"x" * 400)
    bundle.verify(folder, written.served(written.by_name["cpu-int4"]))


def test_given_a_file_that_went_away_when_verified_then_it_is_named(folder: Path, written: Bundle) -> None:
    (folder / TOKENIZER).unlink()
    with pytest.raises(BundleError, match=rf"{TOKENIZER} cannot be read .*{AGAIN}"):
        bundle.verify(folder, written.served(written.by_name["cpu-int4"]))


def test_given_one_damaged_bundle_when_scanned_then_the_others_are_there_and_it_is_an_error(
    folder: Path, written: Bundle
) -> None:
    root = folder.parent
    shutil.copytree(folder, root / "another")
    shutil.copytree(folder, root / "broken")
    (root / "broken" / TOKENIZER).unlink()
    shutil.copytree(folder, root / ".tiny.123")  # an export under way
    (root / "no-bundle").mkdir()
    (root / "recipe.toml").write_text("")
    found = bundle.scan(root)
    assert list(found) == ["another", "broken", "tiny"]
    assert found["another"] == found["tiny"] == written
    assert isinstance(found["broken"], BundleError)
    assert str(root / "broken" / TOKENIZER) in str(found["broken"])


def test_given_no_folder_of_bundles_when_scanned_then_none_are_found(tmp_path: Path) -> None:
    assert bundle.scan(tmp_path / "nowhere") == {}


def test_given_a_file_when_described_then_size_and_digest_are_its_own(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1: the digest of "abc".
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert bundle.describe(tmp_path, "a") == File("a", digest, 3)
