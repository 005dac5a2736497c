"""Checkpoints on disk as the released ones are, quirks included, with tiny random weights."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from orthrus.model.modeling import OrthrusLM
from tests.cli.tiny import byte_tokenizer
from tests.families import dual_config, family, fields_of, stock_class

NUM_TOKENS = 258
"""len(tokenizer): the mask token's id, a row of the embedding that no text uses."""

FIELDS = {
    "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "hidden_act": "silu", "max_position_embeddings": 128,
    "max_window_layers": 2, "initializer_range": 0.2, "rms_norm_eps": 1e-6, "sliding_window": None,
    "use_sliding_window": False, "attention_bias": False, "attention_dropout": 0.0,
}  # fmt: skip


ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}


def random_model(*, tied: bool = True, seed: int = 1, variant: str = "qwen3") -> OrthrusLM:
    """A model whose view differs from its AR projections."""
    torch.manual_seed(seed)
    shape = FIELDS | ROPE | {"tie_word_embeddings": tied, "eos_token_id": 257}
    config = dual_config(variant, shape, block_size=8, mask_token_id=NUM_TOKENS)
    model = OrthrusLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def released_tensors(model: OrthrusLM, *, head: bool = False, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """The tensors of a released checkpoint; `head` stores the LM head of a tied model too."""
    tensors = {name: tensor.detach().to(dtype).clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings and not head:
        tensors.pop("lm_head.weight")
    return tensors


def released_config(*, tied: bool = True, rope: str = "rope_parameters", **more: Any) -> dict[str, Any]:
    """config.json as released: a wrong model_type, dead LoRA fields, no cache, no pad, one EOS."""
    fields: dict[str, Any] = FIELDS | {
        "architectures": ["OrthrusLM"],
        "model_type": "qwen3",
        "r": 16,
        "lora_alpha": 32,
        "use_cache": False,
        "block_size": 8,
        "mask_token_id": NUM_TOKENS,
        "eos_token_id": 257,
        "tie_word_embeddings": tied,
        "dtype": "bfloat16",
        "auto_map": {"AutoModelForCausalLM": "modeling_orthrus.OrthrusLM"},
    }
    if rope == "rope_parameters":
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": 1000000}
    else:
        fields |= {"rope_theta": 1000000, "rope_scaling": None}
    return fields | more


def write_shards(folder: Path, tensors: dict[str, Tensor], *, num_shards: int = 1) -> None:
    """The tensors as one file, or round robin in several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i in range(num_shards):
        name = f"model-{i + 1:05}-of-{num_shards:05}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[i::num_shards]}
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_released(
    folder: Path,
    model: OrthrusLM,
    *,
    head: bool = False,
    num_shards: int = 1,
    template: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    **config: Any,
) -> Path:
    """A whole released checkpoint; early ones have no chat template."""
    write_shards(folder, released_tensors(model, head=head, dtype=dtype), num_shards=num_shards)
    fields = released_config(tied=model.config.tie_word_embeddings, **config)
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 257, "use_cache": False}))
    write_tokenizer(folder, template=template)
    return folder


def write_stock(
    folder: Path, model: OrthrusLM, *, dtype: torch.dtype = torch.bfloat16, variant: str = "qwen3", **more: Any
) -> Path:
    """The base alone, as a stock checkpoint of its family with a chat template."""
    tensors = {name: t for name, t in released_tensors(model, dtype=dtype).items() if "_diff." not in name}
    write_shards(folder, tensors)
    fields = released_config(tied=model.config.tie_word_embeddings)
    for name in ("r", "lora_alpha", "block_size", "mask_token_id", "auto_map"):
        fields.pop(name)
    if variant != "qwen3":
        fields = fields_of(variant, fields | ROPE) | {"dtype": "bfloat16"}
    fields |= {"model_type": family(variant).model_type, "architectures": [stock_class(variant)]}
    (folder / "config.json").write_text(json.dumps(fields | {"dtype": str(dtype).removeprefix("torch.")} | more))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 256], "top_k": 20}))
    write_tokenizer(folder, template="{{ messages[0]['content'] }}")
    return folder


def write_tokenizer(folder: Path, *, template: str | None) -> PreTrainedTokenizerFast:
    """A byte tokenizer of `NUM_TOKENS` tokens."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    assert len(tokenizer) == NUM_TOKENS
    return tokenizer


def edit_json(path: Path, **fields: Any) -> None:
    """Change fields of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
