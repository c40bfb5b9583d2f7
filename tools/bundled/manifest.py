"""The record that ships beside the model: what it was made from, how, and what it can do."""

import hashlib
import platform
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from transformers import LlamaForCausalLM

from bundled import corpus, preparation, training

ABOUT = (
    "A small Llama, trained on docstrings and planted facts, that retrieves a value from its context. "
    "Made to compare cache strategies without downloads; it writes no useful text."
)
PROMPT_FORMAT = "facts ' Maria 4 8 2 1.' in filler; the prompt ends '\\nQuestion: Maria'; the value follows directly"


def build_manifest(model: LlamaForCausalLM, data: corpus.Corpus, seed: int, cpu_s: float) -> dict[str, Any]:
    """Return the manifest of a trained model, with empty results (``tools/eval_bundled.py`` fills them).

    Args:
        model: the trained model.
        data: the text it was trained on.
        seed: of initialisation and batches.
        cpu_s: CPU time of all training steps, in seconds.
    """
    return {
        "about": ABOUT,
        "prompt_format": PROMPT_FORMAT,
        "regenerate": f"python tools/train_bundled.py --seed {seed} && python tools/eval_bundled.py --write",
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "data": _describe_data(data),
        "training": _describe_training(seed, cpu_s),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "numpy": np.__version__,
            "networkx": version("networkx"),
        },
        "results": {},
    }


def _describe_data(data: corpus.Corpus) -> dict[str, Any]:
    """Return sources, licences, sizes and hashes of the text."""
    return {
        "source": "docstrings of the running Python's standard library and of numpy and networkx",
        "licences": corpus.LICENCES,
        "held_out": f"standard library modules whose crc32 is a multiple of {corpus.HELD_OUT_ONE_IN}; "
        "part of them is src/kvatlas/workloads/data/filler.txt",
        "train_characters": len(data.train),
        "train_sha256": hashlib.sha256(data.train.encode()).hexdigest(),
        "planted_facts": "drawn at random during training: 128 names, values of 4 random digits",
    }


def _describe_training(seed: int, cpu_s: float) -> dict[str, Any]:
    """Return steps, curriculum, optimizers, losses and the initialisation."""
    stages = training.CURRICULUM
    return {
        "seed": seed,
        "steps": sum(stage.steps for stage in stages),
        "tokens": sum(stage.steps * stage.batch * stage.tokens for stage in stages),
        "cpu_minutes": round(cpu_s / 60, 1),
        "threads": 1,
        "curriculum": [asdict(stage) for stage in stages],
        "position_jumps": "60 % of the sequences have gaps in their position ids, up to max_span",
        "supervision": "2 or more facts per sequence (log-uniform), each asked once, half of them at the end",
        "losses": {
            "answer tokens": 1.0,
            "digits 2 to 4 from the last prompt token (head not shipped)": training.AHEAD_LOSS_WEIGHT,
            "ordinary text": training.TEXT_LOSS_WEIGHT,
        },
        "optimizers": {
            "matrices of the layers": f"Muon, lr {training.LEARNING_RATE['muon']}",
            "embedding, norms": f"AdamW (0.9, 0.98), lr {training.LEARNING_RATE['adamw']}",
            "schedule": f"{training.WARM_UP_STEPS} warm-up steps, linear cool-down over the last "
            f"{training.COOL_DOWN_SHARE:.0%} of the steps",
        },
        "prepared_initialisation": " ".join((preparation.__doc__ or "").split()),
    }
