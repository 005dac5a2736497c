"""Which bases can carry a view."""

import math
from typing import Any

import pytest
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from orthrus.config import OrthrusLlamaConfig, OrthrusMistralConfig, OrthrusQwen2Config
from orthrus.model.bases import ROWS, check_base
from orthrus.model.checkpoint import build_config, expected_shapes, load_model
from orthrus.model.modeling import OrthrusLM, is_view_tensor
from tests.model.released import edit_json, random_model, released_config, write_stock

SUPPORTED = "llama, mistral, orthrus, orthrus_llama, orthrus_mistral, orthrus_qwen2, qwen2, qwen3"


def base_config(model_type: str, **fields: Any) -> dict[str, Any]:
    """config.json of a base that says nothing of windows."""
    config = released_config(model_type=model_type)
    for name in ("sliding_window", "use_sliding_window", "max_window_layers"):
        config.pop(name)
    return config | fields


def test_stock_and_own_configurations_are_accepted():
    for row in ROWS:
        own = {"sliding_window": None}  # Mistral's default is a window
        assert check_base(row.stock_config(**own).to_dict(), where="x") is row
        assert check_base(row.config().to_dict(), where="x") is row
        assert row.config.model_type.startswith("orthrus") and issubclass(row.config, row.stock_config)
    assert check_base(released_config(), where="x").name == "Qwen3"


@pytest.mark.parametrize(
    "model_type",
    ["qwen3_moe", "qwen2_moe", "mixtral", "qwen3_5", "ministral", "smollm3", "llama4", "gemma2", "phi3", None],
)
def test_other_families_are_refused_by_name(model_type: str | None):
    with pytest.raises(ValueError, match=f"some/base has model_type {model_type!r}.*supported: {SUPPORTED}"):
        check_base(released_config(model_type=model_type), where="some/base")


WINDOWED = [
    ("qwen3", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("mistral", {"sliding_window": 4096}),
    ("mistral", {}),  # transformers' default is a window of 4096
    ("mistral", {"sliding_window": 64, "layer_types": ["full_attention"] * 2}),
    ("llama", {"sliding_window": 64}),
    ("llama", {"layer_types": ["chunked_attention", "full_attention"]}),
]


@pytest.mark.parametrize(("model_type", "fields"), WINDOWED)
def test_windows_are_refused_by_name(model_type: str, fields: dict[str, Any]):
    with pytest.raises(ValueError, match="some/base: .*sliding_window.*not supported; use a base with full attention"):
        check_base(base_config(model_type, **fields), where="some/base")


@pytest.mark.parametrize(
    ("own", "fields"),
    [
        (OrthrusQwen2Config, {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}),
        (OrthrusMistralConfig, {"sliding_window": 64}),
        (OrthrusLlamaConfig, {"sliding_window": 64}),
    ],
)
def test_configurations_refuse_windows_too(own: Any, fields: dict[str, Any]):
    with pytest.raises(ValueError, match="sliding_window"):
        own(**fields)


@pytest.mark.parametrize(
    ("stock", "fields"),
    [
        (Qwen3Config, {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 0}),
        (Qwen3Config, {"use_sliding_window": True, "sliding_window": None}),
        (Qwen2Config, {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}),
        (Qwen2Config, {"use_sliding_window": True, "sliding_window": 64, "layer_types": ["full_attention"] * 2}),
        (Qwen2Config, {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 1}),
        (MistralConfig, {"sliding_window": None}),
        (LlamaConfig, {"sliding_window": None}),
    ],
)
def test_window_fields_without_a_windowed_layer_are_harmless(stock: Any, fields: dict[str, Any]):
    config = base_config(stock.model_type, **fields)
    assert check_base(config, where="x").stock_config is stock
    assert "sliding_attention" not in (getattr(stock(**config), "layer_types", None) or ()), "transformers disagrees"


@pytest.mark.parametrize("model_type", [row.model_type for row in ROWS])
def test_angles_that_change_with_the_pass_are_refused_by_name(model_type: str):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 64, "factor": 2.0}  # fmt: skip
    with pytest.raises(ValueError, match="some/base: rope_parameters: rope_type 'longrope' is not supported, only"):
        check_base(base_config(model_type, sliding_window=None, rope_parameters=rope), where="some/base")


LLAMA_3_2_1B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "torch_dtype": "bfloat16",
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3",
                     "original_max_position_embeddings": 8192},
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "attention_bias": False, "mlp_bias": False,
    "pretraining_tp": 1,
}  # fmt: skip
SMOLLM2_135M = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "max_position_embeddings": 8192,
    "rope_theta": 100000, "rope_interleaved": False, "rope_scaling": None, "rms_norm_eps": 1e-05,
}  # fmt: skip
QWEN2_5_0_5B = {
    "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True, "max_window_layers": 24,
    "sliding_window": 32768, "use_sliding_window": False, "rope_theta": 1000000.0, "max_position_embeddings": 32768,
}  # fmt: skip
MISTRAL_7B_V0_3 = {
    "model_type": "mistral", "vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
    "sliding_window": None, "rope_theta": 1000000.0, "max_position_embeddings": 32768, "rms_norm_eps": 1e-05,
}  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "num_base", "head_dim", "rope_type"),
    [
        (LLAMA_3_2_1B, 1_235_814_400, 64, "llama3"),
        (SMOLLM2_135M, 134_515_008, 64, "default"),
        (QWEN2_5_0_5B, 494_032_768, 64, "default"),
        (MISTRAL_7B_V0_3, 7_248_023_552, 128, "default"),
    ],
)
def test_published_configurations_give_the_published_sizes(
    fields: dict[str, Any], num_base: int, head_dim: int, rope_type: str
):
    """config.json in the spelling of transformers 4, as the Hub has it."""
    config, _ = build_config(OrthrusLM.config_class, fields, where="x", block_size=32, mask_token_id=7)
    shapes = expected_shapes(OrthrusLM, config)
    assert sum(math.prod(shape) for name, shape in shapes.items() if not is_view_tensor(name)) == num_base
    assert config.head_dim == head_dim and config.rope_parameters["rope_type"] == rope_type
    assert config.rope_parameters["rope_theta"] == fields["rope_theta"]


def test_quantisation_and_missing_shapes_are_refused_by_name():
    with pytest.raises(ValueError, match="quantization_config"):
        check_base(released_config(quantization_config={"quant_method": "fp8"}), where="x")
    for model_type in ("qwen3", "llama"):
        with pytest.raises(ValueError, match="lacks hidden_size"):
            check_base(released_config(hidden_size=None, model_type=model_type), where="x")


def test_a_given_configuration_of_another_family_is_refused(tmp_path):
    """Mistral's tensors have Llama's names and shapes: nothing else would tell them apart."""
    base = write_stock(tmp_path / "base", random_model(variant="llama3"), variant="llama3")
    view = {"block_size": 8, "mask_token_id": 260}
    with pytest.raises(ValueError, match="config is a OrthrusMistralConfig .orthrus_mistral., but .* family llama"):
        load_model(base, start_view=True, config=OrthrusMistralConfig(**view))
    given = load_model(base, start_view=True, **view).config
    assert load_model(base, start_view=True, config=given).config.rope_parameters["rope_type"] == "llama3"
    edit_json(base / "config.json", model_type="mixtral")
    with pytest.raises(ValueError, match="model_type 'mixtral', which is not supported"):
        load_model(base, start_view=True, **view)
