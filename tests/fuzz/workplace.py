"""What cases work with: tiny models, a checkpoint of one, and an innocent prompt whose answer must not change."""

from __future__ import annotations

import copy
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.driving import check, loaded
from tests.families import tiny_model
from tests.fuzz.harness import Harm, Raw
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kvatlas.engine.llm import LLM
from kvatlas.engine.params import SamplingParams
from kvatlas.models.loading import BUNDLED_DIR, LoadedModel

INNOCENT = [5, 9, 300, 7, 42, 17]
LONGEST_RUN = 200  # steps; the tiny models have 128 positions

_TEMPLATE = "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"


class Workplace:
    """Models and files that cases share; what a case has spoilt is made anew by `renew`.

    Args:
        folder: an empty folder of its own.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._answers: dict[str, list[int]] = {}
        self._llms: dict[str, LLM] = {}

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The bundled model's: byte-level, without beginning of text and without chat template."""
        return AutoTokenizer.from_pretrained(BUNDLED_DIR)

    @cached_property
    def chat_tokenizer(self) -> PreTrainedTokenizerBase:
        """Another that has both."""
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.add_special_tokens({"bos_token": "<|end|>"})
        tokenizer.chat_template = _TEMPLATE
        return tokenizer

    @cached_property
    def model(self) -> PreTrainedModel:
        """A random Llama with the vocabulary of these tokenizers."""
        return tiny_model("llama", vocab_size=1024, eos_token_id=0)

    @cached_property
    def checkpoint(self) -> Path:
        """A folder with a random Llama and its tokenizer."""
        folder = self.folder / "checkpoint"
        model = tiny_model("llama", vocab_size=1024, eos_token_id=0, num_hidden_layers=2, hidden_size=32)
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return folder

    def llm(self, kind: str) -> LLM:
        """Return the engine of a kind, the same for all cases: "plain", "chat" or "bare" (without tokenizer)."""
        if kind not in self._llms:
            tokenizer: Any = {"plain": self.tokenizer, "chat": self.chat_tokenizer, "bare": None}[kind]
            self._llms[kind] = LLM(self._loaded(tokenizer), kv_memory="1MiB", host_memory="1MiB", block_size=8)
            self._answers[kind] = self._answer(kind)
        return self._llms[kind]

    def check(self, kind: str) -> None:
        """Assert that nothing of a case is left in an engine and that the next request is answered as ever."""
        engine = self.llm(kind).engine
        left = [*engine.scheduler.waiting, *engine.scheduler.running]
        if left:
            raise Harm(f"{len(left)} requests are left in the engine")
        if engine.scheduler.idle:
            raise Harm(f"{len(engine.scheduler.idle)} sessions are left in the engine")
        try:
            check(engine)
            answer = self._answer(kind)
        except Exception as error:
            raise Harm(f"the next request ends with {type(error).__name__}: {error}") from error
        if answer != self._answers[kind]:
            raise Harm(f"the next request is answered {answer}, it was {self._answers[kind]}")

    def renew(self) -> None:
        """Forget the engines: one may be spoilt."""
        self._llms.clear()

    def _loaded(self, tokenizer: Any) -> LoadedModel:
        if not hasattr(self, "_adapted"):
            self._adapted = loaded(self.model)
        return LoadedModel(adapter=self._adapted.adapter, tokenizer=tokenizer, name="tiny")

    def _answer(self, kind: str) -> list[int]:
        (output,) = self._llms[kind].generate([INNOCENT], SamplingParams(max_tokens=4, ignore_eos=True))
        return list(output.outputs[0].token_ids)


def must(good: bool, what: str) -> None:
    """Count what follows as a raw exception where it does not hold."""
    if not good:
        raise Raw(what)
