"""The default model's plan for a GPU that is not here: a real build by TensorRT-RTX, and what it holds."""

import subprocess
import sys
from pathlib import Path

import pytest

from export.tensorrt import Builder, Network
from runtime import bundle
from runtime.bundle import Bundle, Plan, Variant
from tests.default_model import MODEL, PUBLISHED, real

ROOT = Path(__file__).parents[2]
FOLDER = PUBLISHED / MODEL
LAYERS = 30

pytestmark = [pytest.mark.timeout(600), real("what is looked at here is the real model's plan")]


@pytest.fixture(scope="module")
def manifest() -> Bundle:
    return bundle.read(FOLDER)


@pytest.fixture(scope="module")
def variant(manifest: Bundle) -> Variant:
    found = manifest.by_name.get("tensorrt-rtx-fp16")
    if found is None:
        pytest.fail("the default model has no plan: run make e2e, or engineshed export --target tensorrt-rtx --gpu 8.9")
    return found


@pytest.fixture(scope="module")
def plan(variant: Variant) -> Plan:
    assert variant.plan is not None
    return variant.plan


@pytest.fixture(scope="module")
def network(plan: Plan) -> Network:
    return Builder("tensorrt-rtx").inspect(FOLDER / plan.source)


def test_the_plan_is_for_the_gpu_that_was_named(plan: Plan, variant: Variant) -> None:
    assert plan.compute_capabilities == ("8.9",)
    assert plan.version == Builder("tensorrt-rtx").version
    assert [profile.max_batch for profile in plan.profiles] == [64, 1]
    assert plan.capacity > 4096


def test_it_holds_the_weights_once(plan: Plan, variant: Variant) -> None:
    sizes = {file.path: file.size for file in variant.files}
    weights = sizes[f"{variant.name}/weights.bin"]

    assert not plan.stripped
    assert weights < sizes[variant.model] < 1.25 * weights


def test_every_slot_of_every_layer_is_updated_in_place(network: Network) -> None:
    slots = [f"{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")]

    assert network.in_place == {f"present.{slot}": f"past.{slot}" for slot in slots}
    assert network.layers["KV_CACHE_UPDATE"] == 2 * LAYERS
    assert network.layers["ATTENTION_INPUT"] == network.layers["ATTENTION_OUTPUT"] == LAYERS


def test_its_bindings_are_what_the_runtime_feeds(network: Network, plan: Plan, manifest: Bundle) -> None:
    slots = {name for name in network.inputs if name.startswith("past.")}

    assert set(network.inputs) - slots == {"input_ids", "position_ids", "kv_range", "logit_rows", "forced"}
    assert {network.inputs[name] for name in slots} == {(-1, 3, plan.capacity, 64)}
    assert network.outputs["logits"] == (-1, manifest.vocab_size)


def test_its_numbers_were_compared_with_transformers_before_it_was_published(variant: Variant) -> None:
    assert variant.verification is not None
    assert variant.verification.equal == variant.verification.tokens > 100
    assert variant.perplexity is not None
    assert variant.perplexity.value == pytest.approx(variant.perplexity.reference, rel=0.002)


def test_serving_it_without_a_gpu_ends_with_what_is_missing() -> None:
    command = [sys.executable, "engineshed.py", "serve", "--device=cuda:0", "--port=0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    assert done.returncode == 1
    assert "no NVIDIA driver here" in done.stderr or "is no cuda:0" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_plan_is_refused_on_a_cpu_with_what_runs_there() -> None:
    command = [sys.executable, "engineshed.py", "serve", "--variant=tensorrt-rtx-fp16", "--port=0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    assert done.returncode == 1
    assert "is for tensorrt-rtx, which a device of kind 'cpu' does not run" in done.stderr
    assert "cpu-int4" in done.stderr
