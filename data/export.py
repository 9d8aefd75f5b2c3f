"""The tokenizer's files for other programs: stock transformers, servers, llama.cpp."""

import json
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


def _escapes() -> str:
    """The filters of the template that escape a message."""
    pairs = [(ESCAPE, ESCAPED), *((token, f"{token[0]}{BREAK}{token[1:]}") for token in CONTROL)]
    return "".join(f" | replace('{text}', '{escaped}')" for text, escaped in pairs)


CHAT_TEMPLATE = (
    "{%- macro plain(text) -%}{{ text" + _escapes() + " }}{%- endmacro -%}"
    "{%- set system = plain(messages[0]['content']) if messages[0]['role'] == 'system' else none -%}"
    "{%- set turns = messages[1:] if system is not none else messages -%}"
    "{%- for message in turns -%}"
    "{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}"
    "{{ raise_exception('after an optional system message, user and assistant alternate, the user first') }}"
    "{%- endif -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{ '<s>[INST] ' }}"
    "{%- set opening = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' if loop.first and system is not none else '' -%}"
    "{{ (opening + plain(message['content'])) | trim + ' [/INST]' }}"
    "{%- else -%}"
    "{{ ' ' + plain(message['content']) | trim + ' </s>' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
)
"""The same template in Jinja, stored with exported models for programs that do not use this one."""


def save(vocabulary: dict[str, int], directory: Path, base: Path | None) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`, with the chat template, and `tokenizer.model`.

    See `ChatTokenizer.save`.
    """
    (directory / SENTENCEPIECE).write_bytes(sentencepiece_model(base))
    stock = merges_only(vocabulary)
    stock.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROL])
    unescape = [normalizers.Replace(BREAK, ""), normalizers.Replace(ESCAPED, ESCAPE)]
    stock.normalizer = normalizers.Sequence([*unescape, stock.normalizer])
    # Answers begin with the space that the template puts before them; stock programs show what is decoded.
    stock.decoder = decoders.Sequence([stock.decoder, decoders.Strip(" ", 1, 0)])
    # Not by its own `save`, whose error is no OSError if the disk is full.
    (directory / "tokenizer.json").write_text(stock.to_str(pretty=True), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
