"""How far a trace is, by what the libraries are really doing: modules run, graph nodes interpreted, rewrite rules tried.

torch.onnx.export tells nobody how far it is. Its work has five parts, each of which calls one public method again and again, as
often as is known beforehand: `torch.export` runs each module once; its graph is interpreted node by node twice, to be
decomposed, and once more to have its types promoted; and onnxscript tries its rules on each node of the result. A part's share
of the time was measured on Llamas of 4, 12 and 16 layers, and hardly depends on their number.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from onnxscript.rewriter import RewriteRule
from torch.fx import Interpreter
from torch.nn.modules.module import register_module_forward_pre_hook

_MODULES = 0.25
_RUNS = (0.10, 0.29, 0.12)
"""Of the first, second and third time that a graph is interpreted."""
_RULES = 0.22
_TRIES = 134
"""Rules tried in all, for each node of the graph that was interpreted last."""
MIN_INTERVAL = 0.05
"""Seconds between two shares that are told."""


class _Trace:
    """Counts what is done, and tells the share that it is of the whole."""

    def __init__(self, modules: int, advance: Callable[[float], None]) -> None:
        self.modules, self.advance = modules, advance
        self.ran = self.tried = self.nodes = 0
        self.runs: list[tuple[int, int]] = []
        """Nodes done and nodes in all, of each time that a graph was interpreted."""
        self.told, self.when = 0.0, 0.0

    @property
    def share(self) -> float:
        """Of the trace's time, from 0 to 1."""
        modules = 1.0 if self.runs else min(self.ran / self.modules, 1.0)
        runs = sum(part * min(done / total, 1.0) for part, (done, total) in zip(_RUNS, self.runs, strict=False))
        rules = 0.0
        if self.tried and self.runs:
            runs = sum(_RUNS)
            rules = min(self.tried / (_TRIES * self.runs[-1][1]), 1.0)
        return _MODULES * modules + runs + _RULES * rules

    def tell(self) -> None:
        share, now = self.share, time.monotonic()
        if share > self.told and now - self.when >= MIN_INTERVAL:
            self.told, self.when = share, now
            self.advance(share)


@contextmanager
def watching(model: torch.nn.Module, advance: Callable[[float], None]) -> Iterator[None]:
    """While this lasts, a trace of `model` calls `advance` with the share of it that is done; at the end with 1."""
    trace = _Trace(sum(1 for _ in model.modules()), advance)
    run, run_node, try_rewrite = Interpreter.run, Interpreter.run_node, RewriteRule.try_rewrite
    depth = 0

    def ran(module: torch.nn.Module, args: Any) -> None:
        trace.ran += 1
        trace.tell()

    def counted_run(self: Interpreter, *args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        if not depth:
            trace.runs.append((0, max(len(self.module.graph.nodes), 1)))  # type: ignore[union-attr, arg-type]
        depth += 1
        try:
            return run(self, *args, **kwargs)
        finally:
            depth -= 1

    def counted_node(self: Interpreter, node: Any) -> Any:
        if depth == 1 and trace.runs:
            done, total = trace.runs[-1]
            trace.runs[-1] = done + 1, total
            trace.tell()
        return run_node(self, node)

    def counted_rewrite(self: RewriteRule, *args: Any, **kwargs: Any) -> Any:
        trace.tried += 1
        trace.tell()
        return try_rewrite(self, *args, **kwargs)

    handle = register_module_forward_pre_hook(ran)
    patched: list[tuple[Any, str, Any, Any]] = [
        (Interpreter, "run", counted_run, run),
        (Interpreter, "run_node", counted_node, run_node),
        (RewriteRule, "try_rewrite", counted_rewrite, try_rewrite),
    ]
    try:
        for owner, name, counted, _ in patched:
            setattr(owner, name, counted)
        yield
    finally:
        handle.remove()
        for owner, name, _, original in patched:
            setattr(owner, name, original)
    advance(1.0)
