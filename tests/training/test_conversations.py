"""Which tokens of a conversation are replies, for every kind of chat template."""

from typing import Any

import pytest

from orthrus.training.conversations import ConversationEncoder
from orthrus.training.documents import encode_pieces
from tests.training.chat import FORGETFUL, MARKED, PLAIN, tokenizer, turns

TALK = turns("a = 1", "b = 2", "def f(x):", "    return x\n\n\n", "thanks")
NO_THINKING = {"enable_thinking": False}


Encoded = tuple[list[int], list[int]]
"""Token ids, and the reply of each."""


class Encoder:
    """A conversation's documents as they are trained on."""

    def __init__(self, template: str, options: dict[str, Any]):
        self._conversations = ConversationEncoder(tokenizer(template), options)

    def replies(self, *arguments: Any) -> list[Encoded]:
        return self._encode(self._conversations.replies(*arguments))

    def whole(self, *arguments: Any) -> list[Encoded]:
        return self._encode(self._conversations.whole(*arguments))

    def _encode(self, documents: Any) -> list[Encoded]:
        made = encode_pieces(documents, tokenizer(), special=False)
        return [(document.ids.tolist(), document.reply.tolist()) for document in made]


def encoder(template: str, options: dict | None = None) -> Encoder:
    return Encoder(template, NO_THINKING if options is None else options)


def texts(encoded: Encoded) -> tuple[str, list[str]]:
    """The text of a document and of each of its replies."""
    ids, reply = encoded
    assert len(ids) == len(reply)
    replies = [[i for i, r in zip(ids, reply, strict=True) if r == n + 1] for n in range(max(reply, default=0))]
    decode = tokenizer().decode
    return decode(ids, skip_special_tokens=False), [decode(r, skip_special_tokens=False) for r in replies]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_replies_are_the_assistants_turns_with_their_end_tokens(template: str) -> None:
    (document,) = encoder(template).replies(TALK, "here")
    whole, replies = texts(document)
    assert replies == ["b = 2<|im_end|>", "    return x\n\n\n<|im_end|>"], "content is kept to the last blank"
    rendered = tokenizer(template).apply_chat_template(TALK[:4], tokenize=False)
    assert whole + "\n" == rendered, "what stands behind the last end token is nobody's"


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_a_prompt_is_encoded_as_the_base_meets_it(template: str) -> None:
    """Prompt and reply apart: a token that spans both is none that the base ever writes."""
    ((ids, reply),) = encoder(template).replies(turns("a", "    return x"), "here")
    prompt = tokenizer(template).apply_chat_template(turns("a"), add_generation_prompt=True, return_dict=False)
    whole = tokenizer(template).apply_chat_template(turns("a", "    return x"), return_dict=False)
    assert whole[: len(prompt)] != prompt, "the test needs a line break and an indentation that are one token"
    assert ids[: len(prompt)] == prompt and reply.index(1) == len(prompt)


@pytest.mark.parametrize(
    "mark", ["{%- generation -%}", "{%- generation %}", "{% generation -%}", "\n  {% generation %}\n"]
)
def test_marks_of_every_form_are_found(mark: str) -> None:
    template = MARKED.replace("{% generation %}", mark).replace("{% endgeneration %}", mark.replace("gen", "endgen"))
    (document,) = encoder(template).replies(turns("a", " b = 2"), "here")
    assert texts(document)[1] == [" b = 2<|im_end|>"]


def test_a_template_that_drops_earlier_thinking_gives_a_document_for_each_reply() -> None:
    documents = [texts(document) for document in encoder(FORGETFUL).replies(TALK, "here")]
    assert [replies for _, replies in documents] == [["b = 2<|im_end|>"], ["    return x\n\n\n<|im_end|>"]]
    first, second = (whole for whole, _ in documents)
    assert first.endswith("assistant\n<think>\n\n</think>\n\nb = 2<|im_end|>")
    assert second.count("<think>") == 1, "the history is what the base sees: without the thinking of earlier turns"
    assert "assistant\nb = 2<|im_end|>\n" in second
    (single,) = encoder(FORGETFUL).replies(TALK[:2], "here")
    assert texts(single) == documents[0]


def test_thinking_is_part_of_the_reply_where_it_is_switched_on() -> None:
    talk = turns("a", "b")
    talk[1]["reasoning_content"] = "x = 1"
    (document,) = encoder(FORGETFUL, {"enable_thinking": True}).replies(talk, "here")
    assert texts(document)[1] == ["<think>\nx = 1\n</think>\n\nb<|im_end|>"]
    with pytest.raises(ValueError, match="here: the chat template writes message 2.*enable_thinking"):
        list(encoder(FORGETFUL).replies(talk, "here"))


def test_replies_that_follow_one_another_are_two() -> None:
    talk = [*turns("a", "b = 1"), {"role": "assistant", "content": "c = 2"}, {"role": "tool", "content": "d"}]
    for template in (PLAIN, MARKED):
        (document,) = encoder(template).replies(talk, "here")
        assert texts(document)[1] == ["b = 1<|im_end|>", "c = 2<|im_end|>"], template


@pytest.mark.parametrize("template", [PLAIN, MARKED, FORGETFUL])
def test_a_conversation_without_a_reply_gives_nothing_and_the_whole_is_the_whole(template: str) -> None:
    assert list(encoder(template).replies(TALK[:1], "here")) == []
    ((ids, reply),) = encoder(template).whole(TALK, "here")
    rendered = tokenizer(template).apply_chat_template(TALK, tokenize=False, **NO_THINKING)
    assert tokenizer().decode(ids, skip_special_tokens=False) == rendered and not any(reply)


def test_what_a_template_cannot_do_is_named() -> None:
    with pytest.raises(ValueError, match="template_options.*never reads 'enable_thinking'"):
        encoder(PLAIN, {"enable_thinking": True})
    with pytest.raises(ValueError, match="never reads 'style'"):
        encoder(FORGETFUL, {"style": "short"})
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="here: the chat template refuses the conversation: roles must alternate"):
        list(encoder(strict).replies(TALK, "here"))
