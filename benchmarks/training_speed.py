"""Seconds, TFLOP/s and peak memory of one micro-batch of view training, at exact Qwen3 shapes with random weights.

    python benchmarks/training_speed.py --shape 1.7b --rows 4 --path naive --path intervals     # default: all paths

    naive      layers in plain PyTorch, attention under a dense boolean mask, logits of all positions at once
    compiled   layers compiled, one graph for all of them
    chunked    also the head and the loss one chunk of positions at a time
    flex       also block-sparse attention by PyTorch's flex_attention instead of the dense mask
    intervals  this project's kernels instead of flex_attention: what training runs

FLOPs counted are those of matrix products with weights: teacher forward over the clean row, block forward, its
gradient by the inputs (all weights) and by the weights (the view's alone), the head once for each distinct position of
the teacher and once for every draft. Attention itself is left out, so the figure is a lower bound.
"""

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from orthrus.config import OrthrusConfig
from orthrus.evaluation.records import Origin, ResultRecord, here_and_now, read_records, to_json
from orthrus.model.masks import block_training_mask
from orthrus.model.modeling import OrthrusLM
from orthrus.training import forward
from orthrus.training.anchors import Blocks
from orthrus.training.forward import Passes, block_mask
from orthrus.training.loss import Objective, chunk_loss, chunked_view_loss, view_loss
from orthrus.training.rows import Rows, one_reply_rows
from orthrus.training.trainer import thaw

PATHS = ("naive", "compiled", "chunked", "flex", "intervals")

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


class MicroBatch:
    """One micro-batch along one path, put together from the package's own functions."""

    def __init__(self, model: OrthrusLM, blocks: Blocks, path: str):
        self.model, self.blocks = model, blocks
        level = PATHS.index(path)
        self.passes = Passes(model, compiled=level >= 1)
        self.is_chunked = level >= 2
        self.make_mask = {"flex": flex_mask, "intervals": block_mask}.get(path, dense_mask)
        attend: Any = flex_attend if path == "flex" else OUR_ATTEND
        forward.masked_attend = attend
        self.one_chunk = self.passes.compile(chunk_loss)

    def __call__(self, rows: Rows, anchors_BA: Tensor) -> Tensor:
        """The loss. ()."""
        model, blocks, num_clean = self.model, self.blocks, rows.ids_BT.shape[1]
        with torch.no_grad():
            teacher_BTD, clean = self.passes.ar(rows.ids_BT, rows.positions_BT)
        mask = self.make_mask(blocks, anchors_BA, num_clean=num_clean)
        inputs = blocks.inputs(rows, anchors_BA, model.config.mask_token_id)
        student_BQD = self.passes.blocks(inputs, clean, mask)
        head_VD = model.lm_head.weight
        if self.is_chunked:
            return chunked_view_loss(
                Objective(), blocks, rows, anchors_BA, teacher_BTD, student_BQD, head_VD, one_chunk=self.one_chunk
            )[0]
        return view_loss(Objective(), blocks, rows, anchors_BA, teacher_BTD @ head_VD.T, student_BQD @ head_VD.T)[0]


def dense_mask(blocks: Blocks, anchors_BA: Tensor, *, num_clean: int) -> Tensor:
    """The training mask as booleans, on any device."""
    return block_training_mask(anchors_BA, blocks.block_Q, num_clean)


def flex_mask(blocks: Blocks, anchors_BA: Tensor, *, num_clean: int) -> BlockMask:
    """The training mask as flex_attention's metadata, by way of booleans: `create_block_mask` compiles for minutes."""
    block_Q, anchor_BQ = blocks.block_Q, anchors_BA[:, blocks.block_Q]

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        before_anchor = (k < num_clean) & (k < anchor_BQ[b, q])
        return before_anchor | ((k >= num_clean) & (block_Q[(k - num_clean).clamp(min=0)] == block_Q[q]))

    num_queries = len(block_Q)
    return create_block_mask(
        visible, len(anchors_BA), None, num_queries, num_clean + num_queries, device=anchors_BA.device.type
    )


OUR_ATTEND: Any = forward.masked_attend


def flex_attend(
    attention: Any, q: Tensor, clean: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], mask: Any
) -> Tensor:
    """`forward.masked_attend` by flex_attention."""
    keys, values = (torch.cat(pair, dim=2) for pair in zip(clean, own, strict=True))
    mixed = flex_attention(q, keys, values, block_mask=mask, enable_gqa=True, scale=attention.scaling)
    return mixed.transpose(1, 2).flatten(2)


def measure(options: argparse.Namespace, path: str) -> dict:
    """The figures of one path, or what stopped it."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    shape, cuda = SHAPES[options.shape], options.device == "cuda"
    model = new_model(shape, block_size=options.block_size, device=options.device)
    thaw(model, model.view_parameters())
    blocks = Blocks.of(((options.block_size, options.blocks),), torch.device(options.device))
    micro_batch = MicroBatch(model, blocks, path)
    generator = torch.Generator(options.device).manual_seed(0)
    ids = torch.randint(shape["vocab"] - 8, (options.rows, options.row_tokens), device=options.device)
    first = torch.full((options.rows,), 1, device=options.device)
    rows = one_reply_rows(ids, first, torch.full_like(first, options.row_tokens))
    times = []
    for step in range(options.steps + 2):
        if cuda and step == 1:
            torch.cuda.reset_peak_memory_stats()
        begun = now(cuda)
        loss = micro_batch(rows, blocks.sample(rows.anchorable_BT, generator))
        loss.backward()
        times.append(now(cuda) - begun)
        print(f"{options.shape} {path} step {step}: {times[-1]:.3f} s", flush=True)
    median, num_queries = statistics.median(times[2:]), options.blocks * options.block_size
    flops = options.rows * weight_flops(shape, row_tokens=options.row_tokens, num_queries=num_queries)
    supervised = options.rows * options.blocks * (options.block_size - 1)
    return {
        "microbatch_seconds": median,
        "tflops": flops / median / 1e12,
        "supervised_rows_per_second": supervised / median,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "first_step_seconds": times[0],
        "loss": loss.item(),
    }


def now(cuda: bool) -> float:
    """The time, all work on the device done."""
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


NUMBERS = {
    "microbatch_seconds": "s", "tflops": "TFLOP/s", "supervised_rows_per_second": "rows/s", "peak_bytes": "bytes",
    "first_step_seconds": "s",
}  # fmt: skip
"""Names of docs/benchmarks.md and their units."""


def records_of(options: argparse.Namespace, path: str, figures: dict, origin: Origin) -> list[ResultRecord]:
    """The records of one path; one that ran out of memory has no seconds, and says so."""
    params = {
        "model": options.shape, "path": path, "rows": options.rows, "row_tokens": options.row_tokens,
        "num_blocks": options.blocks, "block_size": options.block_size, "dtype": "bfloat16", "steps": options.steps,
    }  # fmt: skip
    if "out_of_memory" in figures:
        return [ResultRecord.of(origin, name="out_of_memory", value=1, unit="runs", params=params)]
    return [
        ResultRecord.of(origin, name=name, value=figures[name], unit=unit, params=params)
        for name, unit in NUMBERS.items()
        if figures[name] is not None
    ]


def main() -> None:
    """Print one JSON line for each path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1.7b")
    parser.add_argument("--path", choices=PATHS, action="append", help="several: one after the other (all)")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--row-tokens", type=int, default=2048)
    parser.add_argument("--blocks", type=int, default=256)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8, help="timed, after two more")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="append the records to this JSON file")
    options = parser.parse_args()
    origin = here_and_now(torch.device(options.device))
    settings = {name: value for name, value in vars(options).items() if name not in ("path", "device", "out")}
    for path in options.path or PATHS:
        try:
            figures = measure(options, path)
        except torch.cuda.OutOfMemoryError as error:
            figures = {"out_of_memory": str(error).split(".")[0]}
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
        line = settings | {"path": path, "hardware": origin.hardware, "torch": torch.__version__} | figures
        print(json.dumps(line), flush=True)
        if options.out:
            kept = read_records(options.out) if options.out.is_file() else []
            options.out.write_text(to_json([*kept, *records_of(options, path, figures, origin)], indent=1) + "\n")


if __name__ == "__main__":
    main()
