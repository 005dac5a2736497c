"""Read the step loop itself, one record a cycle, and print what drafting did: python examples/stats.py [MODEL]."""

import sys
from importlib.resources import files

from transformers import AutoTokenizer

from orthrus import Decoder, OrthrusForCausalLM, Request, Stopping
from orthrus.decoding.portable import PortableBackend

name = sys.argv[1] if len(sys.argv) > 1 else str(files("orthrus") / "assets" / "tiny")
model = OrthrusForCausalLM.from_pretrained(name, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(name)
decoder = Decoder(PortableBackend(model), tokenizer=tokenizer)

prompt_ids = tokenizer("def is_prime(n: int) -> bool:\n")["input_ids"]
record = decoder.admit(Request(prompt_ids=prompt_ids, stopping=Stopping(max_new_tokens=60)))
while record.finish_reason is None:
    (record,) = decoder.step()
    print(f"{record.num_accepted:2} of {record.num_drafted:2} drafts kept: {tokenizer.decode(record.token_ids)!r}")

stats = decoder.stats(record.row)
decoder.release(record.row)
print(f"{stats.tokens_per_cycle:.2f} tokens per cycle, {stats.tokens_per_forward:.2f} per forward pass")
print(f"cycles by number of accepted drafts: {stats.acceptance_histogram}")
