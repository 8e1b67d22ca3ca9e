"""What a step launches, by count: at one row a small model's step is as much launching as computing.

Times depend on the machine; counts do not. A larger count here is a slower step, and wants a reason.
"""

from collections import Counter
from pathlib import Path

import onnx_ir as ir
import pytest

from export import batches, decoder, fuse, graph, quantize, sampler, source
from export.recipe import ModelReference
from tests import tiny

LAYERS = 2


@pytest.fixture(scope="module")
def fused(tiny_model: Path) -> ir.Model:
    model = source.load(source.fetch(ModelReference(path=str(tiny_model)), tiny_model))
    traced: ir.Model = decoder.trace(model, decoder.survey(model))
    fuse.fuse(traced)
    graph.merge_equal(traced)
    return traced


def operators(nodes: ir.Graph) -> Counter[str]:
    return Counter(node.op_type for node in nodes)


def a_layer(counts: Counter[str], once: Counter[str]) -> dict[str, float]:
    """Operators a layer, those that a step has once taken off."""
    return {name: count / LAYERS for name, count in (counts - once).items()}


LAYER = {
    "GroupQueryAttention": 1,
    "RotaryEmbedding": 2,
    "SkipSimplifiedLayerNormalization": 2,
    "Split": 2,
    "Sigmoid": 1,
    "Mul": 2,  # ONNX Runtime makes one of them, with the Sigmoid, a QuickGelu
}
ONCE = Counter(["Unsqueeze", "Cast", "Mul", "Sin", "Cos", "GatherBlockQuantized", "RMSNormalization", "ReduceMax", "Sub"])
LOGITS = Counter({"Reshape": 2, "Gather": 1, "Unsqueeze": 1, "Squeeze": 1})


def test_a_step_of_one_token(fused: ir.Model) -> None:
    """Four products a layer, each after three operators for its block sums, of which the head has none."""
    model = fused.clone()
    quantize.quantize(model, 4, tiny.VOCAB)
    graph.tidy(model)
    once = ONCE + LOGITS + Counter(["MatMulNBits"])
    sums = {"Reshape": 4, "ReduceSum": 4, "Concat": 4}
    assert a_layer(operators(model.graph), once) == {**LAYER, **sums, "MatMulNBits": 4}


def test_a_step_of_many_tokens(fused: ir.Model) -> None:
    """Nine operators a product, and two more where no norm bounds its activations: those of attention and of the MLP."""
    model = fused.clone()
    batches.quantize_both(model, 4, tiny.VOCAB)
    graph.tidy(model)
    (choice,) = (node for node in model.graph if node.op_type == "If")
    counts = operators(choice.attributes["then_branch"].as_graph())
    halves = Counter({"QuantizeLinear": 2, "DequantizeLinear": 1, "Sub": 1, "Concat": 1})
    product = Counter({"MatMulIntegerToFloat": 1, "Split": 1, "Mul": 1, "Add": 1})
    unbound = Counter({"SimplifiedLayerNormalization": 1, "Div": 1})
    expected = Counter(LAYER) + Counter({"SimplifiedLayerNormalization": 1, "Div": 1}) + unbound
    for _ in range(4):
        expected += halves + product
    assert a_layer(counts, ONCE + LOGITS + halves + product) == expected
    assert operators(choice.attributes["else_branch"].as_graph())["MatMulNBits"] == 4 * LAYERS + 1


def test_choosing_the_most_likely_token_copies_the_logits_twice_at_most(fused: ir.Model) -> None:
    """Operators over the whole vocabulary, where nothing is drawn at random: a padded copy for the maximum, and LogSoftmax."""
    model = fused.clone()
    sampler.append_sampler(model, tiny.VOCAB)
    graph.tidy(model)
    counts = operators(model.graph)
    assert (counts["LogSoftmax"], counts["If"], counts["ScatterElements"], counts["Where"]) == (1, 1, 0, 1)
    (most_likely,) = (node for node in model.graph if node.op_type == "TopK")
    assert most_likely.inputs[1] in model.graph.inputs  # of as many as are wanted, which takes no time where that is none
    (choice,) = (node for node in model.graph if node.op_type == "If")
    plain = operators(choice.attributes["else_branch"].as_graph())
    assert (plain["Pad"], plain["ReduceMax"], plain["If"]) == (1, 2, 1)
    assert plain["ArgMax"] == 2  # of the blocks' maxima, and inside one block
    assert not plain.keys() & {"TopK", "ScatterElements", "Clip"}
