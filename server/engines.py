"""`engineshed engines`: what has been built."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from runtime import bundle as bundles
from runtime.bundle import Bundle, BundleError, Variant


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.description = "List the engine bundles and their variants."
    parser.add_argument("--engines", type=Path, default=Path("engines"), help="folder of the bundles (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Print the table; 1 if a bundle is damaged."""
    console = Console()
    found = bundles.scan(args.engines)
    if not found:
        console.print(f"There is no engine bundle in {args.engines}; build one with: engineshed export", highlight=False)
        return 0
    damaged = {name: bundle for name, bundle in found.items() if isinstance(bundle, BundleError)}
    console.print(table([bundle for bundle in found.values() if isinstance(bundle, Bundle)]))
    for name, error in damaged.items():
        console.print(f"{name}: {error}", style="red", highlight=False, markup=False)
    return 1 if damaged else 0


def table(found: list[Bundle]) -> Table:
    """One row a variant."""
    names = ("bundle", "variant", "GPUs", "MB", "context", "verified", "perplexity")
    result = Table(
        *(Column(name, no_wrap=True) for name in names),
        box=None,
        padding=(0, 1, 0, 0),
        caption="GPUs: compute capabilities that a plan is for; verified: tokens equal to the reference's; "
        "perplexity: and its excess over that",
        caption_justify="left",
    )
    for bundle in found:
        for number, variant in enumerate(bundle.variants):
            result.add_row(
                bundle.name if number == 0 else "",
                variant.name,
                "" if variant.plan is None else " ".join(variant.plan.compute_capabilities),
                f"{variant.size / 1e6:,.0f}",
                f"{bundle.longest(variant):,}",
                _verified(variant),
                _perplexity(variant),
                end_section=number == len(bundle.variants) - 1,
            )
    return result


def _verified(variant: Variant) -> str:
    verification = variant.verification
    return "no" if verification is None else f"{verification.equal}/{verification.tokens}"


def _perplexity(variant: Variant) -> str:
    perplexity = variant.perplexity
    return "" if perplexity is None else f"{perplexity.value:.2f} ({perplexity.value / perplexity.reference - 1:+.1%})"
