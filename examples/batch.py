"""Sample several prompts of different lengths at once: python examples/batch.py [MODEL].

With a seed the text of a row depends on neither its neighbours nor on drafting.
"""

import sys
from importlib.resources import files

from transformers import AutoTokenizer

from orthrus import OrthrusForCausalLM

name = sys.argv[1] if len(sys.argv) > 1 else str(files("orthrus") / "assets" / "tiny")
model = OrthrusForCausalLM.from_pretrained(name, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

prompts = ["import os\n", "class Stack:\n    def push(self, item):\n", "def fibonacci(n: int) -> int:\n"]
inputs = tokenizer(prompts, padding=True, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=40, do_sample=True, temperature=0.7, top_p=0.95, seed=1)
for prompt, row in zip(prompts, output, strict=True):
    continuation = tokenizer.decode(row[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"--- {prompt!r}\n{continuation}")
