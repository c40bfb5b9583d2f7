"""Make the bundled model from scratch: corpus, tokenizer, training, export.

Run ``python tools/train_bundled.py``; the result depends on the seed, the step counts and the installed
versions, never on time. Interrupted, it continues from ``scratch/``. ``tools/eval_bundled.py --write`` adds
the results.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bundled.corpus import read_corpus
from bundled.manifest import build_manifest
from bundled.sequences import SequenceMaker
from bundled.training import Trainer, new_model
from bundled.vocabulary import VOCAB_SIZE, train_tokenizer
from kvatlas.workloads.recall import VALUE_DIGITS

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Train and write the model folder."""
    options = _options()
    torch.set_num_threads(options.threads)
    corpus = read_corpus()
    if options.write_filler:
        options.write_filler.write_text(corpus.held_out, encoding="utf-8")
    tokenizer = train_tokenizer(corpus.train)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    text_tokens = np.array(encode(corpus.train))
    print(f"{len(corpus.train)} characters, {len(text_tokens)} tokens of training text", flush=True)
    model = new_model(VOCAB_SIZE, options.seed)
    trainer = Trainer(model, SequenceMaker(encode, text_tokens), options.seed, options.checkpoints)
    trainer.run()
    _export(model, tokenizer, options.out)
    manifest = build_manifest(model, corpus, options.seed, trainer.cpu_s)
    (options.out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {options.out}")


def _export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write weights, configurations and tokenizer to ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=VALUE_DIGITS,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _options() -> argparse.Namespace:
    """Return the command line options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "src" / "kvatlas" / "models" / "bundled")
    parser.add_argument("--seed", type=int, default=0, help="of initialisation and batches")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--checkpoints", type=Path, default=ROOT / "scratch" / "bundled" / "run")
    parser.add_argument("--write-filler", type=Path, help="also write the held-out text to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
