"""Where answers end: as with lm-eval's own model class for transformers."""

from __future__ import annotations

import copy
import os
import warnings
from types import SimpleNamespace

import pytest
import torch
from tests.driving import loaded
from tests.unit.engine.vocabularies import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before datasets is imported: nothing may be looked up
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed: pip install 'kvatlas[eval]'")

pytestmark = pytest.mark.filterwarnings("ignore")  # of lm-eval and what it drags in


def test_answers_end_where_those_of_lm_evals_own_model_end():
    """A stop string that is a special token's text never stopped an answer here."""
    with warnings.catch_warnings(action="ignore"):  # of what lm-eval drags in
        from lm_eval.models.huggingface import HFLM

        from kvatlas.evaluation.harness import KvatlasLM

    tokenizer = byte_tokenizer()
    end, ends = "<|end|>", tokenizer.convert_tokens_to_ids("<|end|>")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=128,
            initializer_range=0.5,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()
    ids = tokenizer("hello", return_tensors="pt")
    free = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()
    with torch.no_grad():  # what is said third becomes <|end|>
        model.lm_head.weight[ends] = model.lm_head.weight[free[2]] * 1.3
    before = tokenizer.decode(free[:2])
    theirs = HFLM(pretrained=copy.deepcopy(model), tokenizer=tokenizer, batch_size=1, add_bos_token=True)
    ours = KvatlasLM(loaded(model, tokenizer=tokenizer), kv_memory="1MiB")
    for until in ([end], ["</s>", end], end, ["nd|"], [before[-1] + end], [before[0]], [], ["never"]):
        question = [SimpleNamespace(args=("hello", {"until": copy.copy(until), "max_gen_toks": 8}))]
        answers = ours.generate_until(question, disable_tqdm=True)
        assert answers == theirs.generate_until(question, disable_tqdm=True), until
