"""Recall prompts: facts planted in filler text, and a question about one of them.

They measure whether a cache strategy kept what a later question needs. A fact is a name directly followed by
its value (`` Maria 4 8 2 1.``) and a question ends in the name, so the value follows the last prompt token at
once: a model must look at the fact from that token, and strategies that select by attention can see it.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files

Encode = Callable[[str], list[int]]

VALUE_DIGITS = 4
QUESTION = "\nQuestion:"
_NAMES = """
Aaron Adele Agnes Alice Amber Amelia Andrea Anita Antonio Arthur Audrey Barbara Beatrice Benjamin Bernard
Bianca Boris Bridget Bruno Camila Carla Carmen Cecilia Charlotte Clara Claudia Colin Conrad Cynthia Daniel
Daphne Deborah Dennis Diana Dmitri Dolores Dorothy Edgar Edith Eleanor Elena Emily Enrique Esther Eugene
Fatima Felix Fiona Florence Frieda George Gerald Gloria Hannah Harold Helena Henry Hugo Igor Ingrid Irene
Isabel Ivan Jasmine Jerome Joanna Joseph Julian Karen Katrina Kenneth Lauren Leonard Linda Louisa Lucas
Magnus Marcus Margaret Maria Martha Matilda Maurice Miriam Monica Nadia Natalie Nicolas Nora Octavia Olga
Oliver Oscar Pamela Patricia Pauline Pedro Philip Priya Rachel Ramona Rebecca Renata Robert Rosa Rupert
Samuel Sandra Sergei Sheila Silvia Simon Sofia Stefan Susan Tamara Theresa Thomas Ursula Valentina Veronica
Viola Vivian Walter Wanda Xavier Yusuf Yvonne
"""
NAMES: tuple[str, ...] = tuple(_NAMES.split())


@dataclass(frozen=True, kw_only=True)
class RecallTask:
    """What a recall prompt contains.

    Args:
        num_keys: facts in the context, of which one is asked; 1 to ``len(NAMES)``.
        context_tokens: total prompt length, the question included, in tokens.
        fact_depth: where the asked fact stands, as a fraction of the filler before it: 0.0 opens the prompt,
            1.0 touches the question; None draws it uniformly. The other facts are always drawn uniformly.

    Raises:
        ValueError: a value is out of range.
    """

    num_keys: int
    context_tokens: int
    fact_depth: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.num_keys <= len(NAMES):
            raise ValueError(f"num_keys must be between 1 and {len(NAMES)}, got {self.num_keys}")
        if self.context_tokens < 1:
            raise ValueError(f"context_tokens must be at least 1, got {self.context_tokens}")
        if self.fact_depth is not None and not 0.0 <= self.fact_depth <= 1.0:
            raise ValueError(f"fact_depth must be in [0, 1] or None, got {self.fact_depth}")


@dataclass(frozen=True, kw_only=True)
class RecallPrompt:
    """One prompt with its expected continuation.

    Args:
        prompt: token ids; exactly ``context_tokens`` of them, the last one ending the asked name.
        answer: token ids of the value, which must follow ``prompt`` directly.
        fact_position: index in ``prompt`` of the first token of the asked fact (its name).
        text_question: the question as text, as it ends the prompt.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    fact_position: int
    text_question: str


def read_filler() -> str:
    """Return the shipped filler text, which the bundled model has not been trained on (about 220 kB)."""
    return files(__package__).joinpath("data", "filler.txt").read_text(encoding="utf-8")


def value_text(value: int) -> str:
    """Return a value as spaced digits, for instance 42 as `` 0 0 4 2``."""
    return "".join(f" {digit}" for digit in f"{value:0{VALUE_DIGITS}d}")


def fact_text(name: str, value: int) -> str:
    """Return a fact as planted in the filler, for instance `` Maria 4 8 2 1.``."""
    return f" {name}{value_text(value)}."


def question_text(name: str) -> str:
    """Return the question about ``name``; it ends in the name, with nothing after it."""
    return f"{QUESTION} {name}"


def make_recall_prompts(task: RecallTask, encode: Encode, filler_text: str, n: int, seed: int) -> list[RecallPrompt]:
    """Return ``n`` prompts, the same ones for the same arguments.

    Args:
        task: number of facts, length and depth.
        encode: text to token ids, without special tokens.
        filler_text: text to plant the facts in; a window of it is drawn per prompt, wrapping at its end.
        n: number of prompts.
        seed: of names, values, places and filler windows.

    Raises:
        ValueError: ``n`` is negative, ``filler_text`` has no tokens, or the facts and the question do not
            fit in ``task.context_tokens``.
    """
    if n < 0:
        raise ValueError(f"n must not be negative, got {n}")
    filler = encode(filler_text)
    if not filler:
        raise ValueError(f"filler_text must contain at least one token, got {filler_text!r}")
    rng = random.Random(seed)
    return [_make_prompt(task, encode, filler, rng) for _ in range(n)]


def _make_prompt(task: RecallTask, encode: Encode, filler: Sequence[int], rng: random.Random) -> RecallPrompt:
    """Draw facts (the first one is asked), their places and a filler window, and put them together."""
    names = rng.sample(NAMES, task.num_keys)
    values = rng.sample(range(10**VALUE_DIGITS), task.num_keys)
    facts = [encode(fact_text(name, value)) for name, value in zip(names, values, strict=True)]
    question = encode(question_text(names[0]))
    filler_tokens = task.context_tokens - sum(map(len, facts)) - len(question)
    if filler_tokens < 0:
        raise ValueError(
            f"context_tokens={task.context_tokens} is too short for num_keys={task.num_keys}: "
            f"the facts and the question alone take {task.context_tokens - filler_tokens} tokens"
        )
    places = _draw_places(task, filler_tokens, rng)
    body, fact_position = _plant(_draw_window(filler, filler_tokens, rng), facts, places)
    return RecallPrompt(
        prompt=(*body, *question),
        answer=tuple(encode(value_text(values[0]))),
        fact_position=fact_position,
        text_question=question_text(names[0]),
    )


def _draw_places(task: RecallTask, filler_tokens: int, rng: random.Random) -> list[int]:
    """Return for each fact how many filler tokens stand before it; the first entry is the asked fact's."""
    places = [rng.randint(0, filler_tokens) for _ in range(task.num_keys)]
    if task.fact_depth is not None:
        places[0] = round(task.fact_depth * filler_tokens)
    return places


def _draw_window(filler: Sequence[int], num_tokens: int, rng: random.Random) -> list[int]:
    """Return ``num_tokens`` consecutive filler tokens from a random start, wrapping at the end."""
    start = rng.randrange(len(filler))
    return [filler[(start + offset) % len(filler)] for offset in range(num_tokens)]


def _plant(window: list[int], facts: list[list[int]], places: list[int]) -> tuple[list[int], int]:
    """Return the window with the facts in place, and the position of the first (asked) fact."""
    body: list[int] = []
    asked_position = 0
    used = 0
    # a stable sort: at a tie the asked fact comes first
    for index in sorted(range(len(facts)), key=lambda fact: places[fact]):
        body += window[used : places[index]]
        used = places[index]
        if index == 0:
            asked_position = len(body)
        body += facts[index]
    return body + window[used:], asked_position
