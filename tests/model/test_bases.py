"""Which bases can carry a view."""

import pytest
from transformers import Qwen3Config

from orthrus.model.bases import check_base, has_sliding_window
from tests.model.released import released_config


def test_qwen3_and_own_configurations_are_accepted():
    assert check_base(released_config(), where="x").name == "Qwen3"
    assert check_base(released_config(model_type="orthrus"), where="x").name == "Qwen3"
    assert check_base(Qwen3Config().to_dict(), where="x").name == "Qwen3"


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3_moe", "qwen3_5", None])
def test_other_families_are_refused_by_name(model_type: str | None):
    with pytest.raises(ValueError, match=f"some/base has model_type {model_type!r}.*supported: orthrus, qwen3"):
        check_base(released_config(model_type=model_type), where="some/base")


def test_windows_quantisation_and_missing_shapes_are_refused_by_name():
    windowed = released_config(use_sliding_window=True, sliding_window=64, max_window_layers=1)
    with pytest.raises(ValueError, match="use_sliding_window"):
        check_base(windowed, where="x")
    with pytest.raises(ValueError, match="quantization_config"):
        check_base(released_config(quantization_config={"quant_method": "fp8"}), where="x")
    with pytest.raises(ValueError, match="lacks hidden_size"):
        check_base(released_config(hidden_size=None), where="x")


@pytest.mark.parametrize(
    "fields",
    [
        {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": None},
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": 64, "layer_types": ["full_attention"] * 2},
    ],
)
def test_window_fields_without_a_windowed_layer_are_harmless(fields: dict):
    config = {name: value for name, value in released_config(**fields).items() if name in Qwen3Config().to_dict()}
    assert not has_sliding_window(config)
    assert "sliding_attention" not in Qwen3Config(**config).layer_types, "transformers reads these fields otherwise"
