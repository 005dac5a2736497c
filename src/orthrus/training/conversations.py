"""Which tokens of a conversation the assistant wrote, found by the base's own chat template.

A template that marks its replies with `{% generation %}` says so itself. With any other a conversation is rendered
several times: up to where a reply begins, which must be a prefix of the rendering with the reply, which should be a
prefix of the whole. Templates that change earlier turns (Qwen3's drops their thinking) break the second rule, and then
each reply becomes a document of its own, behind the history as the base sees it when it writes that reply.

Text is encoded piece by piece, prompt and reply apart, because that is how the base meets it: a prompt is encoded
before there is a reply. What stands behind a reply's end token is no part of it.
"""

import re
from collections.abc import Iterable
from typing import Any

GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
BEGIN, END = "\ue000\ue010", "\ue000\ue011"
"""Where a marked reply begins and ends, while its text is looked for: characters that no language has."""

Pieces = list[tuple[str, int]]
"""The text of a document in the pieces that are encoded apart, and the reply that each is, from 1 (0: none)."""
Messages = list[dict[str, Any]]


def visible_mark(mark: re.Match) -> str:
    """A `{% generation %}` or `{% endgeneration %}` as a block that prints where it stands."""
    return f"{{%{mark[1]} if true %}}{{{{ '{END if mark[2] else BEGIN}' }}}}{{% endif {mark[3]}%}}"


class ConversationEncoder:
    """Conversations as pieces of text, prompts and replies, by one tokenizer's chat template.

    The tokenizer must have a template. Raises `ValueError` for an option that it never reads; switching off (`false`,
    `null`) what a template does not have is no mistake.
    """

    def __init__(self, tokenizer: Any, options: dict[str, Any]):
        self.tokenizer, self.options = tokenizer, options
        template = tokenizer.get_chat_template()
        unread = [name for name, value in options.items() if value not in (False, None) and name not in template]
        if unread:
            raise ValueError(f"data.template_options: the base's chat template never reads {unread[0]!r}")
        self.marks_replies = bool(GENERATION.search(template))
        # Between two blocks, so that the template's own marks keep what they do to the blanks around them.
        self.visible_marks = GENERATION.sub(visible_mark, template)

    def whole(self, messages: Messages, where: str) -> list[Pieces]:
        """The whole conversation, without a word on who wrote what."""
        return [[(self._render(messages, where), 0)]]

    def replies(self, messages: Messages, where: str) -> list[Pieces]:
        """The conversation up to its last reply: one document, or one for each reply; none without a reply.

        Raises `ValueError` naming the conversation whose replies cannot be told from their prompts.
        """
        turns = [number for number, turn in enumerate(messages) if turn["role"] == "assistant"]
        if not turns:
            return []
        if self.marks_replies:
            return [self._marked(messages[: turns[-1] + 1], where)]
        spans = [self._span(messages, turn, where) for turn in turns]
        whole = spans[-1][1]
        ends = [0, *(len(through) for _, through in spans)]
        in_order = all(end <= len(before) for end, (before, _) in zip(ends, spans, strict=False))
        if in_order and all(whole.startswith(through) for _, through in spans):
            return [pieces_of(whole, [(len(before), len(through)) for before, through in spans])]
        return [pieces_of(through, [(len(before), len(through))]) for before, through in spans]

    def _span(self, messages: Messages, turn: int, where: str) -> tuple[str, str]:
        """The conversation up to where a reply begins, and to where it has ended."""
        before = self._render(messages[:turn], where, add_generation_prompt=True)
        through = self._render(messages[: turn + 1], where)
        if not through.startswith(before):
            raise ValueError(
                f"{where}: the chat template writes message {turn + 1}, a reply, in another way than it asks for one, "
                "so its tokens cannot be found. A reply with thinking needs data.template_options.enable_thinking; "
                "else mark replies in the template with {% generation %}, or give prompt_ids and response_ids"
            )
        return before, through

    def _marked(self, messages: Messages, where: str) -> Pieces:
        """The conversation with its replies as the template marks them.

        The tokenizer can say which tokens those are, but only of a text that was encoded as a whole.
        """
        text, spans, start = "", [], 0
        for part in re.split(f"({BEGIN}|{END})", self._render(messages, where, chat_template=self.visible_marks)):
            if part == BEGIN:
                start = len(text)
            elif part == END:
                spans.append((start, len(text)))
            else:
                text += part
        if text != self._render(messages, where) or not spans:
            raise ValueError(f"{where}: the replies that the chat template marks cannot be told from its text")
        return pieces_of(text, spans)

    def _render(self, messages: Messages, where: str, **options: Any) -> str:
        return self._apply(messages, where, tokenize=False, **options)

    def _apply(self, messages: Messages, where: str, **options: Any) -> Any:
        """The chat template over messages; what it raises (roles in a wrong order, say) names the conversation."""
        try:
            return self.tokenizer.apply_chat_template(messages, **options, **self.options)
        except Exception as error:  # a template is a program of its own: Jinja's errors, and Python's from inside it
            raise ValueError(f"{where}: the chat template refuses the conversation: {error}") from error


def pieces_of(text: str, spans: Iterable[tuple[int, int]]) -> Pieces:
    """A text up to its last reply, prompts and replies by turns, none of them empty."""
    pieces, done = [], 0
    for number, (start, end) in enumerate(spans, start=1):
        # The line break behind an end token is the template's, not the base's.
        end = start + len(text[start:end].rstrip())
        pieces += [(text[done:start], 0), (text[start:end], number)]
        done = end
    return [(piece, reply) for piece, reply in pieces if piece]
