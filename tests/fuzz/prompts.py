"""Prompts: everything that a user of transformers, vLLM or OpenAI may pass, whole, nested, or in a batch."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from tests.fuzz.harness import Case, Target
from tests.fuzz.values import OTHERS, SCALARS, SEQUENCES, TEXTS, odd, odd_text, value
from tests.fuzz.workplace import Workplace, must

from kvatlas.engine.llm import LLM
from kvatlas.engine.params import SamplingParams

_MESSAGES = (
    "[{'role': 'user', 'content': 'hi'}]",
    "[{'role': 'system', 'content': 'be kind'}, {'role': 'user', 'content': 'hi'}]",
    "[[{'role': 'user', 'content': 'hi'}]]",
    "[{'role': 'user'}]",
    "[{'content': 'hi'}]",
    "[{'role': 'user', 'content': None}]",
    "[{'role': 'user', 'content': [{'type': 'text', 'text': 'hi'}]}]",
    "[{'role': 'user', 'content': b'hi'}]",
    "[{'role': 3, 'content': 'hi'}]",
    "[{'role': 'user', 'content': '\\ud800'}]",
    "[{}]",
    "{'role': 'user', 'content': 'hi'}",
    "{'messages': [{'role': 'user', 'content': 'hi'}]}",
)
_MAPPINGS = (
    "{'prompt': 'hi'}",
    "{'prompt': None}",
    "{'prompt': ''}",
    "{'prompt_token_ids': [3, 5]}",
    "{'prompt_token_ids': []}",
    "{'prompt_token_ids': [3.0]}",
    "{'prompt': 'hi', 'prompt_token_ids': [3, 5]}",
    "{'prompt': 'hi', 'multi_modal_data': {}}",
    "{'input_ids': [3, 5]}",
    "{'input_ids': [3, 5], 'attention_mask': [1, 1]}",
    "{'input_ids': [0, 3, 5], 'attention_mask': [0, 1, 1]}",
    "{'input_ids': [3, 5], 'attention_mask': [1]}",
    "{'input_ids': torch.tensor([[3, 5]]), 'attention_mask': torch.tensor([[1, 1]])}",
    "{'input_ids': torch.tensor([[0, 3], [5, 7]]), 'attention_mask': torch.tensor([[0, 1], [1, 1]])}",
    "{'input_ids': None}",
    "{'inputs_embeds': torch.zeros(1, 2, 64)}",
    "tok('hi')",
    "tok('hi', return_tensors='pt')",
    "tok('hi', return_tensors='np')",
    "tok(['hi', 'hello there'])",
    "tok(['hi', 'hello there'], padding=True, return_tensors='pt')",
    "tok('hi')['input_ids']",
)
_FITTING = (
    *("'hi'", "'def add('", "[3, 5]", "(3, 5, 7)", "range(3, 9)", "np.array([3, 5])", "torch.tensor([3, 5])"),
    *("torch.tensor([[3, 5], [7, 9]])", "np.array([[3, 5]])", "['hi', 'ho']", "['hi', [3, 5]]", "[[3, 5], [7]]"),
    *("np.array([3, 5], dtype=np.uint16)", "torch.tensor([3, 5], dtype=torch.int32)", "[np.int64(3)]"),
    *("np.array(['hi', 'ho'])", "(p for p in ['hi', 'ho'])", "iter([3, 5])", "map(int, '35')"),
)
_PARAMS = SamplingParams(max_tokens=2)


def make(rng: Random, place: Workplace) -> Case:
    """Return a case: one way to pass a prompt of one kind."""
    source, kind = _source(rng), rng.choice(("plain", "chat", "chat", "bare"))
    way = rng.choice(sorted(_WAYS))

    def run() -> None:
        prompt = value(source, tok=place.chat_tokenizer)
        try:
            _WAYS[way](place.llm(kind), prompt)
        finally:
            place.check(kind)

    return Case(told=f"{kind}: {way}({source})", run=run)


def _source(rng: Random) -> str:
    kind = rng.random()
    if kind < 0.25:
        return rng.choice(_FITTING)
    if kind < 0.35:
        return rng.choice(_MESSAGES)
    if kind < 0.5:
        return rng.choice(_MAPPINGS)
    if kind < 0.6:
        return repr(odd_text(rng))
    if kind < 0.75:  # a batch in which one is odd
        return f"['hi', {odd(rng)}, [3, 5]]"
    if kind < 0.85:
        return f"[3, {odd(rng)}]"
    return odd(rng, (SEQUENCES, TEXTS, OTHERS, SCALARS))


def _generate(llm: LLM, prompt: object) -> None:
    outputs = llm.generate(prompt, _PARAMS)  # type: ignore[arg-type]  # that is what is tried
    must(all(type(token) is int for output in outputs for token in output.prompt_token_ids), "ids are no int")
    must(all(len(output.outputs[0].token_ids) in (1, 2) for output in outputs), "another number of tokens")


def _stream(llm: LLM, prompt: object) -> None:
    news = list(llm.stream(prompt, _PARAMS))  # type: ignore[arg-type]
    must(news[-1].finished, "the stream ends before the request")


def _session(llm: LLM, prompt: object) -> None:
    with llm.session() as session:
        session.generate("hi" if llm.engine.model.tokenizer else [3, 5], _PARAMS)
        try:
            session.generate(prompt, _PARAMS)  # type: ignore[arg-type]
        finally:  # refused or not, the conversation goes on
            must(len(session.generate([7, 9], _PARAMS).outputs[0].token_ids) in (1, 2), "the session is lost")


def _add(llm: LLM, prompt: object) -> None:
    request = llm.engine.add_request(prompt, _PARAMS)  # type: ignore[arg-type]
    while request.finish_reason is None:
        llm.engine.step()


def _encode(llm: LLM, prompt: object) -> None:
    ids = llm.encode(prompt)  # type: ignore[arg-type]
    must(isinstance(ids, list) and all(type(one) is int for one in ids), f"encode gives {ids!r}"[:200])


def _many(llm: LLM, prompt: object) -> None:
    outputs = llm.generate([prompt, [3, 5]], [_PARAMS, _PARAMS], strategy=["full", "h2o"])  # type: ignore[list-item]
    must(len(outputs) == 2, "another number of outputs")


_WAYS: dict[str, Callable[[LLM, object], None]] = {
    "generate": _generate,
    "stream": _stream,
    "session.generate": _session,
    "engine.add_request": _add,
    "encode": _encode,
    "generate beside [3, 5]": _many,
}
TARGET = Target(name="prompts", make=make)
