"""What a checkpoint stores is numbers, or codes that are turned into the numbers they stand for, or it is refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
)
from transformers import Qwen3MoeForCausalLM as Qwen3Moe
from transformers.integrations.mxfp4 import FP4_VALUES

from export import source
from export.errors import ExportError
from export.recipe import ModelReference
from tests import families, tiny

Weights = dict[str, torch.Tensor]
UP = "model.layers.0.mlp.up_proj.weight"
TABLE = "model.embed_tokens.weight"


@pytest.fixture
def model(tmp_path: Path, tiny_model: Path) -> Path:
    """The tiny model in a folder to be changed."""
    return shutil.copytree(tiny_model, tmp_path / "mine")


def load(folder: Path, notes: list[str] | None = None) -> PreTrainedModel:
    return source.load(source.fetch(ModelReference(path=str(folder)), folder.parent / "cache"), notes=notes)


def refused(folder: Path) -> str:
    """The sentence with which the folder is refused."""
    with pytest.raises(ExportError) as error:
        load(folder)
    sentence = str(error.value)
    assert "\n" not in sentence
    return sentence


def configure(folder: Path, **entries: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def weights(folder: Path) -> Weights:
    return safetensors.torch.load_file(folder / "model.safetensors")


def write(folder: Path, tensors: Weights) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change(folder: Path, how: Callable[[Weights], object]) -> None:
    tensors = weights(folder)
    how(tensors)
    write(folder, tensors)


def spread(scales: torch.Tensor, size: int, shape: torch.Size) -> torch.Tensor:
    """Scales of blocks of `size` x `size`, one for each number of a matrix of `shape`."""
    return scales.repeat_interleave(size, 0).repeat_interleave(size, 1)[: shape[0], : shape[1]]


def in_float8(folder: Path, block: int | None, rest: torch.dtype = torch.bfloat16) -> Weights:
    """Store the projections of the model in `folder` in float8, with a scale a block or one for each matrix; blocks' scales
    and all other weights as `rest`, in which published checkpoints have them. The numbers that all of them stand for.
    """
    torch.manual_seed(1)
    stored, meant = {}, {}
    for name, weight in weights(folder).items():
        if "proj" not in name:
            stored[name] = weight.to(rest)
            meant[name] = stored[name].float()
            continue
        if block is None:
            scale = (weight.abs().max() / 448).reshape(())
            each = scale.expand(weight.shape)
        else:
            scale = torch.rand(-(-weight.shape[0] // block), -(-weight.shape[1] // block)) / 100 + 0.01
            scale = scale.to(rest)
            each = spread(scale.float(), block, weight.shape)
        codes = (weight / each).to(torch.float8_e4m3fn)
        stored[name], stored[f"{name}_scale_inv"], meant[name] = codes, scale, codes.float() * each
    write(folder, stored)
    size = None if block is None else [block, block]
    configure(folder, quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": size})
    return meant


# What is applied ----------------------------------------------------------------------------------------------------------


RESTS = pytest.mark.parametrize("rest", [torch.bfloat16, torch.float16, torch.float32], ids=str)
"""How weights that are not quantized are stored beside codes."""


@RESTS
@pytest.mark.parametrize("block", [None, 16, 32], ids=["a scale a matrix", "blocks of 16", "blocks of 32"])
def test_given_float8_with_scales_when_loaded_then_weights_are_codes_times_scales(
    model: Path, block: int | None, rest: torch.dtype
) -> None:
    meant = in_float8(model, block, rest)
    state = load(model).state_dict()
    for name, weight in meant.items():
        assert torch.equal(state[name], weight), name
        assert state[name].dtype == torch.float32, name


@RESTS
def test_given_float8_experts_when_loaded_then_they_are_codes_times_scales(tmp_path: Path, rest: torch.dtype) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 1,
        "head_dim": 16,
    }
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
    Qwen3Moe(Qwen3MoeConfig(vocab_size=64, **sizes, **heads)).save_pretrained(tmp_path)
    meant = in_float8(tmp_path, 32, rest)
    experts = load(tmp_path).state_dict()
    for number in range(4):
        gate, up, down = (meant[f"model.layers.0.mlp.experts.{number}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        assert torch.equal(experts["model.layers.0.mlp.experts.gate_up_proj"][number], torch.cat([gate, up]))
        assert torch.equal(experts["model.layers.0.mlp.experts.down_proj"][number], down)


@RESTS
def test_given_mxfp4_experts_when_loaded_then_they_are_codes_times_scales(tmp_path: Path, rest: torch.dtype) -> None:
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    heads: dict[str, Any] = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
    GptOssForCausalLM(GptOssConfig(vocab_size=64, **sizes, **heads)).save_pretrained(tmp_path)
    torch.manual_seed(1)
    stored, meant, values = {}, {}, torch.tensor(FP4_VALUES)
    for name, weight in weights(tmp_path).items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = weight.to(rest)
            meant[name] = stored[name].float()
            continue
        experts, inputs, outputs = weight.shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 124, (experts, outputs, inputs // 32), dtype=torch.uint8)
        numbers = torch.stack([values[(blocks & 15).long()], values[(blocks >> 4).long()]], -1).flatten(-2)
        each = numbers * torch.exp2(scales.float() - 127)[..., None]
        stored[f"{name}_blocks"], stored[f"{name}_scales"], meant[name] = blocks, scales, each.flatten(-2).mT
    write(tmp_path, stored)
    configure(tmp_path, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    state = load(tmp_path).state_dict()
    assert sum(name.endswith(("experts.gate_up_proj", "experts.down_proj")) for name in meant) == 2
    for name, expected in meant.items():
        assert torch.equal(state[name], expected), name
        assert state[name].dtype == torch.float32, name


# Codes that would be taken for numbers ------------------------------------------------------------------------------------


def test_given_float8_in_blocks_that_do_not_end_evenly_when_loaded_then_it_is_refused(model: Path) -> None:
    in_float8(model, 64)  # a matrix of 96 rows has blocks of 64 and 32, which transformers would take for two of 48
    sentence = refused(model)
    assert "mlp.down_proj.weight [64, 96] in blocks of [64, 64] with scales [1, 2]: the last block is not whole" in sentence


def test_given_float8_without_one_of_its_scales_when_loaded_then_the_weight_is_named(model: Path) -> None:
    in_float8(model, 16)
    change(model, lambda tensors: tensors.pop(f"{UP}_scale_inv"))
    assert f"{model} stores {UP} as F8_E4M3, and nothing says what its codes stand for" in refused(model)


def test_given_a_float8_layer_that_is_said_to_be_none_when_loaded_then_it_is_codes_times_scales(model: Path) -> None:
    meant = in_float8(model, 16)
    settings = json.loads((model / "config.json").read_text())["quantization_config"]
    configure(model, quantization_config=settings | {"modules_to_not_convert": ["model.layers.0.mlp.up_proj"]})
    assert torch.equal(load(model).state_dict()[UP], meant[UP])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8])
@pytest.mark.parametrize("scaled", [False, True], ids=["without a scale", "with a scale"])
def test_given_codes_that_no_configuration_names_when_loaded_then_the_weight_is_named(
    model: Path, dtype: torch.dtype, scaled: bool
) -> None:
    def encode(tensors: Weights) -> None:
        scale = tensors[UP].abs().max() / 100
        tensors[UP] = (tensors[UP] / scale).to(dtype)
        if scaled:
            tensors[UP.replace("weight", "weight_scale")] = scale.reshape(1)

    change(model, encode)
    sentence = refused(model)
    assert f"stores {UP} as " in sentence
    assert "codes, not numbers" in sentence
    assert ("its scale may be model.layers.0.mlp.up_proj.weight_scale" in sentence) == scaled


def test_given_codes_in_a_weight_of_any_name_when_loaded_then_it_is_refused(model: Path) -> None:
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, mlp_bias=True
        )
    ).save_pretrained(model)
    change(model, lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.bias": torch.ones(48, dtype=torch.int16)}))
    assert "stores model.layers.0.mlp.up_proj.bias as I16: codes, not numbers" in refused(model)


def test_given_pickled_codes_when_loaded_then_the_weight_is_named(model: Path) -> None:
    tensors = weights(model)
    tensors[UP] = tensors[UP].to(torch.int8)
    (model / "model.safetensors").unlink()
    torch.save(tensors, model / "pytorch_model.bin")
    assert f"stores {UP} as int8: codes, not numbers" in refused(model)


def test_given_pickled_numbers_when_loaded_then_they_are_the_models(model: Path) -> None:
    tensors = weights(model)
    (model / "model.safetensors").unlink()
    torch.save(tensors, model / "pytorch_model.bin")
    assert torch.equal(load(model).state_dict()[UP], tensors[UP])


def pickled_shard(model: Path, name: str, content: object) -> None:
    """Let an index name the file `name` of pickled weights for all of them."""
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights(model), name)}
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    torch.save(content, model / name)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_given_pickled_codes_in_a_file_of_any_name_when_loaded_then_the_weight_is_named(
    model: Path, dtype: torch.dtype
) -> None:
    tensors = weights(model)
    pickled_shard(model, "part-1.bin", tensors | {UP: tensors[UP].to(dtype)})
    assert f"stores {UP} as" in refused(model)


def test_given_a_pickle_that_is_no_table_of_weights_when_loaded_then_it_is_refused(model: Path) -> None:
    pickled_shard(model, "part-1.bin", [1, 2])
    assert f"{model / 'part-1.bin'} holds a list in the place of weights by their names" in refused(model)


def test_given_pickled_files_that_are_not_loaded_when_loaded_then_they_do_not_matter(model: Path) -> None:
    (model / "pytorch_model_old.bin").write_text("something else")
    tensors = weights(model)
    pickled_shard(model, "part-1.bin", tensors)
    assert torch.equal(load(model).state_dict()[UP], tensors[UP])


@pytest.mark.parametrize("same", [True, False])
def test_given_a_weight_in_two_shards_when_loaded_then_it_is_one_or_refused(model: Path, same: bool) -> None:
    tensors = weights(model)
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    other = tensors[UP] if same else torch.zeros_like(tensors[UP])
    rest = tensors.pop("model.norm.weight")
    safetensors.torch.save_file(tensors, model / names[0], {"format": "pt"})
    safetensors.torch.save_file({UP: other, "model.norm.weight": rest}, model / names[1], {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, names[0]) | {"model.norm.weight": names[1]}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "model.safetensors").unlink()
    if same:
        assert torch.equal(load(model).state_dict()[UP], tensors[UP])
    else:
        assert f"{model / names[0]} and {model / names[1]} both hold {UP}, and not the same numbers" in refused(model)


@pytest.mark.parametrize(("name", "dtype"), [("model.norm.weight", torch.int32), (UP, torch.int16)])
def test_given_integers_beside_a_quantization_that_is_applied_when_loaded_then_they_are_refused(
    model: Path, name: str, dtype: torch.dtype
) -> None:
    configure(model, quantization_config={"quant_method": "fp8", "weight_block_size": [64, 64]})
    change(model, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    assert f"stores {name} as" in refused(model)


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ({"weight_block_size": ["a", "b"]}, "quantization_config in config.json is none that transformers can read"),
        ({"weight_block_size": [0, 64]}, "is none that transformers can read (weight_block_size [0, 64])"),
        ({"activation_scheme": "foo"}, "is none that transformers can read"),
    ],
)
def test_given_a_quantization_config_with_nonsense_when_loaded_then_it_is_one_sentence(
    model: Path, entries: dict[str, Any], sentence: str
) -> None:
    configure(model, quantization_config={"quant_method": "fp8", **entries})
    assert sentence in refused(model)


# Quantizations that nobody applies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "with GPTQ (quantization_config in config.json)"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "with AWQ ("),
        ({"quantization_config": {"load_in_4bit": True, "quant_method": "bitsandbytes"}}, "with bitsandbytes ("),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}, "with NVIDIA's ModelOpt ("),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "with compressed-tensors ("),
        ({"quantization_config": {"quant_method": "of-tomorrow"}}, "with of-tomorrow ("),
        ({"quantization_config": {"bits": 4}}, "with an unnamed method ("),
        ({"text_config": {"quantization_config": {"quant_method": "gptq"}}}, "with GPTQ (quantization_config in text_config)"),
        ({"llm": {"quantization_config": {"quant_method": "fp8"}}}, "with fp8 (quantization_config in llm)"),
        ({"compression_config": {"format": "int-quantized"}}, "with an unnamed method (compression_config in config.json)"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "with MLX (quantization in config.json)"),
    ],
)
def test_given_a_quantization_that_is_not_applied_when_loaded_then_it_is_named(
    model: Path, entries: dict[str, Any], sentence: str
) -> None:
    configure(model, **entries)
    assert f"{model} is quantized {sentence}" in refused(model)


@pytest.mark.parametrize(
    ("name", "content", "method"),
    [
        ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}, "NVIDIA's ModelOpt"),
        ("quantize_config.json", {"bits": 4}, "GPTQ"),
        ("quantize_config.json", {"bits": 4, "quant_method": "awq"}, "AWQ"),
        ("quant_config.json", {"w_bit": 4}, "AWQ"),
    ],
)
def test_given_a_quantization_in_a_file_beside_when_loaded_then_the_file_is_named(
    model: Path, name: str, content: dict[str, Any], method: str
) -> None:
    (model / name).write_text(json.dumps(content))
    assert f"{model} is quantized with {method} ({name})" in refused(model)


def test_given_the_original_in_the_models_card_when_refused_then_it_is_named(model: Path) -> None:
    (model / "README.md").write_text("---\nlicense: mit\nbase_model:\n- someone/Model-1B\n---\n# A model\n")
    configure(model, quantization_config={"quant_method": "gptq"})
    assert "give the model that it was made from (someone/Model-1B)" in refused(model)


def test_given_an_empty_quantization_config_when_loaded_then_the_weights_are_numbers(model: Path) -> None:
    configure(model, quantization_config=None)
    load(model)


# Weights that are left over, missing, or of another shape -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "model.layers.0.mlp.up_proj.weight_scale",
            "has 1 scales that nothing applies that LlamaForCausalLM has no place for ({name}, ",
        ),
        ("model.layers.0.mlp.up_proj.input_scale", "has 1 scales that nothing applies"),
        ("model.layers.0.mlp.up_proj.g_idx", "has 1 scales that nothing applies"),
        ("model.layers.0.mlp.up_proj.weight.absmax", "has 1 scales that nothing applies"),
        ("model.layers.0.mlp.up_proj.lora_A.weight", "has 1 weights that LlamaForCausalLM has no place for ({name}, for one)"),
        ("model.layers.2.mlp.up_proj.weight", "has 1 weights that LlamaForCausalLM has no place for ({name}, for one)"),
        ("model.layers.0.self_attn.q_norm.weight", "has 1 weights that LlamaForCausalLM has no place for ({name}, for one)"),
    ],
)
def test_given_a_weight_without_a_place_when_loaded_then_it_is_named(model: Path, name: str, sentence: str) -> None:
    change(model, lambda tensors: tensors.update({name: torch.ones(1)}))
    assert sentence.format(name=name) in refused(model)


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.attn.masked_bias", "model.embeddings.position_ids"],
)
def test_given_a_table_that_models_compute_when_loaded_then_it_is_left_silently(model: Path, name: str) -> None:
    change(model, lambda tensors: tensors.update({name: torch.ones(4)}))
    notes: list[str] = []
    load(model, notes)
    assert notes == []


@pytest.mark.parametrize("form", ["safetensors", "pickled"])
def test_given_rotary_frequencies_that_are_stored_when_loaded_then_others_than_the_models_are_told(
    model: Path, form: str
) -> None:
    name, notes = "model.layers.0.self_attn.rotary_emb.inv_freq", list[str]()
    right = load(model).get_buffer("model.rotary_emb.inv_freq").to(torch.bfloat16)
    for frequencies in (right, right * 2):
        stored = {**weights(model), name: frequencies.clone()}
        safetensors.torch.save_file(stored, model / "model.safetensors", {"format": "pt"})
        if form == "pickled":
            torch.save(weights(model), model / "pytorch_model.bin")
            (model / "model.safetensors").rename(model.parent / "kept")
        notes.clear()
        load(model, notes)
        expected = [f"{name} holds other rotary frequencies than those of config.json, which transformers and the engine use"]
        assert notes == ([] if frequencies is right else expected)
        if form == "pickled":
            (model.parent / "kept").rename(model / "model.safetensors")
            (model / "pytorch_model.bin").unlink()


@pytest.mark.parametrize(
    ("name", "entries", "said"),
    [
        ("mtp.layers.0.mlp.up_proj.weight", {}, "layers that guess several tokens ahead"),
        ("model.layers.2.eh_proj.weight", {"num_nextn_predict_layers": 1}, "layers that guess several tokens ahead"),
        ("vision_tower.blocks.0.weight", {"vision_config": {"depth": 1}}, "parts for images and sound"),
        ("model.audio_tower.conv.weight", {"audio_config": {"depth": 1}}, "parts for images and sound"),
    ],
)
def test_given_a_part_that_is_not_the_language_model_when_loaded_then_a_note_names_it(
    model: Path, name: str, entries: dict[str, Any], said: str
) -> None:
    change(model, lambda tensors: tensors.update({name: torch.ones(4)}))
    configure(model, **entries)
    notes: list[str] = []
    load(model, notes)
    assert notes == [f"left out: {said} (1 weights, {name} for one)"]


@pytest.mark.parametrize("name", ["model.layers.2.eh_proj.weight", "vision_tower.blocks.0.weight"])
def test_given_such_a_part_that_the_configuration_does_not_speak_of_when_loaded_then_it_is_refused(
    model: Path, name: str
) -> None:
    change(model, lambda tensors: tensors.update({name: torch.ones(4)}))
    assert name in refused(model)


def test_given_a_weight_of_another_shape_when_loaded_then_both_shapes_are_told(model: Path) -> None:
    change(model, lambda tensors: tensors.update({UP: tensors[UP][:64]}))
    assert f"has {UP} in the shape [64, 64] where its config.json makes [96, 64] of it" in refused(model)


def test_given_a_configuration_with_fewer_layers_when_loaded_then_the_others_are_not_forgotten(model: Path) -> None:
    configure(model, num_hidden_layers=1)
    assert "has 9 weights that LlamaForCausalLM has no place for (model.layers.1." in refused(model)


@pytest.mark.parametrize("rows", [0, 16], ids=["missing", "of another shape"])
def test_given_one_experts_weight_that_does_not_fit_when_loaded_then_what_it_is_a_part_of_is_named(
    tmp_path: Path, rows: int
) -> None:
    sizes: dict[str, Any] = {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 1, "num_experts": 4}
    Qwen3Moe(Qwen3MoeConfig(vocab_size=64, num_attention_heads=4, num_key_value_heads=2, **sizes)).save_pretrained(tmp_path)
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    change(tmp_path, lambda tensors: tensors.update({name: tensors[name][:rows]}) if rows else tensors.pop(name))
    said = refused(tmp_path)
    assert f"the weights in {tmp_path} do not fit together: model.layers.0.mlp.experts.gate_up_proj could not be made" in said


# What transformers warns of -----------------------------------------------------------------------------------------------


def test_given_a_warning_about_the_configuration_when_loaded_then_it_is_a_note_each_time(model: Path) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 32.0, "original_max_position_embeddings": 4096}
    configure(model, rope_parameters=rope)
    for _ in range(2):
        notes: list[str] = []
        load(model, notes)
        assert any("does not match the ratio" in note for note in notes), notes


def test_given_phi_3s_longrope_as_its_authors_wrote_it_when_loaded_then_nothing_is_noted(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = Phi3ForCausalLM(Phi3Config(vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes))
    made.save_pretrained(tmp_path)
    longrope = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    lengths = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
    configure(tmp_path, rope_scaling=longrope, rope_parameters=None, rope_theta=10000.0, **lengths)
    notes: list[str] = []
    load(tmp_path, notes)
    assert notes == []


def test_given_a_model_that_is_whole_when_loaded_then_nothing_is_noted(tiny_model: Path) -> None:
    notes: list[str] = []
    load(tiny_model, notes)
    assert notes == []
    assert load(tiny_model).config.vocab_size == tiny.VOCAB


@pytest.fixture
def youtu(tmp_path: Path) -> tuple[PreTrainedModel, Path]:
    """A model of a type whose padding token's embedding transformers sets to zero after it was loaded; and its folder."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(families.configuration("youtu"), dtype=torch.bfloat16).eval()
    torch.nn.init.normal_(model.get_parameter(TABLE))
    return model, tmp_path / "mine"


@pytest.mark.parametrize("form", ["safetensors", "shards in a folder", "pickled", "pickled by torch 1.5"])
def test_given_numbers_that_transformers_changes_after_loading_when_loaded_then_they_are_as_stored(
    youtu: tuple[PreTrainedModel, Path], form: str
) -> None:
    model, folder = youtu
    model.save_pretrained(folder)
    stored = weights(folder)
    if form != "safetensors":
        (folder / "model.safetensors").unlink()
    if form == "shards in a folder":
        (folder / "parts").mkdir()
        safetensors.torch.save_file(stored, folder / "parts" / "all.safetensors", {"format": "pt"})
        index = {"metadata": {}, "weight_map": dict.fromkeys(stored, "parts/all.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif form != "safetensors":
        torch.save(stored, folder / "pytorch_model.bin", _use_new_zipfile_serialization=form == "pickled")
    notes: list[str] = []
    loaded = load(folder, notes)
    table = stored[TABLE].float()
    assert torch.equal(loaded.get_parameter(TABLE), table)
    assert table[0].any()
    assert notes == ["transformers changed 1 of 128 rows of model.embed_tokens.weight after loading; the checkpoint's are used"]


def test_given_names_without_the_models_prefix_when_loaded_then_numbers_are_as_stored(
    youtu: tuple[PreTrainedModel, Path],
) -> None:
    model, folder = youtu
    model.save_pretrained(folder)
    stored = {name.removeprefix("model."): tensor for name, tensor in weights(folder).items()}
    safetensors.torch.save_file(stored, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(load(folder).get_parameter(TABLE), model.get_parameter(TABLE).float())
