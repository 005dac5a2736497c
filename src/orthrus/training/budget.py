"""What a run will need, computed from shapes before anything is loaded: parameters, memory, arithmetic.

Arithmetic: 2 operations for each weight and row of a matrix product. A micro-batch row of T clean tokens and Q block
positions takes the teacher's pass (T rows through all weights and the head), the block pass (Q rows), its gradient with
respect to activations (Q rows again) and to the view's weights (Q rows through those alone). Attention itself and
gradient checkpointing's second forward are counted apart or not at all; for the published recipe (T 2,048, Q 256 x 32)
this gives 69, 164 and 304 TFLOP a row at 1.7B, 4B and 8B.

Memory is an estimate: what must be held, without what allocator and kernels add.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from orthrus.model.bases import family_of
from orthrus.model.modeling import OrthrusLM
from orthrus.training.loss import CHUNK_ELEMENTS
from orthrus.training.view_recipe import ViewRecipe

MASTER_BYTES = 16
"""Of a trained parameter: fp32 weight, gradient and AdamW's two averages."""
BUCKET_BYTES = 4
"""Of a trained parameter: DDP's copy of the fp32 gradient, in the buckets that it exchanges."""
CHUNK_COPIES = 4
"""Copies of a loss chunk's fp32 logits that live at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """Of one rank, unless said otherwise."""

    num_trained: int
    num_frozen: int
    row_flops: int
    step_flops: int
    """Of all ranks together."""
    weight_bytes: int
    """The frozen base, and the view in the base's dtype while a pass runs."""
    training_bytes: int
    """fp32 view, its gradients, AdamW's averages, and gradients on their way between ranks."""
    activation_bytes: int
    """What the block pass keeps for its backward, and all layers' clean keys and values."""
    loss_bytes: int

    @property
    def total_bytes(self) -> int:
        """Everything together."""
        return self.weight_bytes + self.training_bytes + self.activation_bytes + self.loss_bytes


def shapes_of(config: Any) -> nn.Module:
    """The model on the meta device: shapes without numbers."""
    assert family_of(config)
    with torch.device("meta"):
        return OrthrusLM(config)


def budget(recipe: ViewRecipe, config: Any, *, num_ranks: int) -> Budget:
    """The budget of a recipe on a base of this configuration."""
    model: Any = shapes_of(config)
    view = sum(p.numel() for p in model.view_parameters().values())
    total = sum(p.numel() for p in model.parameters())  # a tied head is one parameter with the embedding
    head = model.lm_head.weight.numel()
    tied = model.lm_head.weight is model.model.embed_tokens.weight or config.tie_word_embeddings
    frozen = total - view - (head if tied and model.lm_head.weight is not model.model.embed_tokens.weight else 0)
    worked = frozen - (0 if tied else head)  # the embedding is looked up, not multiplied; tied, it is the head
    num_clean = recipe.data.row_tokens
    num_blocks = sum(width * count for width, count in recipe.view.blocks)
    row_flops = 2 * worked * num_clean + 4 * worked * num_blocks + 2 * view * num_blocks
    item = torch.empty(0, dtype=getattr(torch, recipe.model.dtype)).element_size()
    shards = num_ranks if recipe.train.sharding == "fsdp2" else 1
    return Budget(
        num_trained=view,
        num_frozen=frozen,
        row_flops=row_flops,
        step_flops=row_flops * recipe.train.rows_per_step,
        weight_bytes=weight_bytes(model, frozen, view, item=item, shards=shards),
        training_bytes=training_bytes(model, view, sharding=recipe.train.sharding, num_ranks=num_ranks, item=item),
        activation_bytes=recipe.train.rows_per_pass * activation_bytes(recipe, config, num_clean, num_blocks, item),
        loss_bytes=CHUNK_COPIES * 4 * min(CHUNK_ELEMENTS, recipe.train.rows_per_pass * num_blocks * config.vocab_size),
    )


def weight_bytes(model: Any, frozen: int, view: int, *, item: int, shards: int) -> int:
    """A rank's base and its view in the base's dtype; of spread weights also what is whole at a time: what the layers
    share, and two layers (one in work, the next on its way)."""
    whole = (frozen + (view if item < 4 else 0)) * item  # a view in fp32 is its own compute copy
    if shards == 1:
        return whole
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    outside = frozen + view - layer * len(model.model.layers)
    return whole // shards + (outside + 2 * layer) * item


def training_bytes(model: Any, view: int, *, sharding: str, num_ranks: int, item: int) -> int:
    """The optimiser's side of the view, and gradients between ranks: DDP's buckets hold a copy of all; FSDP2 shares out
    one layer's at a time (sharding.py), whole as the backward pass made them and again in fp32."""
    if num_ranks == 1:
        return view * MASTER_BYTES
    if sharding == "ddp":
        return view * (MASTER_BYTES + BUCKET_BYTES)
    return view * MASTER_BYTES // num_ranks + view // len(model.model.layers) * (item + 4)


def activation_bytes(recipe: ViewRecipe, config: Any, num_clean: int, num_blocks: int, item: int) -> int:
    """Kept for one row: inputs of norms, twins, attention and MLP, and clean keys and values of all layers."""
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    # Norms' and twins' inputs, queries before and after norm and rotation, mixed values, gate, up and their product.
    layer = num_blocks * (3 * hidden + 3 * queries + keys + 3 * inner) + 2 * keys * (num_clean + num_blocks)
    clean = layers * 2 * keys * num_clean
    kept = layers * num_blocks * hidden + layer if recipe.train.gradient_checkpointing else layers * layer
    return item * (clean + kept)


def report(found: Budget, recipe: ViewRecipe, *, num_ranks: int) -> str:
    """The budget as lines for a terminal."""
    train = recipe.train
    gib = {
        name: getattr(found, f"{name}_bytes") / 2**30 for name in ("weight", "training", "activation", "loss", "total")
    }
    spread = f"spread over {num_ranks} ranks" if train.sharding == "fsdp2" else "whole on every rank"
    return "\n".join(
        [
            f"trained parameters   {found.num_trained:,} (*_diff)",
            f"frozen parameters    {found.num_frozen:,}",
            f"memory of a rank     {gib['total']:.1f} GiB, an estimate, {spread}:",
            f"  weights            {gib['weight']:.1f} GiB ({recipe.model.dtype})",
            f"  training           {gib['training']:.1f} GiB (fp32 view, gradients, AdamW: {MASTER_BYTES} bytes each"
            f"{', gradients on their way' if num_ranks > 1 else ''})",
            f"  activations        {gib['activation']:.1f} GiB ({train.rows_per_pass} rows a micro-batch"
            f"{', checkpointed' if train.gradient_checkpointing else ''})",
            f"  loss chunks        {gib['loss']:.1f} GiB",
            f"arithmetic of a row  {flop(found.row_flops)}, of a step {flop(found.step_flops)}: 2 x weights x rows of",
            "                     the teacher's pass, the block pass and its two gradients; attention left out",
            "                     (training/budget.py)",
        ]
    )


def flop(number: int) -> str:
    """A number of operations with three figures."""
    for scale, name in ((1e15, "PFLOP"), (1e12, "TFLOP")):
        if number >= scale:
            return f"{number / scale:.3g} {name}"
    return f"{number / 1e9:.3g} GFLOP"
