"""Measures of the bundled model with plain transformers: recall, perplexity, attention on the asked fact.

Shapes: B prompts, T tokens.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from kvatlas.workloads.recall import VALUE_DIGITS, Encode, RecallPrompt, RecallTask, make_recall_prompts

TABLE = tuple(
    RecallTask(num_keys=keys, context_tokens=length) for keys in (1, 16) for length in (512, 1024, 2048, 4096)
)
MAX_BATCH_TOKENS = 16_384
Z_95 = 1.959964


@dataclass(frozen=True, kw_only=True)
class RecallScore:
    """Exact matches on one task.

    Args:
        num_keys: facts in the context.
        context_tokens: prompt length in tokens.
        n: prompts.
        correct: prompts whose whole value is the greedy continuation.
    """

    num_keys: int
    context_tokens: int
    n: int
    correct: int

    @property
    def accuracy(self) -> float:
        """Fraction of exact matches, in [0, 1]."""
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the accuracy."""
        return wilson_interval(self.correct, self.n)

    def record(self) -> dict[str, float | list[float]]:
        """Return the score as it stands in the manifest."""
        low, high = self.interval
        return {
            **asdict(self),
            "accuracy": round(self.accuracy, 4),
            "wilson_95": [round(low, 4), round(high, 4)],
        }


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a fraction ``correct / n``."""
    share = correct / n
    spread = Z_95 * math.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n**2))
    centre = share + Z_95**2 / (2 * n)
    scale = 1 + Z_95**2 / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


@torch.inference_mode()
def recall_score(
    model: LlamaForCausalLM, encode: Encode, filler: str, task: RecallTask, n: int, seed: int
) -> RecallScore:
    """Return exact matches under greedy decoding on ``n`` fresh prompts.

    The answer is fed and each of its tokens must be the most likely one; greedy decoding produces the answer
    exactly when this holds.
    """
    correct = 0
    for batch in _batches(make_recall_prompts(task, encode, filler, n, seed), task.context_tokens):
        answers = torch.tensor([prompt.answer for prompt in batch])
        tokens = torch.cat([torch.tensor([prompt.prompt for prompt in batch]), answers[:, :-1]], dim=1)
        logits = model(tokens, use_cache=False, logits_to_keep=answers.shape[1]).logits
        correct += int((logits.argmax(-1) == answers).all(1).sum())
    return RecallScore(num_keys=task.num_keys, context_tokens=task.context_tokens, n=n, correct=correct)


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, tokens: Sequence[int], window: int) -> float:
    """Return the perplexity per token over whole, disjoint windows of ``window`` tokens."""
    rows = torch.tensor(tokens)[: len(tokens) // window * window].view(-1, window)
    total = 0.0
    for batch in torch.split(rows, max(1, MAX_BATCH_TOKENS // window)):
        logits = model(batch, use_cache=False).logits[:, :-1]
        total += cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / (rows.shape[0] * (window - 1)))


@torch.inference_mode()
def attention_on_fact(model: LlamaForCausalLM, prompts: Sequence[RecallPrompt]) -> Tensor:
    """Return the mean attention of the last prompt token on the asked fact.

    Args:
        model: its attention implementation must be ``eager``.
        prompts: to average over.

    Returns:
        [layers, query heads, 1 + VALUE_DIGITS], in [0, 1]: on the name, then on each digit of the value.
    """
    total = torch.zeros(model.config.num_hidden_layers, model.config.num_attention_heads, 1 + VALUE_DIGITS)
    for prompt in prompts:
        tokens = torch.tensor([prompt.prompt])
        cache = model(tokens[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
        attentions = model(tokens[:, -1:], past_key_values=cache, output_attentions=True).attentions
        fact = slice(prompt.fact_position, prompt.fact_position + 1 + VALUE_DIGITS)
        total += torch.stack([attention[0, :, 0, fact] for attention in attentions])
    return total / len(prompts)


def _batches(prompts: list[RecallPrompt], context_tokens: int) -> Iterator[list[RecallPrompt]]:
    """Yield the prompts in groups of about ``MAX_BATCH_TOKENS`` tokens."""
    size = max(1, MAX_BATCH_TOKENS // context_tokens)
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size]
