"""Stream a continuation with `model.generate`: python examples/generate.py [MODEL] (the bundled one by default)."""

import sys
from importlib.resources import files

from transformers import AutoTokenizer, TextStreamer

from orthrus import OrthrusForCausalLM

name = sys.argv[1] if len(sys.argv) > 1 else str(files("orthrus") / "assets" / "tiny")
model = OrthrusForCausalLM.from_pretrained(name, dtype="auto", attn_implementation="sdpa")
tokenizer = AutoTokenizer.from_pretrained(name)

prompt = 'def word_count(text: str) -> dict[str, int]:\n    """Count how often each word occurs."""\n'
inputs = tokenizer(prompt, return_tensors="pt")
model.generate(**inputs, max_new_tokens=60, use_diffusion_mode=True, streamer=TextStreamer(tokenizer))
