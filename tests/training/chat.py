"""A tokenizer with chat tokens, and chat templates of the kinds that bases have."""

from functools import cache
from typing import Any

from transformers import AutoTokenizer

from orthrus.environment import BUNDLED

PLAIN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ m.content + '<|im_end|>' }}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Every turn is written the same way, wherever it stands."""
MARKED = PLAIN.replace(
    "{{ m.content + '<|im_end|>' }}",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}",
)
"""The same, with its replies marked."""
FORGETFUL = (
    "{% set last = namespace(user=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > last.user %}"
    "{{ '<think>\n' + (m.reasoning_content if m.reasoning_content is defined else '') + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>' }}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
"""As Qwen3's: earlier replies lose their thinking, and without thinking the prompt ends with an empty one."""


@cache
def tokenizer(template: str | None = None) -> Any:
    """The bundled tokenizer with chat tokens and this template."""
    made = AutoTokenizer.from_pretrained(BUNDLED)
    made.add_tokens(["<|im_start|>", "<|im_end|>", "<think>", "</think>"], special_tokens=True)
    made.chat_template = template
    return made


def turns(*contents: str) -> list[dict[str, str]]:
    """A conversation, user and assistant by turns."""
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]
