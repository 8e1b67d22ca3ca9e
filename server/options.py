"""The options of `engineshed serve`, and what their values may be."""

import argparse
from pathlib import Path
from typing import get_args

import msgspec

from runtime import devices, logs
from runtime.bundle import SamplingDefaults
from runtime.devices import CPU_SLOTS, Device, DeviceError
from server import settings
from server.supervision.launch import CONTEXT, CPU_SHARE, GenerationConfig, bytes_of


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.description = "Serve engine bundles over HTTP, with OpenAI's API and a plainer one of its own."
    parser.epilog = "Stop it with Ctrl-C or SIGTERM: running answers get --drain-seconds to finish, a second signal ends them."
    parser.set_defaults(models={})
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        action=settings.FromToml,
        help="a TOML file with these options as its keys; what stands after it on the command line has the last word",
    )
    _describe_engines(parser.add_argument_group("engines"))
    _describe_queue(parser.add_argument_group("waiting"))
    _describe_guesses(parser.add_argument_group("guessed tokens"))
    _describe_doors(parser.add_argument_group("addresses and access"))
    parser.add_argument("--log-format", choices=logs.FORMATS, default="text", help="of each line (default: %(default)s)")
    parser.add_argument(
        "--log-level",
        choices=["debug", "info", "warning", "error"],
        default="info",
        help="least important line to log (default: %(default)s)",
    )


def _describe_engines(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model",
        type=_names,
        default=(),
        help="a bundle's name, or its folder, to load at the start; several with commas. The first is meant where a request "
        "names none; other bundles in --engines are loaded when they are asked for (default: the first in --engines)",
    )
    group.add_argument("--engines", type=Path, default=Path("engines"), help="folder of the bundles (default: %(default)s)")
    group.add_argument(
        "--device",
        metavar="LIST",
        type=_devices,
        default="cpu",
        help="cpu or cuda:N; several, as cuda:0,cuda:1, run an engine each and share the load; cpu,cpu shares out the cores "
        "(default: %(default)s)",
    )
    group.add_argument("--replicas", type=_positive, help="engines of a model, at most (default: one on each device)")
    group.add_argument(
        "--memory",
        metavar="SIZE",
        type=_memory,
        help="that all engines on the CPU may take together, as 12GiB; the model that was asked for least recently makes room "
        f"for another (default: {CPU_SHARE:.0%}% of the machine's or the container's)",
    )
    group.add_argument("--variant", help="engine to run, e.g. cpu-int4 (default: the best that --device runs)")
    group.add_argument(
        "--slots",
        type=_positive,
        help=f"requests that run at once on each device (default: {CPU_SLOTS} on a CPU, what its memory has room for on a GPU)",
    )
    group.add_argument(
        "--context", type=_positive, help=f"tokens of prompt and answer together (default: the model's own, at most {CONTEXT})"
    )
    group.add_argument(
        "--gpu-memory", metavar="SHARE", type=_share, help="most of a GPU's memory that engines take, up to 1 (default: 0.9)"
    )
    group.add_argument(
        "--generation-config",
        choices=get_args(GenerationConfig),
        default="auto",
        help="how tokens are drawn where a request does not say: as a model's authors recommend, or none of that but OpenAI's "
        "defaults, temperature 1 (default: %(default)s)",
    )
    group.add_argument(
        "--override-generation-config",
        metavar="JSON",
        type=_sampling,
        help='what of that is to be otherwise, as {"temperature": 0.3, "top_p": 0.9}; also top_k, min_p, repetition_penalty',
    )
    group.add_argument("--build-on-load", action="store_true", help="build a TensorRT engine for this GPU where there is none")
    group.add_argument(
        "--provider",
        choices=["cuda", "tensorrt", "tensorrt-rtx"],
        help="ONNX Runtime's provider that runs a cuda variant (default: cuda)",
    )
    group.add_argument(
        "--watchdog-seconds",
        type=_positive_seconds,
        default=60.0,
        help="an engine, its steps included, or HTTP process that is silent for so long is replaced (default: %(default)g)",
    )


def _describe_queue(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--queue",
        type=_not_negative,
        default=64,
        help="requests that may wait for a slot of each device; more get status 429 (default: %(default)s)",
    )
    group.add_argument(
        "--queue-tokens",
        type=_not_negative,
        help="tokens, of prompts and of answers at their longest, that may wait likewise (default: 8 x what the slots hold)",
    )
    group.add_argument(
        "--queue-seconds",
        type=_seconds,
        default=0,
        help="how long a request may wait for its model to be loaded, for which it then gets status 503, and for a slot, 504 "
        "(default: a minute for the model, for a slot as long as its client)",
    )
    group.add_argument(
        "--total-seconds",
        type=_seconds,
        default=0,
        help="how long a request may take altogether (default: as long as its client)",
    )


def _describe_guesses(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--no-speculation", action="store_true", help="never guess tokens to verify several at a time, whatever a request says"
    )
    group.add_argument("--draft", metavar="BUNDLE", help="a smaller model with the same tokenizer, to guess tokens with")
    group.add_argument("--draft-variant", metavar="VARIANT", help="its engine (default: the best that --device runs)")


def _describe_doors(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    group.add_argument("--port", type=_port, default=8000, help="port to listen on, 0 takes a free one (default: %(default)s)")
    group.add_argument(
        "--http-processes",
        type=_positive,
        default=1,
        help="that share the port, each one core at most (default: %(default)s)",
    )
    group.add_argument(
        "--drain-seconds",
        type=_seconds,
        default=10.0,
        help="what running answers get to finish when the server stops or a model is unloaded (default: %(default)g)",
    )
    group.add_argument(
        "--admin-socket", metavar="FILE", type=Path, help="a unix socket that opens /admin to its owner without a key"
    )
    group.add_argument(
        "--keys", metavar="FILE", type=Path, help="API keys that are taken, see: engineshed keys (default: none needed)"
    )
    group.add_argument("--protect-metrics", action="store_true", help="/metrics needs a key as well")
    group.add_argument(
        "--cors-origin",
        metavar="ORIGIN",
        action="append",
        default=[],
        help="let web pages of https://example.org, or of * any, read answers; several with commas (default: none)",
    )
    group.add_argument("--tls-cert", metavar="FILE", type=Path, help="PEM certificate with its chain; HTTPS instead of HTTP")
    group.add_argument("--tls-key", metavar="FILE", type=Path, help="its PEM key")


def _sampling(text: str) -> SamplingDefaults:
    try:
        return msgspec.json.decode(text, type=SamplingDefaults)
    except msgspec.ValidationError as error:
        raise argparse.ArgumentTypeError(f"{text!r} does not say how tokens are drawn: {error}") from None
    except msgspec.DecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid JSON: {error}") from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _positive(text: str) -> int:
    return _between(text, 1)


def _not_negative(text: str) -> int:
    return _between(text, 0)


def _port(text: str) -> int:
    return _between(text, 0, 65535)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return share


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds") from None
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no length of time; give seconds from 0 on, 0 for no limit")
    return seconds


def _positive_seconds(text: str) -> float:
    seconds = _seconds(text)
    if not seconds:
        raise argparse.ArgumentTypeError(f"{text} is no length of time; give seconds above 0")
    return seconds


def _memory(text: str) -> int:
    try:
        return bytes_of(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of memory; write for instance 12GiB or 800MiB") from None


def _devices(text: str) -> tuple[Device, ...]:
    try:
        return devices.parse_list(text)
    except DeviceError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _between(text: str, least: int, most: int | None = None) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
    if number < least:
        raise argparse.ArgumentTypeError(f"{text} is less than {least}")
    if most is not None and number > most:
        raise argparse.ArgumentTypeError(f"{text} is more than {most}")
    return number
