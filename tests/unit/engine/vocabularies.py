"""Small tokenizers of transformers: byte-level at random, byte by byte, and as those of Llama 2."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, processors
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<s>", "</s>", "<|end|>", "<ab>")
CHAT = (
    "{{ bos_token }}{% for one in messages %}{% if one.role == 'robot' %}{{ raise_exception('no\nrobots') }}{% endif %}"
    "[{{ one.role }}] {{ one.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)

# Letters that make up stop strings, and the bytes of é, 😀 and €, beside one that no text has.
_BYTES = (*b"abc <>|dn", *b"\xc3\xa9\xf0\x9f\x98\x80\xe2\x82\xac\xff")


def random_tokenizer(rng: Random, size: int = 40) -> Any:
    """Return a tokenizer whose tokens are single bytes, random pieces that split characters, and special ones."""
    pieces = {bytes([byte]) for byte in _BYTES}
    while len(pieces) < size:
        pieces.add(bytes(rng.choices(_BYTES, k=rng.randint(2, 4))))
    return _wrapped(_byte_level(sorted(pieces)))


def byte_tokenizer(*, begin: bool = True, end: bool = False, prefix_space: bool = False, chat: bool = False) -> Any:
    """Return a tokenizer of single bytes.

    Args:
        begin: put ``<s>`` before a text.
        end: put ``</s>`` behind a text.
        prefix_space: put a space before a text that has none.
        chat: have a chat template.
    """
    backend = _byte_level([bytes([byte]) for byte in range(256)], prefix_space)
    backend.add_special_tokens(list(SPECIAL))
    around = f"{'<s> ' if begin else ''}$A{' </s>' if end else ''}"
    ids = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single=around, special_tokens=ids)
    tokenizer = _wrapped(backend)
    tokenizer.chat_template = CHAT if chat else None
    return tokenizer


def metaspace_tokenizer() -> Any:
    """Return a tokenizer as those of Llama 2: ``▁`` for a space, one before every text, bytes for unknown letters."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abc", "▁a", "▁hello"]
    vocabulary = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "a")], byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _wrapped(backend)


def _byte_level(pieces: Sequence[bytes], prefix_space: bool = False) -> Tokenizer:
    letters = _letters()
    words = {"".join(letters[byte] for byte in piece): number for number, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=words, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    return backend


def _letters() -> list[str]:
    """Return the letter that byte-level vocabularies (GPT-2's) write for each byte; printable ones stay."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _wrapped(backend: Tokenizer) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        additional_special_tokens=list(SPECIAL[2:]),
    )
