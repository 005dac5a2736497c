"""How often, and how near a tie, bf16 texts part from stock transformers': python examples/against_stock.py [MODEL].

Stock does not repeat itself in a batch either. That rate stands beside ours; without it ours says nothing. A text that
parts where both tokens are the likeliest up to rounding is no error; one that parts elsewhere wants an explanation.
"""

import sys
from importlib.resources import files

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from orthrus import OrthrusForCausalLM
from orthrus.evaluation.lossless import find_divergence

name = sys.argv[1] if len(sys.argv) > 1 else str(files("orthrus") / "assets" / "tiny")
device = "cuda" if torch.cuda.is_available() else "cpu"
stock = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).to(device)
model = OrthrusForCausalLM.from_pretrained(name, dtype=torch.bfloat16).to(device)
tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
prompts = ["import os\n", "class Stack:\n    def push(self, item):\n", "def fibonacci(n: int) -> int:\n"]


def write(writer, texts, length=100):
    """New tokens of each text, padded to one length, so that a text that ended keeps its end."""
    batch = tokenizer(texts, return_tensors="pt", padding=True).to(device)
    new = writer.generate(**batch, max_new_tokens=length, do_sample=False)[:, batch["input_ids"].shape[1] :]
    return torch.nn.functional.pad(new, (0, length - new.shape[1]), value=tokenizer.pad_token_id).tolist()


alone = [write(stock, [text])[0] for text in prompts]
drafted = [write(model, [text])[0] for text in prompts]
for way, texts in {"drafted": drafted, "stock, batched": write(stock, prompts)}.items():
    pairs = zip(prompts, alone, texts, strict=True)
    parted = [d for text, a, b in pairs if (d := find_divergence(model, tokenizer(text).input_ids, a, b))]
    print(f"{way}: {len(prompts) - len(parted)} of {len(prompts)} texts as stock alone")
    for d in parted:
        print(f"  token {d.position}: gap {d.gap:.3g}, {'rounding' if d.is_rounding else 'NOT rounding'}")
