"""Prompts as users of transformers, vLLM and OpenAI give them, and the token ids that they stand for.

One prompt is a text, token ids in any sequence, array or tensor, messages with roles, ``{"prompt": ...}``,
``{"prompt_token_ids": ...}``, or what a tokenizer returns. A batch is an iterable of these, or rows of token ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence as Seq
from pathlib import PurePath
from typing import Any

from kvatlas.core.errors import ConfigError
from kvatlas.core.messages import shown
from kvatlas.engine.given import is_list, is_whole, listed, plain

Prompt = str | Iterable[int] | Mapping[str, Any] | Seq[Mapping[str, Any]]

_KINDS = "a text, token ids, or messages with role and content"
_HINTS = {bytes: "decode it, as in prompt.decode()", PurePath: "read the file, as in prompt.read_text()"}


def token_ids(prompt: Any, name: str = "the prompt") -> list[int]:
    """Return token ids as a new list of Python integers.

    Args:
        prompt: a sequence, iterator, array or tensor of whole numbers; one row of an array counts as its row.
        name: what messages call it.

    Raises:
        ConfigError: it is something else, or holds something else: a negative number, a float, a bool, None.
    """
    if len(getattr(prompt, "shape", ())) == 2 and len(prompt) == 1:
        prompt = prompt[0]
    ids = listed(prompt)
    if ids is None:
        raise ConfigError(f"{name} is {shown(prompt)}; give token ids in a list")
    if all(type(token) is int and token >= 0 for token in ids):
        return ids
    plain_ids = [plain(token) for token in ids]
    wrong = next((at for at, token in enumerate(plain_ids) if not is_whole(token) or token < 0), None)
    if wrong is not None:
        raise ConfigError(
            f"{name} holds {shown(ids[wrong])} as token {wrong}; token ids are whole numbers, at least 0, in one list"
        )
    return [int(token) for token in plain_ids]


def split(prompts: Any) -> list[Prompt]:
    """Return a batch as a list of prompts, and one prompt as a list of one.

    Raises:
        ConfigError: there is no prompt, or the rows of a tokenizer's output do not fit together.
    """
    if isinstance(prompts, Mapping) and "input_ids" in prompts:
        return list(_rows(prompts))
    items = listed(prompts)
    if items is None:
        return [prompts]
    if not items and not hasattr(prompts, "shape"):
        raise ConfigError("no prompt is given; give at least one")
    return items if _is_nested(items) and not _is_conversation(items) else [items]


def encode(prompt: Any, tokenizer: Any, model: str, *, name: str = "the prompt", continued: bool = False) -> list[int]:
    """Return the token ids of one prompt.

    A text gets the special tokens that the tokenizer puts around a text, but never a second beginning-of-text token
    where it begins with one, as text made by a chat template does. Messages go through the chat template.

    Args:
        prompt: one prompt.
        tokenizer: of the model, or None.
        model: its name.
        name: what messages call the prompt.
        continued: whether it continues a conversation; a text then gets no special tokens and no space before it.

    Raises:
        ConfigError: it is no prompt, or the model has no tokenizer or no chat template for it.
    """
    if isinstance(prompt, Mapping):
        prompt = _one_of(prompt, name)
    items = None if isinstance(prompt, str) else listed(prompt)
    if isinstance(prompt, str):
        check_text(prompt, name)
        _needs(tokenizer, model)
        return _continuation(prompt, tokenizer) if continued else _text(prompt, tokenizer)
    if items is None:
        hint = next((hint for kind, hint in _HINTS.items() if isinstance(prompt, kind)), f"give {_KINDS}")
        raise ConfigError(f"{name} is {shown(prompt)}; {hint}")
    if not _is_nested(items):
        return token_ids(items, name)
    if _is_conversation(items):
        if continued:
            raise ConfigError(f"{name} is messages, which begin a conversation; continue it with the next turn's text")
        return _chat(items, _needs(tokenizer, model), model, name)
    if len(items) == 1 and hasattr(prompt, "shape"):  # one row of an array
        return token_ids(items[0], name)
    raise ConfigError(f"{name} is a list of {len(items)}, {shown(items[0])} first; give one prompt here: {_KINDS}")


def check_text(text: str, name: str) -> None:
    """Refuse a text that no encoding of Unicode can hold.

    Raises:
        ConfigError: it has half of a surrogate pair; names it and where it stands.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{name} has {text[error.start]!r} at character {error.start}, half of a surrogate pair, which is no text; "
            "decode its bytes as UTF-8, or leave it out"
        ) from None


def _is_nested(items: Seq[Any]) -> bool:
    """Whether items are prompts or messages, at least one of them, instead of token ids."""
    return any(
        isinstance(item, str | Mapping) or is_list(item)
        for item in items
        if type(item) is not int  # said first, because prompts are long
    )


def _is_conversation(items: Seq[Any]) -> bool:
    return bool(items) and all(isinstance(item, Mapping) and "role" in item for item in items)


def _rows(encoded: Mapping[str, Any]) -> Iterator[list[int]]:
    """Yield the rows of a tokenizer's output, without what its mask leaves out."""
    ids, masks = _two_dimensions(encoded["input_ids"]), None
    if unknown := sorted(str(key) for key in encoded if key not in ("input_ids", "attention_mask")):
        others = ", ".join(map(shown, unknown[:3]))
        raise ConfigError(f"{others} beside input_ids cannot be used; give input_ids and attention_mask alone")
    if encoded.get("attention_mask") is not None:
        masks = _two_dimensions(encoded["attention_mask"])
        if len(masks) != len(ids):
            raise ConfigError(f"input_ids has {len(ids)} rows and attention_mask {len(masks)}; give one mask per row")
    for index, row in enumerate(ids):
        tokens = token_ids(row, f"row {index} of input_ids")
        mask = [1] * len(tokens) if masks is None else [plain(seen) for seen in listed(masks[index]) or ()]
        if len(mask) != len(tokens) or not all(isinstance(seen, int | float) and seen in (0, 1) for seen in mask):
            raise ConfigError(
                f"row {index} of attention_mask does not fit {len(tokens)} token ids; give as many numbers, each 0 or 1"
            )
        yield [token for token, seen in zip(tokens, mask, strict=True) if seen]


def _two_dimensions(given: Any) -> list[Any]:
    """Return rows; token ids that are not nested are one row."""
    items = listed(given)
    if items is None:
        raise ConfigError(f"input_ids or attention_mask is {shown(given)}; give lists, arrays or tensors of numbers")
    return items if _is_nested(items) else [items]


def _one_of(prompt: Mapping[str, Any], name: str) -> Any:
    """Return the text or token ids that a mapping holds."""
    if "input_ids" in prompt:
        rows = list(_rows(prompt))
        if len(rows) != 1:
            raise ConfigError(f"{name} holds {len(rows)} rows of input_ids; give one here")
        return rows[0]
    if unknown := sorted(str(key) for key in prompt if key not in ("prompt", "prompt_token_ids")):
        raise ConfigError(
            f"{name} is a mapping with {', '.join(map(shown, unknown[:3]))}; give 'prompt', 'prompt_token_ids' or "
            "'input_ids', or a list of messages"
        )
    if prompt.get("prompt_token_ids") is not None:
        return token_ids(prompt["prompt_token_ids"], f"prompt_token_ids of {name}")
    text = prompt.get("prompt")
    if not isinstance(text, str):
        raise ConfigError(f"{name} is a mapping whose 'prompt' is {shown(text)}; give a text")
    return text


def _needs(tokenizer: Any, model: str) -> Any:
    if tokenizer is None:
        raise ConfigError(f"{model} has no tokenizer; choose a model that has one, or give token ids from Python")
    return tokenizer


def _chat(messages: Seq[Mapping[str, Any]], tokenizer: Any, model: str, name: str) -> list[int]:
    """Return messages under the chat template; what the assistant says last is continued."""
    for index, message in enumerate(messages):
        for key in ("role", "content"):
            if not isinstance(text := message.get(key), str):
                raise ConfigError(f"{key} of message {index} of {name} is {shown(text)}; give a text")
            check_text(text, f"{key} of message {index} of {name}")
    if getattr(tokenizer, "chat_template", None) is None:
        raise ConfigError(f"the tokenizer of {model} has no chat template for messages; write them as one text")
    goes_on = messages[-1]["role"] == "assistant"
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
        )
    except Exception as error:  # a template is a program of the checkpoint: it may raise anything
        reason = shown(str(error))
        raise ConfigError(f"the chat template of {model} refuses the messages of {name}: {reason}") from error
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _text(text: str, tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]  # the engine refuses what is too long
    begin = getattr(tokenizer, "bos_token", None)
    if begin and text.startswith(begin):
        written: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if ids[:1] == written[:1] and ids[1 : 1 + len(written)] == written:
            return ids[1:]
    return ids


def _continuation(text: str, tokenizer: Any) -> list[int]:
    """Return the ids of a text that goes on where another has ended: not those of a text of its own.

    Some tokenizers put a space before every text, but not behind a line break. There the ids that follow those of a
    line break are the text as it stands.
    """
    alone: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if _behind_line_break("a", tokenizer) in (None, tokenizer("a", add_special_tokens=False)["input_ids"]):
        return alone
    return _behind_line_break(text, tokenizer) or alone


def _behind_line_break(text: str, tokenizer: Any) -> list[int] | None:
    """Return the ids of a text that follows a line break; None if it melts into one."""
    both: list[int] = tokenizer("\n" + text, add_special_tokens=False, verbose=False)["input_ids"]
    lead: list[int] = tokenizer("\n", add_special_tokens=False, verbose=False)["input_ids"]
    return both[len(lead) :] if lead and both[: len(lead)] == lead else None
