"""Seconds, TFLOP/s and peak memory of one micro-batch of view training, at exact Qwen3 shapes with random weights.

    python benchmarks/training_speed.py --shape 1.7b --rows 4

FLOPs counted are those of matrix products with weights: teacher forward over the clean row, block forward, its
gradient by the inputs (all weights) and by the weights (the view's alone), the head once for each distinct position of
the teacher and once for every draft. Attention itself is left out, so the figure is a lower bound.
"""

import argparse
import json
import statistics
import time

import torch

from orthrus.config import OrthrusConfig
from orthrus.model.modeling import OrthrusLM
from orthrus.training.recipe import ViewStage
from orthrus.training.rows import one_reply_rows
from orthrus.training.trainer import ViewTask, thaw

SHAPES = {
    "toy": dict(layers=2, hidden=64, heads=4, kv=2, mlp=96, tied=True, head_dim=16, vocab=512),
    "0.6b": dict(layers=28, hidden=1024, heads=16, kv=8, mlp=3072, tied=True, head_dim=128, vocab=151_936),
    "1.7b": dict(layers=28, hidden=2048, heads=16, kv=8, mlp=6144, tied=True, head_dim=128, vocab=151_936),
    "4b": dict(layers=36, hidden=2560, heads=32, kv=8, mlp=9728, tied=True, head_dim=128, vocab=151_936),
    "8b": dict(layers=36, hidden=4096, heads=32, kv=8, mlp=12_288, tied=False, head_dim=128, vocab=151_936),
}
"""Published configurations of Qwen3 (method.md names 1.7B, 4B and 8B), and one that runs anywhere."""


def new_model(shape: dict, *, block_size: int, device: str) -> OrthrusLM:
    """A randomly initialised dual-view model of this shape in bf16."""
    config = OrthrusConfig(
        vocab_size=shape["vocab"], hidden_size=shape["hidden"], intermediate_size=shape["mlp"],
        num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"], num_key_value_heads=shape["kv"],
        head_dim=shape["head_dim"], max_position_embeddings=40_960, tie_word_embeddings=shape["tied"],
        block_size=block_size, mask_token_id=shape["vocab"] - 1,
    )  # fmt: skip
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return OrthrusLM(config)
    finally:
        torch.set_default_dtype(default)


def weight_flops(shape: dict, *, row_tokens: int, num_queries: int) -> int:
    """FLOPs of one row's micro-batch in products with weights, 2 for each multiply-add."""
    width = shape["heads"] * shape["head_dim"]
    attention = shape["hidden"] * (2 * width + 2 * shape["kv"] * shape["head_dim"])
    body = shape["layers"] * (attention + 3 * shape["hidden"] * shape["mlp"]) + shape["hidden"] * shape["vocab"]
    teacher = 2 * row_tokens * body
    forward = 2 * num_queries * body
    by_weights = 2 * num_queries * shape["layers"] * attention
    return teacher + 2 * forward + by_weights


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="1.7b")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--row-tokens", type=int, default=2048)
    parser.add_argument("--blocks", type=int, default=256)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    torch.manual_seed(0)
    shape, cuda = SHAPES[options.shape], options.device == "cuda"
    started = time.perf_counter()
    model = new_model(shape, block_size=options.block_size, device=options.device)
    thaw(model, model.view_parameters())
    task = ViewTask(model, ViewStage(blocks=((options.block_size, options.blocks),)))
    generator = torch.Generator(options.device).manual_seed(0)
    ids = torch.randint(shape["vocab"] - 8, (options.rows, options.row_tokens), device=options.device)
    first = torch.full((options.rows,), 1, device=options.device)
    rows = one_reply_rows(ids, first, torch.full_like(first, options.row_tokens))
    built, seconds, compile_seconds = time.perf_counter() - started, [], 0.0
    for step in range(options.steps + 2):
        if cuda:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        loss, _ = task(rows, task.blocks.sample(rows.anchorable_BT, generator))
        loss.backward()
        if cuda:
            torch.cuda.synchronize()
        spent = time.perf_counter() - begun
        if step == 0:
            compile_seconds = spent
            if cuda:
                torch.cuda.reset_peak_memory_stats()
        elif step > 1:
            seconds.append(spent)
        print(f"step {step}: {spent:.3f} s", flush=True)
    median = statistics.median(seconds)
    num_queries = options.blocks * options.block_size
    flops = options.rows * weight_flops(shape, row_tokens=options.row_tokens, num_queries=num_queries)
    print(
        json.dumps(
            {
                "shape": options.shape, "rows": options.rows, "row_tokens": options.row_tokens,
                "blocks": options.blocks, "block_size": options.block_size, "microbatch_seconds": median,
                "tflops": flops / median / 1e12, "tflop": flops / 1e12, "supervised_rows_per_second":
                options.rows * options.blocks * (options.block_size - 1) / median,
                "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
                "first_step_seconds": compile_seconds, "build_seconds": built, "loss": loss.item(),
                "hardware": torch.cuda.get_device_name() if cuda else "cpu", "torch": torch.__version__,
            }
        ),
        flush=True,
    )  # fmt: skip


if __name__ == "__main__":
    main()
