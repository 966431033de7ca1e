"""The tokenizer inside a GGUF file, where it is byte-level BPE over words as GPT-2 cuts them, as of most Mambas."""

from __future__ import annotations

from typing import Any

from subquad.models.gguf_header import Header
from subquad.models.source import needed

KEY = "tokenizer.ggml."
GPT2_WORDS = ("gpt-2", "mpt", "olmo", "jais", "phi-2")  # values of "pre" that llama.cpp cuts into words as GPT-2 does
CONTROL, USER_DEFINED = 3, 4  # types of tokens that are found in a text before it is cut into words


def tokenizer_of(header: Header) -> Any:
    """The tokenizer of a file; None if there is none, it is of another kind, or the package tokenizers is missing."""
    entries = header.entries
    words, merges = entries.get(f"{KEY}tokens"), entries.get(f"{KEY}merges")
    if entries.get(f"{KEY}model") != "gpt2" or entries.get(f"{KEY}pre") not in GPT2_WORDS:
        return None
    if not isinstance(words, list) or not isinstance(merges, list) or len(set(words)) < len(words):
        return None
    try:
        tokenizers = needed("tokenizers", "text")
    except ModuleNotFoundError:
        return None
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    try:
        made = tokenizers.Tokenizer(tokenizers.models.BPE({word: i for i, word in enumerate(words)}, pairs))
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        made.decoder = tokenizers.decoders.ByteLevel()
        kinds = entries.get(f"{KEY}token_type")
        kinds = [] if kinds is None else list(kinds)
        for kind, add in ((CONTROL, made.add_special_tokens), (USER_DEFINED, made.add_tokens)):
            found = [word for word, own in zip(words, kinds, strict=False) if own == kind]
            add([tokenizers.AddedToken(word, normalized=False) for word in found])
        if entries.get(f"{KEY}add_bos_token") is True:
            first = int(entries[f"{KEY}bos_token_id"])
            made.post_processor = tokenizers.processors.TemplateProcessing(
                single=[words[first], "$A"], special_tokens=[(words[first], first)]
            )
    except Exception as error:  # the package raises plain exceptions
        msg = f"the tokenizer in the GGUF file is damaged: {error}"
        raise ValueError(msg) from None
    return made
