"""Packed, chunked and mixed runs through the adapter give the logits of plain transformers, family by family."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from tests.families import FAMILIES, LONGROPE_LIMIT_TOKENS, TINY_FAMILIES, tiny_config, tiny_model, token_ids
from tests.parity.packed import packed_logits
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from kvatlas.core.errors import ConfigError, UnsupportedError
from kvatlas.models import clone, dense_context
from kvatlas.models.adapter import Adapter, AttentionCall
from kvatlas.models.coverage import module_kinds
from kvatlas.models.dense_context import DenseContext, Segment
from kvatlas.models.loading import adapt
from kvatlas.models.probe import _causal_class, probe_config, probe_model
from kvatlas.models.quiet import quiet

TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _alone(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits [n, V] of one sequence, by transformers alone."""
    with torch.no_grad():
        return model(input_ids=ids[None], use_cache=False).logits[0]


def _worst(actual: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(actual, expected, strict=True))


def _tiny_clone(model_type: str, **changes: object) -> PreTrainedModel:
    config = CONFIG_MAPPING[model_type](**changes)
    with quiet():
        return clone.build(_causal_class(config), clone.tiny_config(config))


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_plain(family):
    model = TINY_FAMILIES[family]()
    # sdpa knows neither softcap nor sinks; transformers 5.17 lets it drop a softcap without a word.
    model.set_attn_implementation("eager" if family in {"gemma2", "gpt_oss"} else "sdpa")
    sequences = token_ids(31, 22, 9)
    expected = [_alone(model, ids) for ids in sequences]
    with adapt(model) as adapter:
        assert _worst(packed_logits(adapter, sequences), expected) < TOLERANCE
    assert _worst([_alone(model, ids) for ids in sequences], expected) == 0


@pytest.mark.parametrize("family", ["stablelm", "nemotron", "gemma3n_text", "gemma4_text"])
def test_families_with_a_catch(family):
    model = tiny_model(family)
    sequences = token_ids(31, 22, 9)
    expected = [_alone(model, ids) for ids in sequences]
    with adapt(model) as adapter:
        assert _worst(packed_logits(adapter, sequences), expected) < TOLERANCE


def test_shape_is_observed():
    with adapt(tiny_model("gemma2"), name="mine") as adapter:
        shape = adapter.shape
        assert adapter.dtype == torch.float32 and adapter.device == torch.device("cpu")
    assert (shape.name, shape.hidden_size, shape.vocab_size, shape.max_positions) == ("mine", 64, 101, 128)
    assert [layer.window for layer in shape.layers] == [6, None, 6]
    assert {(layer.num_query_heads, layer.num_kv_heads, layer.key_dim) for layer in shape.layers} == {(4, 2, 24)}
    assert shape.num_parameters == sum(p.numel() for p in tiny_model("gemma2").parameters())


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
def test_shared_layers_are_found(family):
    with adapt(tiny_model(family)) as adapter:
        assert [layer.shares_kv_with for layer in adapter.shape.layers] == [None, None, 0, 1]
        assert adapter.shape.num_lanes == 4


@pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
def test_rope_regimes(rope_type):
    """Hazard 1: a long neighbour must not change the frequencies of a short sequence, nor chunks those of a whole."""
    limit = LONGROPE_LIMIT_TOKENS
    if rope_type == "longrope":
        model = tiny_model("phi3")
    else:
        rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
        model = tiny_model("llama", max_position_embeddings=limit, rope_parameters=rope)
    sequences = token_ids(limit + 9, limit, limit - 5, limit + 2)
    with adapt(model) as adapter:
        packed = packed_logits(adapter, sequences, chunk=4)
        regimes = [adapter.rope_regime(len(ids)) for ids in sequences]
    assert regimes[1] == regimes[2] != regimes[0]
    assert (regimes[0] == regimes[3]) == (rope_type == "longrope")
    for ids, logits in zip(sequences, packed, strict=True):
        fresh = tiny_model(model.config.model_type, **_rope_settings(model))
        assert _worst([logits], [_alone(fresh, ids)]) < TOLERANCE


def _rope_settings(model: PreTrainedModel) -> dict[str, object]:
    config = model.config
    return {
        "max_position_embeddings": config.max_position_embeddings,
        "rope_parameters": dict(config.rope_parameters),
    }


def test_rope_length_is_checked():
    with adapt(tiny_model("phi3")) as adapter:
        ids, positions = token_ids(20)[0], torch.arange(20)
        context = DenseContext()
        context.begin([Segment(sequence=0, start=0, num_tokens=20)])
        with pytest.raises(ConfigError, match="pass rope_tokens"):
            adapter.forward(ids, positions, context, positions)
        with pytest.raises(ConfigError, match="rope_tokens=5"):
            adapter.forward(ids, positions, context, positions, rope_tokens=5)
    with adapt(tiny_model("llama")) as adapter:
        assert adapter.rope_regime(5) is None and adapter.rope_regime(10**6) is None


def test_only_the_asked_rows():
    model = tiny_model("gpt_neox")
    ids = token_ids(12)[0]
    expected = _alone(model, ids)
    with adapt(model) as adapter:
        for rows in (torch.tensor([11, 0, 3]), torch.empty(0, dtype=torch.int64)):
            context = DenseContext()
            context.begin([Segment(sequence=0, start=0, num_tokens=12)])
            logits = adapter.forward(ids, torch.arange(12), context, rows)
            assert logits.shape == (len(rows), 101)
            torch.testing.assert_close(logits, expected[rows], rtol=1e-4, atol=1e-4)


REFUSED = {
    "bloom": "position_ids",
    "falcon": "AttentionInterface",
    "llama4_text": "chunked",
    "diffllama": "twice",
    "doge": "own attention mask",
    "mamba": "stateful",
    "qwen3_next": "stateful",
    "bert": "not causal",
    "deepseek_v32": "sparse indexer",
}


@pytest.mark.parametrize("family", REFUSED)
def test_refusals_name_family_and_reason(family):
    with pytest.raises(UnsupportedError, match=f"{family}.*{REFUSED[family]}") as refusal:
        adapt(_tiny_clone(family))
    assert "\n" not in str(refusal.value)


def test_hybrid_by_its_real_layers():
    """A family can pass with attention alone and fail with the layers its checkpoints have."""
    assert not probe_config(CONFIG_MAPPING["lfm2"](full_attn_idxs=[2, 5])).supported
    assert not probe_config(CONFIG_MAPPING["granitemoehybrid"]()).supported
    assert probe_config(CONFIG_MAPPING["granitemoehybrid"](layer_types=["attention"] * 32)).supported


def test_unseen_parts_are_refused(monkeypatch):
    model = tiny_model("gemma2")
    result = probe_model(model)
    seen = dataclasses.replace(result, kinds=result.kinds - {"a window"})
    monkeypatch.setattr("kvatlas.models.loading.probe_model", lambda _: seen)
    with pytest.raises(UnsupportedError, match=r"gemma2.*a window"):
        adapt(model)
    assert model.config._attn_implementation != "kvatlas"


@pytest.mark.parametrize(
    ("family", "mistake"),
    [
        ("mistral", {"window": None}),
        ("gemma2", {"softcap": None}),
        ("gpt_oss", {"sinks": None}),
        ("granite", {"scale": 0.125}),
    ],
)
def test_probe_sees_mistakes(monkeypatch, family, mistake):
    """A probe that cannot fail is worth nothing: leave one thing out and it must refuse."""
    assert probe_config(CONFIG_MAPPING[family]()).supported
    correct = dense_context.attend_one

    def wrong(call: AttentionCall, *rest: Tensor) -> Tensor:
        return correct(dataclasses.replace(call, **mistake), *rest)

    monkeypatch.setattr(dense_context, "attend_one", wrong)
    result = probe_config(CONFIG_MAPPING[family]())
    assert not result.supported and result.relative_error > TOLERANCE


def test_small_model_stands_in_for_its_clone(monkeypatch):
    def fail(*_: object) -> None:
        raise ValueError("no")

    monkeypatch.setattr(clone, "build", fail)
    assert probe_model(tiny_model("gemma2")).supported
    monkeypatch.setattr("kvatlas.models.probe._SMALL_PARAMETERS", 10)
    refused = probe_model(tiny_model("gemma2"))
    assert not refused.supported and "no tiny clone can be built: ValueError: no" in refused.reason


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma4_text"])
def test_probe_leaves_no_trace(family):
    model = tiny_model(family).train()
    before = torch.get_rng_state(), logging.get_verbosity(), model.config.to_dict()
    assert probe_model(model).supported
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (logging.get_verbosity(), model.config.to_dict()) == before[1:]
    assert model.training


def test_restore_gives_the_model_back():
    model = tiny_model("phi3").train()
    implementation = model.config._attn_implementation
    adapter = adapt(model)
    assert not model.training
    with pytest.raises(UnsupportedError, match="attached to kvatlas already"):
        Adapter(model)
    with pytest.raises(UnsupportedError, match=r"kvatlas\.detach"):
        model(token_ids(4)[0][None])
    adapter.restore()
    adapter.restore()
    assert model.training and model.config._attn_implementation == implementation
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(UnsupportedError, match="was restored"):
        adapter.forward(token_ids(4)[0], torch.arange(4), DenseContext(), torch.arange(4), rope_tokens=4)


def test_importing_registers_nothing():
    code = (
        "import kvatlas.models.adapter, kvatlas.models.loading, kvatlas.models.probe, kvatlas.models.random\n"
        "from transformers import AttentionInterface\n"
        "assert 'kvatlas' not in AttentionInterface()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# The default configurations of these types do not build, or are not what checkpoints have.
_REALISTIC: dict[str, dict[str, object]] = {
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 8},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2": {"full_attn_idxs": [2, 5, 8, 10, 12, 14]},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
}
_KNOWN_WRONG = {"diffllama", "hrm_text", "lfm2", "llama4", "llama4_text", "doge", "qwen3_next", "mamba", "jamba"}


@pytest.mark.slow
def test_sweep_of_all_families():
    """Every causal LM type of transformers is either equal to its own eager attention or refused with a reason."""
    supported, refused = {}, {}
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            with quiet():
                config = CONFIG_MAPPING[model_type](**_REALISTIC.get(model_type, {}))
        except Exception as error:
            refused[model_type] = f"no default configuration: {str(error).splitlines()[0]}"
            continue
        result = probe_config(config)
        if not result.supported:
            refused[model_type] = result.reason
            assert result.reason and "\n" not in result.reason
            continue
        assert result.relative_error < TOLERANCE
        with quiet(), torch.device("meta"):
            untested = module_kinds(_causal_class(config)(config)) - result.kinds
        if untested:
            refused[model_type] = f"the clone lacks {', '.join(sorted(untested))}"
        else:
            supported[model_type] = result.reason
    for name, reason in {**supported, **refused}.items():
        print(f"{name:28} {'supported' if name in supported else 'refused  '} {reason}")
    print(f"{len(supported)} supported, {len(refused)} refused")
    assert not _KNOWN_WRONG & supported.keys()
    assert len(supported) >= 60


def test_tiny_configs_are_tiny():
    for family in FAMILIES:
        assert tiny_config(family).num_hidden_layers == 3
        assert sum(weight.numel() for weight in tiny_model(family).parameters()) < 1_000_000
