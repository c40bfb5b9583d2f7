"""The model class for lm-eval: its log-likelihoods, texts and arguments; the six tasks on rows of our own."""

from __future__ import annotations

import copy
import json
import os
import warnings
from types import SimpleNamespace

import pytest
import torch
from tests.unit.cli.running import kvatlas
from tests.unit.evaluation.local_tasks import ROWS, write_tasks

from kvatlas.core.errors import CapacityError, ConfigError, UnknownNameError, UnsupportedError
from kvatlas.engine.llm import LLM
from kvatlas.engine.params import SamplingParams
from kvatlas.evaluation import tasks
from kvatlas.evaluation.run import Evaluation, evaluate
from kvatlas.evaluation.tasks import load_tasks
from kvatlas.models.loading import load_model
from kvatlas.records.store import RecordStore

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before datasets is imported: nothing may be looked up
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
lm_eval = pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed: pip install 'kvatlas[eval]'")

pytestmark = pytest.mark.filterwarnings("ignore")  # of lm-eval and what it drags in

KEPT = "h2o(heavy=4, recent=4)"


@pytest.fixture(scope="module")
def bundled():
    return load_model(None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def harness():
    with warnings.catch_warnings(action="ignore"):  # of what lm-eval drags in
        from kvatlas.evaluation import harness
    return harness


@pytest.fixture(autouse=True)
def no_survey(monkeypatch):
    """Spare lm-eval's survey of the machine, which asks a dozen programs and takes longer than the questions here."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


def asked(*rows):
    return [SimpleNamespace(args=row) for row in rows]


@pytest.fixture
def judge(harness, bundled):
    return lambda strategy="full", **options: harness.KvatlasLM(bundled, strategy, "64MiB", **options)


PAIRS = (
    ("Return the number of", " items in the list."),
    (" Maria 4 8 2 1. and some more text\nQuestion: Maria", " 4 8 2 1"),
    ("A trailing space ", "goes over."),
    ("", "A text alone."),
)


def test_it_is_registered(harness):
    from lm_eval.api.registry import get_model

    assert get_model("kvatlas") is harness.KvatlasLM


def test_loglikelihoods_are_those_of_transformers(judge, bundled):
    own = copy.deepcopy(bundled.adapter.model)
    own.set_attn_implementation("sdpa")
    model = judge()
    for (context, continuation), (logprob, greedy) in zip(
        PAIRS, model.loglikelihood(asked(*PAIRS), disable_tqdm=True), strict=True
    ):
        first = (
            model._encode_pair(context, continuation)
            if context
            else ([model.prefix_token_id], model.tok_encode(continuation))
        )
        ids, count = torch.tensor([[*first[0], *first[1]]]), len(first[1])
        with torch.inference_mode():
            rows = own(ids).logits[0, -count - 1 : -1].log_softmax(dim=-1)
        wanted = rows.gather(1, ids[0, -count:, None])
        assert logprob == pytest.approx(float(wanted.sum()), abs=1e-3)
        assert greedy is bool((rows.argmax(dim=-1) == ids[0, -count:]).all())


def test_a_whole_budget_scores_as_full_and_a_small_one_does_not(judge):
    full = judge().loglikelihood(asked(*PAIRS), disable_tqdm=True)
    whole = judge("h2o(heavy=500, recent=500)").loglikelihood(asked(*PAIRS), disable_tqdm=True)
    small = judge(KEPT).loglikelihood(asked(*PAIRS), disable_tqdm=True)
    assert [one for one, _ in whole] == pytest.approx([one for one, _ in full], abs=1e-3)
    assert abs(small[1][0] - full[1][0]) > 0.1


def test_a_rolling_text_is_the_sum_of_its_tokens(judge, bundled):
    text = "Return a list of the names that are defined in this module. " * 3
    model = judge()
    ids = torch.tensor([[model.prefix_token_id, *model.tok_encode(text)]])
    own = copy.deepcopy(bundled.adapter.model)
    own.set_attn_implementation("sdpa")
    with torch.inference_mode():
        rows = own(ids).logits[0, :-1].log_softmax(dim=-1)
    wanted = float(rows.gather(1, ids[0, 1:, None]).sum())
    assert model.loglikelihood_rolling(asked((text,)), disable_tqdm=True) == [pytest.approx(wanted, abs=2e-3)]
    with pytest.raises(UnsupportedError, match="a prompt of one token"):
        judge("h2o(heavy=0.1, recent=0.1)").loglikelihood_rolling(asked((text,)))


def test_texts_are_those_of_generation(judge, bundled):
    prompt, stop = "Return the number of items in", "e"
    wanted = LLM(bundled, KEPT).generate(prompt, SamplingParams(max_tokens=12, stop=stop))[0].outputs[0].text
    got = judge(KEPT).generate_until(
        asked((prompt, {"until": [stop], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0})),
        disable_tqdm=True,
    )
    assert got == [wanted]
    assert judge().generate_until([]) == []


def test_long_questions_lose_their_beginning_and_are_counted(judge, harness, monkeypatch):
    monkeypatch.setattr(harness.KvatlasLM, "max_length", 24)
    model = judge()
    long, end = "Many words stand here. " * 20 + "The end of the question", " is near"
    short = model.tokenizer.decode(model.tok_encode(long)[-24 + len(model.tok_encode(end)) :])
    pairs = [one for one, _ in model.loglikelihood(asked((long, end), (short, end)), disable_tqdm=True)]
    assert pairs[0] == pytest.approx(pairs[1], abs=1e-3)
    assert model.num_truncated == 1
    assert model.generate_until(asked((long, {"max_gen_toks": 4})), disable_tqdm=True)
    assert model.num_truncated == 2
    with pytest.raises(CapacityError, match="leaves no room for its question in the 24 positions"):
        model.loglikelihood(asked(("a", long)), disable_tqdm=True)
    with pytest.raises(ConfigError, match="lower max_gen_toks"):
        model.generate_until(asked((long, {"max_gen_toks": 24})), disable_tqdm=True)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", {}),
        ("pretrained=a/b,strategy=h2o(heavy=0.1, recent=0.1),kv_memory=1GiB", None),
        ("max_batched_tokens=64", {"max_batched_tokens": 64}),
        ("strategy=full | bf16,device=cpu", {"strategy": "full | bf16", "device": "cpu"}),
    ],
)
def test_arguments_keep_commas_of_a_strategy(harness, text, wanted):
    if wanted is None:
        wanted = {"pretrained": "a/b", "strategy": "h2o(heavy=0.1, recent=0.1)", "kv_memory": "1GiB"}
    assert harness.parse_arguments(text) == wanted


def test_arguments_that_are_none_are_refused(harness):
    with pytest.raises(ConfigError, match="'full' is not understood"):
        harness.parse_arguments("full")


def test_generation_arguments(harness):
    sampling = harness.sampling
    assert sampling({}, 7) == SamplingParams(max_tokens=7)
    assert sampling({"until": "a", "max_new_tokens": 3}, 7) == SamplingParams(max_tokens=3, stop="a")
    assert sampling({"do_sample": False, "temperature": 0.7, "top_p": 0.5}, 7) == SamplingParams(max_tokens=7)
    assert sampling({"do_sample": True, "top_k": 5}, 7) == SamplingParams(max_tokens=7, temperature=1.0, top_k=5)
    assert sampling({"max_gen_toks": "3", "temperature": "0.0", "until": None}, 7) == SamplingParams(max_tokens=3)
    assert sampling({"until": ["", "a"], "temperature": "0.5"}, 7) == SamplingParams(
        max_tokens=7, stop="a", temperature=0.5
    )
    for wrong in ({"max_gen_toks": "many"}, {"temperature": [1]}, {"max_gen_toks": float("inf")}):
        with pytest.raises(ConfigError, match="in a task's generation arguments; write a number"):
            sampling(wrong, 7)
    with pytest.raises(ConfigError, match="num_beams are unknown"):
        sampling({"num_beams": 4}, 7)


def test_six_tasks_through_lm_eval_by_name(harness, folder):
    from lm_eval.tasks import TaskManager

    results = lm_eval.simple_evaluate(
        model="kvatlas",
        model_args=f"strategy={KEPT},kv_memory=64MiB",
        tasks=list(ROWS),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    for name, rows in ROWS.items():
        samples = results["samples"][name]
        assert [one["doc_id"] for one in samples] == list(range(len(rows)))
        for one, row in zip(samples, rows, strict=True):
            best = max(range(len(one["resps"])), key=lambda choice: one["resps"][choice][0][0])
            assert one["acc"] == (best == gold(row)), (name, row)
        assert results["results"][name]["acc,none"] == pytest.approx(sum(one["acc"] for one in samples) / len(rows))
    prompts = {name: results["samples"][name][0]["arguments"] for name in ROWS}
    assert prompts["piqa"][0] == ("Question: Keep soup warm on the way\nAnswer:", " Pour it into a flask.")
    assert prompts["hellaswag"][1] == ("Baking bread: A woman kneads dough on a table. She", " stops. rides it home.")
    assert prompts["copa"][0] == ("The lamp went out because", "  the bulb was old.")
    assert prompts["winogrande"][1] == ("The key did not fit the lock because the lock", " was too large.")
    assert prompts["openbookqa"][3] == ("A plant on a dark shelf lacks", " salt")
    assert prompts["boolq"][0][1] == " no"


def gold(row):
    """Return the number of the right choice, from the fields that the data sets call it by."""
    if "answerKey" in row:
        return row["choices"]["label"].index(row["answerKey"])
    return int(row["answer"]) - 1 if "answer" in row else int(row["label"])


def test_records_hold_every_question_and_resume(folder, tmp_path):
    asks = Evaluation(
        tasks=("boolq",), strategies=("full", KEPT), include=folder, kv_memory="64MiB", limit=2, fewshot=1
    )
    said = []
    with RecordStore(tmp_path / "records.duckdb") as store:
        first = evaluate(asks, store, "kvatlas evaluate", said.append)
        again = evaluate(asks, store, "kvatlas evaluate", said.append)
        rows, (manifest, _) = store.rows("evaluate", metric="acc"), store.runs()
    assert [one.status for one in first] == ["done"] * 2
    assert [one.status for one in again] == ["found done"] * 2
    assert said == first + again
    assert "lm_eval" in manifest.versions
    assert {(row.params["task"], row.strategy, row.index) for row in rows} == {
        (task, strategy, index) for task in asks.tasks for strategy in asks.strategies for index in (0, 1)
    }
    assert all(row.params["n"] == 2 and row.params["fewshot"] == 1 and row.model_role == "quality" for row in rows)


def test_worked_examples_are_refused_where_a_task_takes_none(folder, tmp_path):
    task = json.loads((folder / "boolq.yaml").read_text()) | {"task": "boolq_bare", "num_fewshot": 0}
    (folder / "boolq_bare.yaml").write_text(json.dumps(task))
    line = kvatlas("evaluate", "--task", "boolq_bare", "--fewshot", 2, "--include", folder, "--records", tmp_path / "r")
    assert "fewshot=2 would do nothing for boolq_bare" in line.error
    assert not (tmp_path / "r").exists()


def test_a_pool_that_is_too_small_refuses_the_point(folder, tmp_path):
    asks = Evaluation(tasks=("piqa",), strategies=("full",), include=folder, kv_memory="64KiB")
    with RecordStore(tmp_path / "records.duckdb") as store:
        (outcome,) = evaluate(asks, store, "kvatlas evaluate", print)
        (record,) = store.points(status="refused")
    assert outcome.status == "refused"
    assert outcome.text == record.reason


def test_the_command_prints_shares_and_the_report_shows_them(folder, tmp_path):
    records = tmp_path / "r.duckdb"
    ran = kvatlas(
        *("evaluate", "--task", "copa", "--include", folder, "--strategy", "full", "--strategy", KEPT),
        *("--records", records, "--kv-memory", "64MiB"),
    )
    assert ran.status == 0, ran.err
    assert ran.out.count("(n = 2)") == 2
    assert "copa under full: done, acc" in ran.out
    shown = kvatlas("report", "--records", records, "--out", tmp_path / "page")
    assert shown.status == 0, shown.err
    assert "copa" in (tmp_path / "page" / "index.html").read_text(encoding="utf-8")


def test_unknown_tasks_and_absent_data_are_told(folder, monkeypatch):
    with pytest.raises(UnsupportedError, match=r"the data of task 'broken' cannot be had .*HF_HOME"):
        (folder / "broken.yaml").write_text(
            '{"task": "broken", "dataset_path": "nobody/nothing", "output_type": "multiple_choice", '
            '"validation_split": "validation", "doc_to_text": "a", "doc_to_target": "b", "doc_to_choice": ["b"]}'
        )
        load_tasks(["broken"], folder)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", _OnlyOwn)
    with pytest.raises(UnknownNameError, match="did you mean 'piqa'"):
        load_tasks(["piqqa"], folder)


def _OnlyOwn(include_path=None, include_defaults=True):  # noqa: N802 - stands in for a class; spares reading 12,000 files
    from lm_eval.tasks.manager import TaskManager

    return TaskManager(include_path=include_path, include_defaults=False)


def test_without_lm_eval_the_command_says_how_to_install(monkeypatch):
    def absent(name):
        raise tasks.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(tasks.importlib.metadata, "version", absent)
    assert "pip install 'kvatlas[eval]'" in kvatlas("evaluate", "--task", "piqa").error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--task", ","), "nothing to evaluate"),
        (("--task", "piqa", "--limit", 0), "limit=0 is out of range"),
        (("--task", "piqa", "--strategy", "h3o"), "did you mean 'h2o'"),
        (("--task", "piqa", "--include", "/no/such"), "include folder '/no/such' does not exist"),
        (("--task", "piqa", "--dtype", "int9"), "unknown dtype 'int9'"),
    ],
)
def test_bad_options_are_one_line(arguments, said):
    assert said in kvatlas("evaluate", *arguments).error
