"""Whatever ``generate`` takes: an attached model gives what transformers gives, or refuses it by name in one line."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from tests.families import tiny_config, tiny_model, token_ids
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation import (
    BaseStreamer,
    CompileConfig,
    MaxTimeCriteria,
    MinLengthLogitsProcessor,
    WatermarkingConfig,
)
from transformers.utils import ModelOutput

import kvatlas
from kvatlas.core.errors import ConfigError, KvatlasError, UnsupportedError

PROMPTS = torch.stack(token_ids(9, 9, seed=3))
BASE: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}

# An unusual value for each field of GenerationConfig, and what else makes it act.
UNUSUAL: dict[str, tuple[object, dict[str, Any]]] = {
    "max_length": (13, {"max_new_tokens": None}),
    "max_new_tokens": (3, {}),
    "min_length": (14, {"eos_token_id": list(range(5, 101))}),
    "min_new_tokens": (4, {"eos_token_id": list(range(5, 101))}),
    "early_stopping": (True, {}),
    "max_time": (1000.0, {}),
    "stop_strings": ("zz", {}),
    "do_sample": (True, {}),
    "num_beams": (3, {}),
    "use_mtp": (True, {}),
    "use_cache": (False, {}),
    "cache_implementation": ("static", {}),
    "cache_config": ({"backend": "quanto"}, {}),
    "max_cache_len": (64, {}),
    "temperature": (0.5, {"do_sample": True}),
    "top_k": (3, {"do_sample": True}),
    "top_p": (0.3, {"do_sample": True}),
    "min_p": (0.2, {"do_sample": True}),
    "top_h": (0.3, {"do_sample": True}),
    "typical_p": (0.3, {"do_sample": True}),
    "epsilon_cutoff": (0.01, {"do_sample": True}),
    "eta_cutoff": (0.01, {"do_sample": True}),
    "repetition_penalty": (1.7, {}),
    "encoder_repetition_penalty": (1.7, {}),
    "length_penalty": (2.0, {}),
    "no_repeat_ngram_size": (1, {}),
    "bad_words_ids": ([[7], [8, 9]], {}),
    "renormalize_logits": (True, {}),
    "forced_bos_token_id": (7, {}),
    "forced_eos_token_id": (7, {}),
    "remove_invalid_values": (True, {}),
    "exponential_decay_length_penalty": ((2, 1.5), {"eos_token_id": 7}),
    "suppress_tokens": (list(range(5, 60)), {}),
    "begin_suppress_tokens": (list(range(5, 60)), {}),
    "sequence_bias": ([[[7], 30.0]], {}),
    "token_healing": (True, {}),
    "guidance_scale": (1.5, {}),
    "watermarking_config": (WatermarkingConfig(), {}),
    "num_return_sequences": (3, {"do_sample": True}),
    "output_attentions": (True, {"return_dict_in_generate": True}),
    "output_hidden_states": (True, {"return_dict_in_generate": True}),
    "output_scores": (True, {"return_dict_in_generate": True, "repetition_penalty": 1.3}),
    "output_logits": (True, {"return_dict_in_generate": True, "repetition_penalty": 1.3}),
    "return_dict_in_generate": (True, {}),
    "pad_token_id": (5, {}),
    "bos_token_id": (5, {}),
    "eos_token_id": (list(range(5, 60)), {}),
    "encoder_no_repeat_ngram_size": (1, {}),
    "decoder_start_token_id": (5, {}),
    "is_assistant": (True, {}),
    "num_assistant_tokens": (3, {}),
    "num_assistant_tokens_schedule": ("heuristic", {}),
    "assistant_confidence_threshold": (0.9, {}),
    "prompt_lookup_num_tokens": (3, {}),
    "max_matching_ngram_size": (3, {}),
    "assistant_early_exit": (1, {}),
    "assistant_lookbehind": (3, {}),
    "target_lookbehind": (3, {}),
    "assistant_ensemble_weight": (0.5, {}),
    "speculation_type": ("dflash", {}),
    "compile_config": (CompileConfig(), {}),
    "disable_compile": (True, {}),
    "continuous_batching_config": (None, {}),
    "low_memory": (True, {}),
    "penalty_alpha": (0.6, {"top_k": 4}),
    "dola_layers": ("low", {}),
    "diversity_penalty": (0.5, {}),
    "num_beam_groups": (2, {}),
    "constraints": ([object()], {}),
    "force_words_ids": ([[7]], {}),
    "prefill_chunk_size": (4, {}),
    "transformers_version": ("1.0", {}),
    "use_model_defaults": (False, {}),
}
REFUSED = {
    "num_beams", "use_mtp", "use_cache", "cache_implementation", "token_healing", "guidance_scale",
    "output_attentions", "output_hidden_states", "prompt_lookup_num_tokens", "assistant_early_exit", "penalty_alpha",
    "dola_layers", "constraints", "force_words_ids", "prefill_chunk_size",
}  # fmt: skip
FIELDS = sorted(name for name in vars(GenerationConfig()) if not name.startswith("_"))


@cache
def own() -> PreTrainedModel:
    return tiny_model("llama")


@cache
def attached() -> PreTrainedModel:
    model = tiny_model("llama")
    kvatlas.attach(model, kv_memory="4MiB", block_size=4)
    return model


def outcome(model: PreTrainedModel, **options: Any) -> Any:
    """Return what a call gives, or the error it raises; sampling is seeded."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return model.generate(PROMPTS, **{"attention_mask": torch.ones_like(PROMPTS), **options})
        except Exception as error:  # transformers may raise anything, which is then what is wanted
            return error


@contextmanager
def checkpoint(**settings: Any) -> Iterator[None]:
    """Give both models other generation configs while the block runs."""
    before = [copy.deepcopy(model.generation_config) for model in (own(), attached())]
    for model in (own(), attached()):
        for name, value in settings.items():
            setattr(model.generation_config, name, value)
    yield
    own().generation_config, attached().generation_config = before


def assert_same(wanted: Any, got: Any) -> None:
    if isinstance(wanted, Exception):
        assert type(got) is type(wanted) and str(got) == str(wanted), f"{wanted!r} against {got!r}"
        return
    assert not isinstance(got, Exception), f"{wanted!r} against {got!r}"
    if isinstance(wanted, ModelOutput):
        assert type(got) is type(wanted)
        assert torch.equal(got.sequences, wanted.sequences)
        for name in ("scores", "logits"):
            if wanted.get(name) is not None:
                torch.testing.assert_close(torch.stack(got[name]), torch.stack(wanted[name]), rtol=1e-4, atol=1e-4)
        assert got.past_key_values is None
    else:
        assert torch.equal(got, wanted)


def assert_refused(got: Any, *parts: str) -> None:
    assert isinstance(got, UnsupportedError | ConfigError), repr(got)
    assert "\n" not in str(got) and all(part in str(got) for part in parts), str(got)


def test_every_field_has_an_unusual_value() -> None:
    """A new field of transformers is to be decided upon."""
    assert set(FIELDS) <= set(UNUSUAL), "add them to UNUSUAL, and to REFUSED if they need the cache"


@pytest.mark.parametrize("where", ["call", "generation_config", "checkpoint"])
@pytest.mark.parametrize("field", FIELDS)
def test_each_option_of_a_generation_config(field: str, where: str) -> None:
    value, others = UNUSUAL[field]
    options, settings = {**BASE, **others}, {}
    if where == "call":
        options[field] = value
    elif where == "generation_config":
        options = {"generation_config": GenerationConfig(**{**options, field: value})}
    else:
        options.pop(field, None)
        settings = {field: value}
    with checkpoint(**settings):
        wanted, got = outcome(own(), **options), outcome(attached(), **options)
    if field in REFUSED:
        assert_refused(got, field, "while attached")
    else:
        assert_same(wanted, got)


@pytest.mark.parametrize("field", sorted(REFUSED))
def test_the_call_wins_over_the_checkpoint(field: str) -> None:
    """What the checkpoint's configuration switches on, a call switches off: nothing is left to refuse."""
    value, others = UNUSUAL[field]
    known = {"num_beams": 1, "guidance_scale": 1.0, "cache_implementation": "dynamic", "use_cache": True}
    off = known.get(field, False if isinstance(value, bool) else None)
    plain = outcome(own(), **BASE)
    with checkpoint(**others, **{field: value}):
        assert_refused(outcome(attached(), **BASE), f"pass {field}=" if field != "penalty_alpha" else field)
        switched = {**BASE, "return_dict_in_generate": False, field: off}
        assert_same(plain, outcome(attached(), **switched))
        if off is not None:  # in a GenerationConfig None means "as the checkpoint says"
            assert_same(plain, outcome(attached(), generation_config=GenerationConfig(**switched)))


def criteria() -> StoppingCriteriaList:
    return StoppingCriteriaList([MaxTimeCriteria(max_time=1000.0), lambda ids, scores, **_: ids[:, -1] % 3 == 0])


class Taken(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[list[int]] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens.append(value.flatten().tolist())

    def end(self) -> None:
        self.tokens.append([])


HONOURED: dict[str, Callable[[], dict[str, Any]]] = {
    "stopping_criteria": lambda: {"stopping_criteria": criteria()},
    "logits_processor": lambda: {
        "logits_processor": LogitsProcessorList([MinLengthLogitsProcessor(14, 7, device="cpu")]),
        "eos_token_id": 7,
    },
    "prefix_allowed_tokens_fn": lambda: {"prefix_allowed_tokens_fn": lambda row, ids: [7 + row, 9, 11]},
    "trust_remote_code": lambda: {"trust_remote_code": False},
    "synced_gpus": lambda: {"synced_gpus": False},
    "labels": lambda: {"labels": PROMPTS},
    "logits_to_keep": lambda: {"logits_to_keep": 3},
    "negative_prompt_ids": lambda: {"negative_prompt_ids": PROMPTS},
    "position_ids": lambda: {"position_ids": torch.arange(9)[None].expand(2, 9)},
    "mask of bools": lambda: {"attention_mask": torch.ones_like(PROMPTS).bool()},
    "no mask": lambda: {"attention_mask": None},
    "empty options": lambda: {"inputs_embeds": None, "past_key_values": None, "assistant_model": None},
    "cache_implementation": lambda: {"cache_implementation": None},
    "several sequences of each": lambda: {"num_return_sequences": 2, "do_sample": True},
    "padding": lambda: {"attention_mask": torch.tensor([[0, 0] + [1] * 7, [1] * 9])},
    "padding and its positions": lambda: {
        "attention_mask": torch.tensor([[0, 0] + [1] * 7, [1] * 9]),
        "position_ids": torch.tensor([[5, 6, *range(7)], [*range(9)]]),
    },
}
LOST: dict[str, tuple[Callable[[], dict[str, Any]], tuple[str, ...]]] = {
    "shifted positions": (lambda: {"position_ids": torch.arange(3, 12)[None]}, ("position_ids", "from 0")),
    "restarting positions": (lambda: {"position_ids": torch.arange(9)[None] % 5}, ("position_ids", "from 0")),
    "positions of one dimension": (lambda: {"position_ids": torch.arange(9)}, ("position_ids", "from 0")),
    "positions of no row": (lambda: {"position_ids": torch.arange(9).expand(5, 9)}, ("position_ids", "from 0")),
    "mask that is too long": (lambda: {"attention_mask": torch.ones(2, 12)}, ("attention_mask", "[2, 12]", "[2, 9]")),
    "mask that is too short": (lambda: {"attention_mask": torch.ones(2, 4)}, ("attention_mask", "[2, 4]")),
    "mask of four dimensions": (lambda: {"attention_mask": torch.ones(2, 1, 9, 9)}, ("attention_mask", "[2, 1, 9, 9]")),
    "padding on the right": (
        lambda: {"attention_mask": torch.tensor([[1] * 7 + [0, 0], [1] * 9])}, ("attention_mask", "left"),
    ),
    "a hole": (lambda: {"attention_mask": torch.tensor([[1, 1, 0] + [1] * 6, [1] * 9])}, ("attention_mask", "left")),
    "a row of padding": (lambda: {"attention_mask": torch.tensor([[0] * 9, [1] * 9])}, ("attention_mask", "every row")),
    "weights as a mask": (lambda: {"attention_mask": torch.full((2, 9), 2)}, ("attention_mask",)),
    "a cache": (lambda: {"past_key_values": DynamicCache()}, ("past_key_values=<DynamicCache>",)),
    "embeddings": (lambda: {"inputs_embeds": torch.ones(2, 9, 64)}, ("inputs_embeds=<Tensor>", "token ids")),
    "an assistant": (lambda: {"assistant_model": own()}, ("assistant_model=<LlamaForCausalLM>", "rewinds")),
    "a loop of its own": (lambda: {"custom_generate": lambda *_, **__: None}, ("custom_generate=<function>",)),
    "a loop of a repository": (lambda: {"custom_generate": "some/where"}, ("custom_generate='some/where'",)),
    "many devices": (lambda: {"synced_gpus": True}, ("synced_gpus=True", "one device")),
    "paged": (lambda: {"cache_implementation": "paged"}, ("cache_implementation='paged'",)),
    "a packed batch": (lambda: {"cu_seq_lens_q": torch.arange(2)}, ("cu_seq_lens_q=<Tensor>", "token ids")),
}  # fmt: skip


@pytest.mark.parametrize("name", HONOURED)
def test_arguments_that_are_honoured(name: str) -> None:
    wanted, got = (outcome(model, **BASE | HONOURED[name]()) for model in (own(), attached()))
    assert not isinstance(wanted, Exception), repr(wanted)
    assert_same(wanted, got)


@pytest.mark.parametrize("name", LOST)
def test_arguments_that_would_be_lost(name: str) -> None:
    options, parts = LOST[name]
    assert_refused(outcome(attached(), **BASE | options()), *parts)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("masked", [True, False])
def test_an_empty_prompt_is_called_empty(rows: int, masked: bool) -> None:
    empty = torch.empty(rows, 0, dtype=torch.int64)
    with pytest.raises(ConfigError, match="the prompt is empty"):
        attached().generate(empty, attention_mask=torch.ones_like(empty) if masked else None, **BASE)


def test_a_streamer_sees_the_same() -> None:
    seen = []
    for model in (own(), attached()):
        seen.append(Taken())
        model.generate(PROMPTS[:1], streamer=seen[-1], **BASE)
    assert seen[0].tokens == seen[1].tokens and len(seen[0].tokens) == 8


def test_a_typing_mistake_is_named_by_transformers() -> None:
    got = outcome(attached(), **BASE, max_new_token=3)
    assert_same(outcome(own(), **BASE, max_new_token=3), got)
    assert "max_new_token" in str(got)


def test_a_text_that_begins_with_nothing() -> None:
    for first in (5, None):
        outcomes = []
        for model in (own(), attached()):
            try:
                outcomes.append(model.generate(**BASE, bos_token_id=first))
            except ValueError as error:
                outcomes.append(error)
        assert_same(*outcomes)


def test_arguments_by_position() -> None:
    given = GenerationConfig(**BASE, do_sample=False)
    wanted = own().generate(PROMPTS, given)
    assert torch.equal(attached().generate(PROMPTS, given), wanted)
    with pytest.raises(UnsupportedError, match="synced_gpus=True"):
        attached().generate(PROMPTS, given, None, None, None, True)


def test_what_a_family_knows_beside_tokens() -> None:
    """GPT-2 adds an embedding for each type of token: silently dropped, the answer would be another one."""
    model = AutoModelForCausalLM.from_config(tiny_config("gpt2", n_embd=64, n_layer=2, n_head=4)).eval()
    for name, value in {
        "token_type_ids": torch.ones_like(PROMPTS),
        "encoder_hidden_states": torch.ones(2, 3, 64),
    }.items():
        with kvatlas.attach(model), pytest.raises(UnsupportedError, match=f"{name}=<Tensor> cannot be used while att"):
            model.generate(PROMPTS, **BASE, **{name: value})


def test_a_refused_call_leaves_the_model_usable() -> None:
    for _ in range(2):
        assert isinstance(outcome(attached(), **BASE, position_ids=PROMPTS), KvatlasError)
    assert_same(outcome(own(), **BASE), outcome(attached(), **BASE))
