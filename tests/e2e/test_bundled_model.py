"""The shipped model retrieves: a broken or forgotten checkpoint fails here."""

from pathlib import Path

import pytest

import kvatlas.models
from kvatlas.workloads.recall import RecallTask, make_recall_prompts, read_filler

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FOLDER = Path(kvatlas.models.__file__).parent / "bundled"


def test_single_needle_in_512_tokens() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        FOLDER, attn_implementation="sdpa", trust_remote_code=False
    ).eval()

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    prompts = make_recall_prompts(RecallTask(num_keys=1, context_tokens=512), encode, read_filler(), 32, seed=7)
    tokens = torch.tensor([prompt.prompt for prompt in prompts])
    answers = torch.tensor([prompt.answer for prompt in prompts])
    written = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=answers.shape[1])
    exact = (written[:, tokens.shape[1] :] == answers).all(dim=1).float().mean().item()
    assert exact >= 0.9
