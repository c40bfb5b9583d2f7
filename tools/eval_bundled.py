"""Measure the shipped model: recall table, held-out perplexity, attention of the last prompt token.

Run ``python tools/eval_bundled.py --n 400``; ``--write`` puts the results into ``manifest.json``.
Uses plain transformers on CPU, none of this package's engine.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from bundled.evaluation import TABLE, RecallScore, attention_on_fact, perplexity, recall_score
from kvatlas.workloads.recall import Encode, RecallTask, make_recall_prompts, read_filler

FOLDER = Path(__file__).parents[1] / "src" / "kvatlas" / "models" / "bundled"
PERPLEXITY_WINDOWS = (512, 2048)
ATTENTION_TASK = RecallTask(num_keys=16, context_tokens=1024)
ATTENTION_PROMPTS = 50


def main() -> None:
    """Measure, print, and optionally write."""
    options = _options()
    torch.set_num_threads(options.threads)
    encode = load_encode(options.model)
    model = LlamaForCausalLM.from_pretrained(
        options.model, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
    )
    model.eval()
    filler = read_filler()
    scores = _recall_table(model, encode, filler, options.n, options.seed)
    perplexities = {str(window): perplexity(model, encode(filler), window) for window in PERPLEXITY_WINDOWS}
    for window, value in perplexities.items():
        print(f"held-out perplexity per token, windows of {window} tokens: {value:.1f}")
    model.set_attn_implementation("eager")
    prompts = make_recall_prompts(ATTENTION_TASK, encode, filler, ATTENTION_PROMPTS, options.seed)
    attention = attention_summary(attention_on_fact(model, prompts))
    print(json.dumps(attention, indent=2))
    if options.write:
        results = {
            "seed": options.seed,
            "recall": [score.record() for score in scores],
            "perplexity_per_token": {window: round(value, 2) for window, value in perplexities.items()},
            "attention_of_last_prompt_token": attention,
            "measured_with": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        _write_results(options.model / "manifest.json", results)


def load_encode(folder: Path) -> Encode:
    """Return the tokenizer of ``folder`` as a function from text to token ids, without special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    return encode


def attention_summary(attention: Tensor) -> dict[str, Any]:
    """Return the best head for the whole fact and for each of its tokens.

    Args:
        attention: [layers, query heads, 1 + VALUE_DIGITS], name first, then the digits.
    """
    best = {"whole fact": _best_head(attention.sum(-1)), "name": _best_head(attention[..., 0])}
    best |= {f"digit {index}": _best_head(attention[..., index]) for index in range(1, attention.shape[-1])}
    return {
        "task": f"{ATTENTION_TASK.num_keys} keys, {ATTENTION_TASK.context_tokens} tokens",
        "n": ATTENTION_PROMPTS,
        "best_head": best,
    }


def _best_head(attention: Tensor) -> dict[str, float]:
    """Return layer, query head and value of the largest entry of [layers, query heads]."""
    layer, head = divmod(int(attention.argmax()), attention.shape[1])
    return {"layer": layer, "head": head, "attention": round(float(attention[layer, head]), 3)}


def _recall_table(model: LlamaForCausalLM, encode: Encode, filler: str, n: int, seed: int) -> list[RecallScore]:
    """Measure and print each row of the table."""
    print(f"{'keys':>4} {'tokens':>6} {'n':>5} {'exact match':>11}  95 % Wilson interval")
    scores = []
    for task in TABLE:
        score = recall_score(model, encode, filler, task, n, seed)
        low, high = score.interval
        measured = f"{score.num_keys:4} {score.context_tokens:6} {n:5} {score.accuracy:11.4f}"
        print(f"{measured}  {low:.4f} to {high:.4f}", flush=True)
        scores.append(score)
    return scores


def _write_results(manifest: Path, results: dict[str, Any]) -> None:
    """Replace the results in the manifest."""
    content = json.loads(manifest.read_text(encoding="utf-8"))
    content["results"] = results
    manifest.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {manifest}")


def _options() -> argparse.Namespace:
    """Return the command line options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=FOLDER, help="folder with the checkpoint")
    parser.add_argument("--n", type=int, default=400, help="prompts per row")
    parser.add_argument("--seed", type=int, default=1_000, help="of the prompts; training never uses it")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--write", action="store_true", help="update results in the manifest")
    return parser.parse_args()


if __name__ == "__main__":
    main()
