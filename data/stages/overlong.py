"""Conversations that are longer than a row: what is kept of them.

a conversation of three turns and a row that ends in the second reply

| prompt 1 | reply 1 | prompt 2 | reply 2 ····|·· | prompt 3 | reply 3 |
                                              ↑ seq_len
drop         nothing is kept
truncate     prompt 1, reply 1, prompt 2, and reply 2 up to the end of the row
split_turns  turn 1 alone, turn 2 alone, turn 3 alone, or as many in a row as fit

A masked reply is context: a turn at the end whose reply is masked is not kept for itself, nor is it ever cut.

What can't fit by its characters alone is never encoded: a text of millions would take minutes and gigabytes.
"""

from dataclasses import replace

from data.schema import Conversation, TokenizedConversation
from data.template import ChatTokenizer

LONGEST_PIECE = 16
"""Characters of the vocabulary's longest piece, a run of spaces: no more become one token."""

MARGIN = 4096
"""Characters that a text keeps beyond those that can fit, in which a word ends."""


def least_tokens(conversation: Conversation) -> int:
    """A number of tokens that a conversation has at least, by its characters between the outer white space."""
    return sum(-(-len(message.content.strip()) // LONGEST_PIECE) for message in conversation.messages)


def within_reach(conversation: Conversation, seq_len: int) -> Conversation:
    """The same conversation, of each text only what can matter to `truncate` and `split_turns`.

    A text that is cut is still longer than a row, and its first `seq_len` tokens are those of the whole; only in a word
    of more than `MARGIN` characters the last of them may differ.
    """
    most = LONGEST_PIECE * seq_len + MARGIN
    if all(len(message.content) <= most for message in conversation.messages):
        return conversation
    # The end is one that no strip takes off.
    return Conversation(
        tuple(
            message if len(message.content) <= most else replace(message, content=f"{message.content[:most]}\n.")
            for message in conversation.messages
        )
    )


def truncate(tokenized: TokenizedConversation, seq_len: int) -> TokenizedConversation | None:
    """The beginning of a conversation, at most `seq_len` tokens, or None if nothing in it would be trained.

    Whole last turns are dropped, and the end of the last reply is cut; a prompt is never cut, since nothing would be
    trained after it. A cut reply keeps its first trained token at least, and loses its `</s>`: the model must not learn
    to stop there.
    """
    if len(tokenized) <= seq_len:
        return tokenized
    end = 0
    spans: list[int] = []
    for prompt, reply in zip(tokenized.spans[::2], tokenized.spans[1::2], strict=True):
        free = seq_len - end - prompt
        if free <= 0:
            break
        spans += (prompt, min(reply, free))
        end += prompt + min(reply, free)
    while spans and not spans[-1]:  # a masked reply with nothing trained after it
        del spans[-2:]
    return TokenizedConversation(tokenized.packed_ids[: 2 * sum(spans)], tuple(spans)) if spans else None


def split_turns(conversation: Conversation, tokenizer: ChatTokenizer, seq_len: int) -> list[TokenizedConversation]:
    """The turns in several conversations of at most `seq_len` tokens, each with as many as fit, in their order.

    Each begins with the system message, if there is one. A turn that is too long alone is truncated, and left out if
    its prompt does not fit, as are turns that fit a conversation of which nothing is trained; the list is empty if
    nothing is left.
    """
    system = () if conversation.system is None else (conversation.system,)
    turns = conversation.turns
    parts: list[TokenizedConversation] = []
    first = 0
    while first < len(turns):
        part, last = None, first
        for end in range(first + 2, len(turns) + 1, 2):
            longer = tokenizer.encode(Conversation((*system, *turns[first:end])))
            if len(longer) > seq_len and part is not None:
                break
            part, last = truncate(longer, seq_len), end
            if len(longer) > seq_len:
                break
        if part is not None and part.supervised:
            parts.append(part)
        first = last
    return parts
