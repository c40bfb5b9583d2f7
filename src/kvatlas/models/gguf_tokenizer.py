"""The tokenizer that a GGUF file carries.

Byte-level vocabularies, which ``tokenizer.ggml.model`` calls ``gpt2``, are built here: transformers 5.23 splits text as
GPT-2 did for every kind it does not know, SmolLM's among them, 5.17 does for all, and 5.17 takes the first token for
the end token. The kind, named by ``tokenizer.ggml.pre``, says into which pieces text was cut before merges were
learned. Other vocabularies are transformers' affair, but for the tokens around a text, which 5.17 forgets, and for the
space before it, which every version writes whatever ``tokenizer.ggml.add_space_prefix`` says.
"""

from __future__ import annotations

import logging
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kvatlas.core.errors import CheckpointError, UnsupportedError
from kvatlas.models.checkpoint import explain
from kvatlas.models.gguf_header import GgufHeader
from kvatlas.models.quiet import quiet

_LOG = logging.getLogger(__name__)

_SPACE = "▁"  # of SentencePiece
_CONTROL, _USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_GPT2_KINDS = ("gpt-2", "phi-2", "olmo", "mpt", "exaone4")
_DIGIT_KINDS = ("smollm", "starcoder", "refact", "command-r", "codeshell")
_LLAMA3_KINDS = ("llama3", "llama-v3", "llama-bpe", "falcon3")
_QWEN2_KINDS = ("qwen2", "deepseek-r1-qwen")
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def gguf_tokenizer(header: GgufHeader) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a GGUF file; None if it has none, since token ids can be used without.

    Raises:
        CheckpointError: the tokenizer cannot be read.
        UnsupportedError: it begins texts in a way that is not known here.
    """
    if header.metadata.get("tokenizer.ggml.model", "none") in ("none", "no_vocab"):
        return None
    try:
        byte_level = header.metadata["tokenizer.ggml.model"] == "gpt2"
        return _byte_level(header) if byte_level else _of_transformers(header)
    except UnsupportedError:
        raise
    except Exception as error:  # tokenizers raises bare Exception, transformers anything.
        raise CheckpointError(f"the tokenizer of {str(header.path)!r} cannot be loaded: {explain(error)}") from error


def _byte_level(header: GgufHeader) -> PreTrainedTokenizerBase:
    tokens, kind = _entry(header, "tokens"), _entry(header, "pre")
    merges = [tuple(merge.split(" ", 1)) for merge in _entry(header, "merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=kind in _LLAMA3_KINDS))
    backend.pre_tokenizer = _splitter(header)
    backend.decoder = decoders.ByteLevel()
    types = _entry(header, "token_type") or ()
    for wanted, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        chosen = [token for token, found in zip(tokens, types, strict=False) if found == wanted]
        backend.add_tokens([AddedToken(token, normalized=False, special=special) for token in chosen])
    roles = _roles(header)
    ends = _document_ends(header, roles)
    if ends is not None:
        backend.post_processor = ends
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **roles,
        chat_template=header.metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
    )


def _of_transformers(header: GgufHeader) -> PreTrainedTokenizerBase:
    roles = _roles(header)
    with quiet(), redirect_stderr(StringIO()):  # a progress bar of its own
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            str(header.path.parent), gguf_file=header.path.name, local_files_only=True, trust_remote_code=False
        )
    for role, token in roles.items():
        setattr(tokenizer, role, token)
    if _entry(header, "add_space_prefix") is False:
        _begin_without_space(header, tokenizer.backend_tokenizer)
    ends = _document_ends(header, roles)
    if ends is not None:
        tokenizer.backend_tokenizer.post_processor = ends
    loaded: PreTrainedTokenizerBase = tokenizer
    return loaded


def _begin_without_space(header: GgufHeader, backend: Tokenizer) -> None:
    """Write a space where the text has one, and nowhere else."""
    if not isinstance(backend.model, models.BPE):
        raise UnsupportedError(
            f"GGUF file {str(header.path)!r} has add_space_prefix=false and a vocabulary of kind "
            f"{_entry(header, 'model')!r}, which is not known here; use the model's own checkpoint folder"
        )
    backend.normalizer = normalizers.Replace(" ", _SPACE)
    backend.pre_tokenizer = None
    backend.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])


def _entry(header: GgufHeader, key: str) -> Any:
    return header.metadata.get(f"tokenizer.ggml.{key}")


def _roles(header: GgufHeader) -> dict[str, str]:
    """Return the tokens that begin, end, pad or stand for the unknown, as far as the file names them."""
    tokens = _entry(header, "tokens")
    ids = {role: _entry(header, f"{key}_token_id") for role, key in _ROLES.items()}
    return {role: tokens[index] for role, index in ids.items() if index is not None}


def _splitter(header: GgufHeader) -> pre_tokenizers.PreTokenizer:
    """Return what cuts text into the pieces that merges stay within."""
    kind = _entry(header, "pre")
    if kind in _DIGIT_KINDS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if kind in _LLAMA3_KINDS or kind in _QWEN2_KINDS:
        pattern = Regex(_LLAMA3_SPLIT if kind in _LLAMA3_KINDS else _QWEN2_SPLIT)
        split = pre_tokenizers.Split(pattern, behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    if kind not in _GPT2_KINDS:
        _LOG.warning(
            "%s splits text as %r, which is not known here; its prompts are split as GPT-2's, "
            "so that some token ids may differ from llama.cpp's",
            header.path.name,
            kind,
        )
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _document_ends(header: GgufHeader, roles: dict[str, str]) -> processors.TemplateProcessing | None:
    """Return what puts a first and a last token around a text; None if the file wants neither."""
    sentences = _entry(header, "model") == "llama"  # SentencePiece, whose texts begin with a token in llama.cpp
    by_default = {"bos": sentences or _entry(header, "pre") in _LLAMA3_KINDS, "eos": False}
    wanted = {
        end: f"{end}_token" in roles and _entry(header, f"add_{end}_token") in ((True, None) if default else (True,))
        for end, default in by_default.items()
    }
    if not any(wanted.values()):
        return None
    first, last = (roles[f"{end}_token"] if wanted[end] else "" for end in ("bos", "eos"))
    return processors.TemplateProcessing(
        single=[*([first] if first else []), "$A", *([last] if last else [])],
        special_tokens=[(roles[f"{end}_token"], _entry(header, f"{end}_token_id")) for end in wanted if wanted[end]],
    )
