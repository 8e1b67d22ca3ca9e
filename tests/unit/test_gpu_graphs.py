"""The graphs that GPUs run, on the CPU: what they hold, and that their numbers are the model's own."""

import copy
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
import torch
from transformers import PreTrainedModel

from export import cuda, decoder, dequantize, fuse, graph, sampler, verify
from export.cache import Dialect
from export.grid import BLOCK
from export.step import Survey
from runtime.bundle import Layer, Precision, Variant
from runtime.engine import Batch, Draw
from runtime.ort import OrtEngine
from tests import families, tiny

CAPACITY = 64
DIALECTS: tuple[Dialect, ...] = ("onnxruntime", "tensorrt")
SLIDING = "gemma3_text"
EXPLICIT = "falcon"
SINKS = "gpt_oss"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@cache
def prepared(kind: str) -> tuple[PreTrainedModel, PreTrainedModel, Survey]:
    """The tiny model of a type as it is, and prepared for tracing; `tiny` is the one whose weights lie on grids."""
    model: PreTrainedModel = tiny.random_model() if kind == "tiny" else families.model(kind)
    return copy.deepcopy(model), model, decoder.survey(model)


@cache
def _traced(kind: str, dialect: Dialect, dtype: torch.dtype) -> ir.Model:
    _, model, seen = prepared(kind)
    program: ir.Model = decoder.trace(
        decoder.in_dtype(model, dtype), seen, dialect, CAPACITY if dialect == "tensorrt" else None
    )
    if dialect == "onnxruntime":
        fuse.fuse(program)
    return program


def traced(kind: str, dialect: Dialect, dtype: torch.dtype = torch.float16) -> ir.Model:
    """The step of a tiny model in `dtype`, as `export.compile` traces it."""
    return _traced(kind, dialect, dtype).clone()


def kinds(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def last_logprobs(loaded: OrtEngine, tokens: list[int], chunk: int = 64) -> npt.NDArray[np.float32]:
    """Of each of `tokens` but the first, after those before it."""
    scored: list[npt.NDArray[np.float32]] = []
    for start in range(0, len(tokens), chunk):
        ids, targets = np.array(tokens[start : start + chunk]), np.array(tokens[start + 1 : start + 1 + chunk])
        rows, end = np.arange(len(targets)), np.array([start + len(ids)], np.int32)
        scored.append(loaded.step(Batch(0, ids[None], end, rows, Draw.force(targets)))[1].copy())
    return np.concatenate(scored)


def engine(program: ir.Model, kind: str, folder: Path, context: int = CAPACITY) -> OrtEngine:
    """`program`, the step of a tiny model, with the choice of tokens that GPUs have, on ONNX Runtime's CPU provider."""
    _, model, seen = prepared(kind)
    vocab = int(model.config.vocab_size)
    sampler.append_choice(program, vocab)
    cuda.prepare(program)
    graph.tidy(program)
    folder.mkdir(exist_ok=True)
    graph.write(program, folder)
    layers = tuple(Layer(x.index, x.kv_heads, x.key_dim, x.value_dim) for x in seen.layers)
    variant = Variant(folder.name, "cuda", "fp16", "float16", graph.MODEL, (), layers, "a test")
    return OrtEngine(folder, variant, vocab, slots=len(families.PROMPTS), context=context, threads=1)


@pytest.mark.parametrize(
    ("kind", "dialect"),
    [*((kind, dialect) for kind in ("llama", SLIDING) for dialect in DIALECTS), (EXPLICIT, "tensorrt"), (SINKS, "tensorrt")],
)
def test_half_precision_tokens_are_transformers_own_up_to_ties(kind: str, dialect: Dialect, tmp_path: Path) -> None:
    reference, _, _ = prepared(kind)

    loaded = engine(traced(kind, dialect), kind, tmp_path / "engine")
    asked = families.prompts(families.VOCAB, [length for length in families.PROMPTS if length + families.TOKENS <= CAPACITY])
    answers = verify.continue_prompts(loaded, asked, families.TOKENS, families.CHUNK)
    agreement = verify.compare(reference, asked, answers, verify.TIES["fp16"])

    assert agreement.different == 0, agreement.first
    assert agreement.equal > 0.9 * agreement.compared
    assert agreement.compared == len(asked) * families.TOKENS


def test_onnx_runtimes_graph_is_as_fused_in_half_precision_as_in_full() -> None:
    half, full = traced("llama", "onnxruntime"), traced("llama", "onnxruntime", torch.float32)

    fused = ("GroupQueryAttention", "RotaryEmbedding", "SkipSimplifiedLayerNormalization", "MatMul", "Split")
    assert [kinds(half)[kind] for kind in fused] == [kinds(full)[kind] for kind in fused]
    assert kinds(half)["RotaryEmbedding"] == 2 * kinds(half)["GroupQueryAttention"] > 0
    assert kinds(half)["Neg"] == 0


def test_the_cuda_graph_takes_the_longest_length_from_the_host_and_has_no_branch() -> None:
    program = traced("llama", "onnxruntime")
    sampler.append_choice(program, families.VOCAB)
    cuda.prepare(program)
    graph.tidy(program)

    longest = next(value for value in program.graph.inputs if value.name == cuda.LONGEST)
    assert longest.dtype == ir.DataType.INT32
    assert {user.op_type for user, _ in longest.uses()} == {"GroupQueryAttention"}
    assert not {"If", "Loop", "Scan", "RMSNormalization"} & set(kinds(program))
    assert [value.name for value in program.graph.outputs][:3] == ["tokens", "logprobs", "logits"]


def test_tensorrts_graph_keeps_to_onnx_and_updates_every_slot() -> None:
    program, (_, _, seen) = traced("llama", "tensorrt"), prepared("llama")
    sampler.append_choice(program, families.VOCAB)
    graph.tidy(program)

    assert {node.domain for node in program.graph} == {""}
    assert kinds(program)["TensorScatter"] == 2 * len(seen.layers)
    assert kinds(program)["Attention"] == len(seen.layers)
    slots = [value for value in program.graph.inputs if value.name is not None and value.name.startswith("past.")]
    assert {value.shape[2] for value in slots if value.shape is not None} == {CAPACITY}


def test_weights_change_their_type_and_rotary_frequencies_do_not() -> None:
    reference, model, _ = prepared("llama")
    halved = decoder.in_dtype(model, torch.float16)

    assert {parameter.dtype for parameter in halved.parameters()} == {torch.float16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    frequencies = {name: buffer for name, buffer in halved.named_buffers() if "inv_freq" in name}
    assert frequencies
    for name, buffer in frequencies.items():
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, dict(reference.named_buffers())[name])


def test_a_late_position_is_turned_by_the_right_angle(tmp_path: Path) -> None:
    """With frequencies in 16 bits the last log-probabilities would be off by 0.1."""
    reference, program = prepared("tiny")[0], traced("tiny", "onnxruntime")
    loaded = engine(program, "tiny", tmp_path / "engine", context=tiny.POSITIONS)
    tokens = np.random.default_rng(7).integers(0, tiny.VOCAB, tiny.POSITIONS).tolist()

    logprobs = last_logprobs(loaded, tokens)
    with torch.no_grad():
        expected = reference(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, :-1].log_softmax(-1)
    wanted = expected[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])].numpy()
    assert np.abs(logprobs - wanted)[-100:].max() < 0.05


@pytest.mark.parametrize("precision", dequantize.PRECISIONS)
def test_weight_only_products_stay_near_the_models_own(precision: Precision, tmp_path: Path) -> None:
    reference, program = prepared("tiny")[0], traced("tiny", "tensorrt")
    report = dequantize.quantize_products(program, precision, tiny.VOCAB)

    loaded = engine(program, "tiny", tmp_path / "engine")
    tokens = np.random.default_rng(5).integers(0, tiny.VOCAB, 60).tolist()
    value = verify.engine_perplexity(loaded, tokens)
    expected = verify.reference_perplexity(reference, tokens)

    assert report.matrices == kinds(program)["DequantizeLinear"] == 2 * 7 + 1
    assert value == pytest.approx(expected, rel=0.01 if precision == "int4" else 0.05)


def test_blocks_that_lie_on_a_grid_are_carried_over_though_they_were_rounded_to_half_precision() -> None:
    for quantized in (cuda.quantize_products, lambda model, vocab: dequantize.quantize_products(model, "int4", vocab)):
        program = traced("tiny", "onnxruntime")
        report = quantized(program, tiny.VOCAB)
        assert report.carried_share == 1
        assert report.blocks > 0


def test_int4_products_for_cuda_hold_real_zero_points(tmp_path: Path) -> None:
    reference, program = prepared("tiny")[0], traced("tiny", "onnxruntime")
    cuda.quantize_products(program, tiny.VOCAB)
    products = [node for node in program.graph if node.op_type == "MatMulNBits"]
    loaded = engine(program, "tiny", tmp_path / "engine")
    tokens = np.random.default_rng(6).integers(0, tiny.VOCAB, 60).tolist()

    zeros = [node.inputs[3] for node in products if node.attributes["bits"].as_int() == 4]
    assert zeros
    assert all(zero is not None and zero.const_value is not None for zero in zeros)
    assert any((zero.const_value.numpy() % 1 != 0).any() for zero in zeros if zero is not None and zero.const_value is not None)
    assert all(node.attributes["block_size"].as_int() == BLOCK for node in products)
    assert verify.engine_perplexity(loaded, tokens) == pytest.approx(verify.reference_perplexity(reference, tokens), rel=0.01)
