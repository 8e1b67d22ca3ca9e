"""`python -m bench.gpu`: measure a model of Llama-3.2-1B's sizes on the GPU of this machine."""

import argparse
import shlex
import sys

from rich.console import Console

from bench.arguments import number, writable


def main() -> int:
    """Measure, print the tables, and write the JSON that is asked for."""
    arguments = _parser().parse_args()
    from bench.gpu import machine, report, run  # torch takes seconds to import, and --help does without
    from bench.gpu.measure import Report

    if reason := machine.why_not():
        print(f"the bench needs an NVIDIA GPU: {reason}", file=sys.stderr)
        return 1
    found = Report(machine.describe(), shlex.join(sys.argv))
    print(f"{found.machine.gpu}, driver {found.machine.driver}", flush=True)
    try:
        run.run(found, arguments.seconds, arguments.layers)
    except KeyboardInterrupt:
        found.notes.append("interrupted")
    finally:
        if arguments.json is not None:
            report.write(found, arguments.json)
    report.show(found, Console(width=None if sys.stdout.isatty() else 140))
    return 0 if found.decode and any(figure.what.startswith("ours") and figure.steps for figure in found.decode) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description="Measure our engine on this machine's GPU, on a random model of Llama-3.2-1B's sizes: its tokens and its "
        "decoding beside transformers', its share of what the memory gives, what the host costs, and the time to the first "
        "token. Nothing is downloaded. A part that fails is named, and the others go on.",
    )
    parser.add_argument(
        "--seconds", type=number(float, 60), default=480.0, metavar="N", help="begin no part after N seconds (default: 480)"
    )
    parser.add_argument(
        "--layers", type=number(int, 1), default=16, metavar="N", help="of the model (default: 16; 2 for a quick look)"
    )
    parser.add_argument("--json", type=writable, metavar="FILE", help="keep every value that was measured")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
