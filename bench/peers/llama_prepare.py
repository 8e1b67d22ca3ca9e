"""Quantize a GGUF in other ways with llama.cpp's own quantizer: `python -m bench.peers.llama_prepare FILE FOLDER NAME...`."""

import argparse
import sys
from pathlib import Path

import llama_cpp as llama  # type: ignore[import-not-found]


def main() -> int:
    """Write FOLDER/NAME.gguf for each NAME, as Q8_0; gives the exit code."""
    parser = argparse.ArgumentParser(prog="bench.peers.llama_prepare", description="Quantize a GGUF in other ways.")
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+", metavar="NAME")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.names:
        parameters = llama.llama_model_quantize_default_params()
        parameters.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{name}")
        parameters.allow_requantize = True  # from 4-bit blocks, by way of the very floats that every peer starts from
        target = arguments.folder / f"{name}.gguf"
        if llama.llama_model_quantize(str(arguments.file).encode(), str(target).encode(), parameters):
            print(f"bench.peers.llama_prepare: {arguments.file} could not be quantized as {name}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
