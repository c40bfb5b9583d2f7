"""Training loop of the bundled model: curriculum, losses, optimizers, resumable checkpoints.

Shapes: B sequences, T tokens, Q questions, D hidden size.
"""

import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from bundled.muon import Muon
from bundled.preparation import prepare
from bundled.sequences import SequenceMaker, Stage, TrainingBatch
from kvatlas.workloads.recall import VALUE_DIGITS

CURRICULUM = (
    Stage(tokens=128, batch=32, steps=150, max_span=1024),
    Stage(tokens=256, batch=16, steps=250, max_span=2048),
    Stage(tokens=512, batch=8, steps=700, max_span=4608),
    Stage(tokens=1024, batch=4, steps=1000, max_span=6144),
    Stage(tokens=2048, batch=2, steps=900, max_span=6144),
    Stage(tokens=4096, batch=1, steps=250, max_span=8192),
)
LEARNING_RATE = {"muon": 0.01, "adamw": 4e-3}
WARM_UP_STEPS = 30
COOL_DOWN_SHARE = 0.35
TEXT_LOSS_WEIGHT = 0.2
AHEAD_LOSS_WEIGHT = 0.5
PROGRESS_EVERY = 25
CHECKPOINT_EVERY = 100


def new_model(vocab_size: int, seed: int) -> LlamaForCausalLM:
    """Return an untrained model with the prepared initialisation."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    prepare(model, torch.Generator().manual_seed(seed))
    return model


class Trainer:
    """Runs the curriculum; every step depends only on the seed and the step number.

    Args:
        model: trained in place.
        sequences: source of batches.
        seed: of the batches.
        checkpoints: folder for ``latest.pt``; an existing one is resumed.
        curriculum: stages in order.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        sequences: SequenceMaker,
        seed: int,
        checkpoints: Path,
        curriculum: tuple[Stage, ...] = CURRICULUM,
    ) -> None:
        self.model = model
        self.ahead = nn.Linear(model.config.hidden_size, (VALUE_DIGITS - 1) * model.config.vocab_size, bias=False)
        nn.init.normal_(self.ahead.weight, std=0.02)
        self.step = 0
        self.cpu_s = 0.0
        self._sequences = sequences
        self._seed = seed
        self._checkpoint = checkpoints / "latest.pt"
        self._curriculum = curriculum
        matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
        others = [model.model.embed_tokens.weight, self.ahead.weight]
        others += [p for p in model.parameters() if p.ndim == 1]
        self._optimizers: dict[str, torch.optim.Optimizer] = {
            "muon": Muon(matrices, lr=LEARNING_RATE["muon"]),
            "adamw": torch.optim.AdamW(others, lr=LEARNING_RATE["adamw"], betas=(0.9, 0.98), weight_decay=0.0),
        }

    def run(self) -> None:
        """Train to the end of the curriculum, from the checkpoint if there is one; prints progress."""
        if self._checkpoint.exists():
            self._load()
        total = sum(stage.steps for stage in self._curriculum)
        while self.step < total:
            started = time.process_time()
            losses = self._train_step(self._stage(self.step), learning_rate_factor(self.step, total))
            self.step += 1
            self.cpu_s += time.process_time() - started
            if self.step % PROGRESS_EVERY == 0:
                print(self._progress(total, losses), flush=True)
            if self.step % CHECKPOINT_EVERY == 0 or self.step == total:
                self._save()

    def _stage(self, step: int) -> Stage:
        """Return the stage that step number ``step`` belongs to."""
        for stage in self._curriculum:
            if step < stage.steps:
                return stage
            step -= stage.steps
        raise IndexError(f"step is {step} past the end of the curriculum")

    def _train_step(self, stage: Stage, factor: float) -> dict[str, float]:
        """Take one optimizer step at ``factor`` times the learning rates; return the losses in nats."""
        batch = self._sequences.batch(stage, np.random.default_rng((self._seed, self.step)))
        losses = self._losses(batch)
        loss = losses["answer"] + AHEAD_LOSS_WEIGHT * losses["ahead"] + TEXT_LOSS_WEIGHT * losses["text"]
        self.model.zero_grad()
        self.ahead.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self._optimizers["adamw"].param_groups[0]["params"], 1.0)
        for name, optimizer in self._optimizers.items():
            optimizer.param_groups[0]["lr"] = factor * LEARNING_RATE[name]
            optimizer.step()
        return {name: value.item() for name, value in losses.items()}

    def _losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return mean cross-entropies of the answers, of the answers read ahead, and of the ordinary text.

        "Ahead" predicts digits 2 to 4 of a value from the last prompt token, by a head that is not shipped,
        so that the whole fact is looked at from there.
        """
        hidden = self._hidden(batch).flatten(0, 1)
        weight = self.model.lm_head.weight
        answer_at = (batch.last_prompt[:, None] + torch.arange(VALUE_DIGITS)).flatten()
        ahead = self.ahead(hidden[batch.last_prompt]).unflatten(1, (VALUE_DIGITS - 1, -1))
        text_at = torch.nonzero((batch.is_filler[:, :-1] & batch.is_filler[:, 1:]).flatten()).squeeze(1)
        text_at = text_at + text_at // (batch.tokens.shape[1] - 1)
        return {
            "answer": cross_entropy(hidden[answer_at] @ weight.T, batch.answers.flatten()),
            "ahead": cross_entropy(ahead.flatten(0, 1), batch.answers[:, 1:].flatten()),
            "text": cross_entropy(hidden[text_at] @ weight.T, batch.tokens.flatten()[text_at + 1]),
        }

    def _hidden(self, batch: TrainingBatch) -> Tensor:
        """Return final hidden states [B, T, D].

        The mask of ones matters: without it transformers reads a jump in positions as the start of another
        packed sequence, and masks everything before it.
        """
        output = self.model.model(
            input_ids=batch.tokens,
            position_ids=batch.positions,
            attention_mask=torch.ones_like(batch.tokens),
            use_cache=False,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _progress(self, total: int, losses: dict[str, float]) -> str:
        """Return a line about the last step."""
        shown = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
        length = self._stage(self.step - 1).tokens
        return f"step {self.step}/{total}  length {length}  {shown}  cpu {self.cpu_s / 60:.1f} min"

    def _save(self) -> None:
        """Write the state of model, optimizers and counters, replacing the old checkpoint at once."""
        self._checkpoint.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "step": self.step,
            "cpu_s": self.cpu_s,
            "model": self.model.state_dict(),
            "ahead": self.ahead.weight,
        }
        state |= {name: optimizer.state_dict() for name, optimizer in self._optimizers.items()}
        partial = self._checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self._checkpoint)

    def _load(self) -> None:
        """Continue from the checkpoint."""
        state = torch.load(self._checkpoint, weights_only=True)
        self.step, self.cpu_s = state["step"], state["cpu_s"]
        self.model.load_state_dict(state["model"])
        self.ahead.weight.data.copy_(state["ahead"])
        for name, optimizer in self._optimizers.items():
            optimizer.load_state_dict(state[name])
        print(f"resumed at step {self.step}", flush=True)


def learning_rate_factor(step: int, total: int) -> float:
    """Return warm-up, plateau and linear cool-down as a factor in (0, 1]."""
    cool_down = COOL_DOWN_SHARE * total
    return min(1.0, (step + 1) / WARM_UP_STEPS, (total - step) / cool_down)
