"""The tokenizer's files for other programs: stock transformers, servers, llama.cpp."""

import json
from functools import lru_cache
from pathlib import Path

from tokenizers import AddedToken, decoders, normalizers

from data.merges import merges_only
from data.vocabulary import SENTENCEPIECE, sentencepiece_model

# Stock tokenizers match `<s>` and `</s>` anywhere in the rendered text, even if a message only spells them. So the
# stored template breaks up those of a message with a character that Unicode keeps for a program's own use, and the
# stored tokenizer takes the breaks out again after it has looked for control tokens: the ids are those of `encode`
# whatever a message says, that character among it.
CONTROL = ("<unk>", "<s>", "</s>")
ESCAPE = "\ufdd0"
BREAK, ESCAPED = f"{ESCAPE}1", f"{ESCAPE}0"


CONTINUED = "CONTINUE_FINAL_MESSAGE_TAG "
"""What transformers puts at the end of a last message that is to be continued; it cuts the rendered text there, and
wants to find the message before or after it as it was given."""


def _escapes() -> str:
    """The filters of the template that escape a message."""
    pairs = [(ESCAPE, ESCAPED), *((token, f"{token[0]}{BREAK}{token[1:]}") for token in CONTROL)]
    return "".join(f" | replace('{text}', '{escaped}')" for text, escaped in pairs)


def _refuse(unless: str, sentence: str) -> str:
    """The part of the template that refuses what would otherwise be left out of the prompt without a word."""
    return f"{{%- if not ({unless}) -%}}{{{{ raise_exception('{sentence}') }}}}{{%- endif -%}}"


# `generation` is a tag of transformers' own, which others remove by exactly this spelling.
CHAT_TEMPLATE = (
    _refuse("not tools and not documents", "this model was trained without tools and documents; leave them out")
    + "{%- macro said(message) -%}"
    + _refuse("not message['tool_calls']", "this model was trained without tools; leave out tool_calls")
    + "{%- set content = message['content'] -%}"
    "{%- if content is string -%}{{ content }}"
    "{%- else -%}"
    + _refuse(
        "content is defined and content is not none and content is not mapping and content is iterable",
        "the content of a message has to be text, or a list of text parts",
    )
    + "{%- for part in content -%}"
    + _refuse(
        "part is mapping and part['type'] == 'text' and part['text'] is string",
        "this model reads text alone; give parts of type text",
    )
    + "{{ part['text'] }}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- endmacro -%}"
    "{%- macro plain(text) -%}{{ text" + _escapes() + " }}{%- endmacro -%}"
    "{%- set has_system = messages and messages[0]['role'] == 'system' -%}"
    "{%- set turns = messages[1:] if has_system else messages -%}"
    + _refuse("turns", "there is nothing to answer; give a message of the user")
    + "{%- for message in turns -%}"
    + _refuse(
        "message['role'] == ('user' if loop.index0 % 2 == 0 else 'assistant')",
        "after an optional system message, user and assistant alternate, the user first",
    )
    + "{%- set text = said(message) -%}"
    "{%- if message['role'] == 'user' -%}"
    "{%- set opens = loop.first and has_system -%}"
    "{%- set opening = '<<SYS>>\\n' + plain(said(messages[0])) + '\\n<</SYS>>\\n\\n' if opens else '' -%}"
    "{{ '<s>[INST] ' + (opening + plain(text)) | trim + ' [/INST]' }}"
    "{%- else -%}"
    "{% generation %}{{ ' ' + plain(text) | trim + ' </s>' }}{% endgeneration %}"
    f"{{%- if loop.last and text.endswith('{CONTINUED}') and plain(text) != text -%}}"
    f"{{{{ text | replace('{CONTINUED}', '') }}}}"
    "{%- endif -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
)
"""The same template in Jinja, stored with exported models for programs that do not use this one."""


def save(vocabulary: dict[str, int], directory: Path, base: Path | None) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`, with the chat template, and `tokenizer.model`.

    See `ChatTokenizer.save`.
    """
    (directory / SENTENCEPIECE).write_bytes(sentencepiece_model(base))
    # Not by the library's own `save`, whose error is not an OSError if the disk is full.
    (directory / "tokenizer.json").write_text(_stock(tuple(vocabulary.items())), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


@lru_cache(maxsize=1)
def _stock(vocabulary: tuple[tuple[str, int], ...]) -> str:
    """The content of `tokenizer.json`, made once for all checkpoints of a run."""
    stock = merges_only(dict(vocabulary))
    stock.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROL])
    unescape = [normalizers.Replace(BREAK, ""), normalizers.Replace(ESCAPED, ESCAPE)]
    stock.normalizer = normalizers.Sequence([*unescape, stock.normalizer])
    # Answers begin with the space that the template puts before them; stock programs show what is decoded.
    stock.decoder = decoders.Sequence([stock.decoder, decoders.Strip(" ", 1, 0)])
    return str(stock.to_str(pretty=True))
