"""A bundle's plans, built anew for another GPU or another TensorRT from the ONNX files beside them; needs no torch.

`python -m export.rebuild BUNDLE VARIANT --gpu 8.9 --cache FOLDER` prints the variant as JSON, its plans by absolute paths.
"""

import argparse
import hashlib
import os
import shutil
import sys
from pathlib import Path

import msgspec

from export.errors import ExportError
from export.tensorrt import ADORNED_PLAN, MODEL_PLAN, SAMPLER_PLAN, Builder
from runtime import bundle
from runtime.bundle import BundleError, File, Variant


def rebuild(folder: Path, variant: Variant, gpu: str, cache: Path) -> Variant:
    """`variant` of the bundle in `folder` with plans for a GPU of the compute capability `gpu`, kept under `cache`.

    Plans that were built before from the same files are taken as they are. Raises BundleError or ExportError.
    """
    plan = variant.plan
    if plan is None:
        raise ExportError(f"variant {variant.name!r} is a graph, which any GPU runs; there is nothing to build")
    sources = [file for file in variant.files if file.path not in variant.computing]
    bundle.verify(folder, sources)
    builder = Builder(plan.builder, cache=cache)
    capabilities = builder.targets([gpu])
    place = cache / f"{variant.name}-{builder.version}-{gpu}-{_digest(sources)}"
    if not place.is_dir():
        making = cache / f".{place.name}.{os.getpid()}"
        making.mkdir(parents=True)
        try:
            samplers = folder / plan.sampler_source, folder / plan.adorned_source
            builder.build_all(folder / plan.source, samplers, making, plan.profiles, capabilities, capacity=plan.capacity)
            _put(making, place)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    paths = [(place / name).resolve() for name in (MODEL_PLAN, SAMPLER_PLAN, ADORNED_PLAN)]
    return msgspec.structs.replace(
        variant,
        model=str(paths[0]),
        sampler=str(paths[1]),
        adorned=str(paths[2]),
        plan=msgspec.structs.replace(plan, version=builder.version, compute_capabilities=capabilities, stripped=False),
        files=tuple(File(str(path), bundle.sha256(path), path.stat().st_size) for path in paths),
    )


def _put(making: Path, place: Path) -> None:
    """Rename the finished folder; another process that was quicker has made the same."""
    try:
        making.rename(place)
    except OSError:
        if not place.is_dir():
            raise


def _digest(files: list[File]) -> str:
    return hashlib.sha256("".join(file.sha256 for file in files).encode()).hexdigest()[:16]


def main() -> int:
    """Build and print; exit status 1 with a sentence on stderr where it cannot be done."""
    parser = argparse.ArgumentParser(prog="export.rebuild", description="Build a bundle's plans anew for another GPU.")
    parser.add_argument("bundle", type=Path, help="folder of the engine bundle")
    parser.add_argument("variant", help="variant whose plans are built, as tensorrt-rtx-fp16")
    parser.add_argument("--gpu", required=True, help="compute capability, as 8.9")
    parser.add_argument("--cache", type=Path, required=True, help="folder for the plans")
    arguments = parser.parse_args()
    try:
        made = rebuild(
            arguments.bundle, bundle.read(arguments.bundle).variant(arguments.variant), arguments.gpu, arguments.cache
        )
    except (BundleError, ExportError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(msgspec.json.encode(made).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
