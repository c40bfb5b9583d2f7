"""ShareGPT and LMSYS-Chat-1M files, the prompts and sessions that come of them, and their place as traces."""

import json

import duckdb
import pytest

from kvatlas.core.errors import ConfigError, TraceError
from kvatlas.workloads.conversations import (
    Conversation,
    Pruning,
    Turn,
    conversation_trace,
    estimated_tokens,
    first_asks,
    session_plans,
)
from kvatlas.workloads.lmsys import read_lmsys
from kvatlas.workloads.materialize import prompt_ids
from kvatlas.workloads.sharegpt import read_sharegpt
from kvatlas.workloads.trace import read_trace, scale_trace

# Sentences of our own, in the fields of the real files.
SHAREGPT = [
    {
        "id": "QWJhYvA_0",
        "conversations": [
            {"from": "human", "value": "How do I tie a bowline knot, please?"},
            {"from": "gpt", "value": "Make a loop, pass the end through it, round the line and back."},
            {"from": "human", "value": "And how do I undo it again?"},
            {"from": "gpt", "value": "Push the collar down the line; it comes loose."},
        ],
    },
    {"id": "empty_0", "conversations": []},
    {
        "id": "tail_1",
        "conversations": [
            {"from": "gpt", "value": "The rest of an answer whose question was cut off."},
            {"from": "human", "value": "Which flowers grow well in the shade?"},
            {"from": "chatgpt", "value": "Ferns do, and hostas."},
        ],
    },
    {"conversations": [{"from": "system", "value": "Be kind."}, {"from": "user", "value": "No answer came to this."}]},
]
LMSYS = [
    {
        "conversation_id": "33f2f7c5",
        "model": "vicuna-13b",
        "conversation": [
            {"content": "Tell me a story about a lighthouse.", "role": "user"},
            {"content": "Once a keeper let the lamp go out, and the moon helped.", "role": "assistant"},
        ],
        "turn": 1,
        "language": "English",
        "openai_moderation": [{"flagged": False}, {"flagged": False}],
        "redacted": False,
    },
    {
        "conversation_id": "77aa",
        "model": "koala-13b",
        "conversation": [
            {"content": "Wie spät ist es jetzt in Rom?", "role": "user"},
            {"content": "Das kann ich leider nicht wissen.", "role": "assistant"},
            {"content": "Schade, trotzdem vielen Dank!", "role": "user"},
            {"content": "Gern geschehen, bis bald.", "role": "assistant"},
        ],
        "turn": 2,
        "language": "German",
        "openai_moderation": [],
        "redacted": True,
    },
]


def words(text):
    return text.split()


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def as_parquet(path, rows):
    lines = write(path.with_suffix(".tmp"), "".join(json.dumps(row) + "\n" for row in rows))
    with duckdb.connect() as connection:
        connection.execute(f"COPY (SELECT * FROM read_json('{lines}')) TO '{path}' (FORMAT parquet)")
    return path


def forms(folder, rows):
    """Yield the same rows as an array on one line, as a spread array, as JSON lines and as parquet."""
    yield write(folder / "one.json", json.dumps(rows))
    yield write(folder / "spread.json", "\ufeff\n" + json.dumps(rows, indent=2, ensure_ascii=False))
    yield write(folder / "lines.jsonl", "\n".join(map(json.dumps, rows)))
    yield as_parquet(folder / "rows.parquet", rows)


def test_sharegpt_in_every_form(tmp_path):
    for path in forms(tmp_path, SHAREGPT):
        found = list(read_sharegpt(path))
        assert [one.id for one in found[:3]] == ["QWJhYvA_0", "empty_0", "tail_1"]
        assert found[3].id.split()[-1] == "4"  # has none of its own
        assert [turn.role for turn in found[0].turns] == ["user", "assistant"] * 2
        assert found[0].turns[2].text == "And how do I undo it again?"
        assert [turn.role for turn in found[2].turns] == ["assistant", "user", "assistant"]
        assert found[3].turns[0] == Turn(role="system", text="Be kind.")


def test_lmsys_in_every_form(tmp_path):
    for path in forms(tmp_path, LMSYS):
        story, rome = read_lmsys(path)
        assert (story.id, story.model, story.language) == ("33f2f7c5", "vicuna-13b", "English")
        assert rome.turns[3] == Turn(role="assistant", text="Gern geschehen, bis bald.")
        assert [one.id for one in read_lmsys(path, language="German")] == ["77aa"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"id": "x"}, r"entry 2: got \['id'\], expected the field 'conversations'"),
        ({"conversations": "hello"}, "entry 2: got 'hello', expected conversations as a list of turns"),
        ({"conversations": [{"from": "human"}]}, r"entry 2: .*expected a turn with the texts 'from' and 'value'"),
        ({"conversations": [{"from": "human", "value": None}]}, "entry 2: .*'value': None.*; mend or remove the entry"),
        ({"conversations": ["hello"]}, "entry 2: got 'hello', expected a turn"),
    ],
)
def test_a_corrupt_sharegpt_entry_is_named(tmp_path, row, said):
    path = write(tmp_path / "x.json", json.dumps([SHAREGPT[0], row]))
    with pytest.raises(TraceError, match=said):
        list(read_sharegpt(path))
    with pytest.raises(TraceError, match=said):
        read_trace(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"conversation_id": None}, "line 2: got None, expected conversation_id as a text"),
        ({"conversation": None}, "line 2: got None, expected conversation as a list of turns"),
        ({"conversation": [{"role": "user", "text": "a"}]}, "line 2: .*the texts 'role' and 'content'"),
    ],
)
def test_a_corrupt_lmsys_row_is_named(tmp_path, change, said):
    path = write(tmp_path / "x.jsonl", json.dumps(LMSYS[0]) + "\n" + json.dumps(LMSYS[1] | change))
    with pytest.raises(TraceError, match=said):
        list(read_lmsys(path))


def test_rows_come_one_by_one(tmp_path):
    """The first conversation is there before the file has been read to its broken end."""
    path = write(tmp_path / "x.jsonl", json.dumps(LMSYS[0]) + "\nbroken")
    found = read_lmsys(path)
    assert next(found).id == "33f2f7c5"
    with pytest.raises(TraceError, match="line 2: got 'broken'"):
        next(found)


def conversation(*turns, id="c"):
    return Conversation(id=id, turns=tuple(Turn(role=role, text=text) for role, text in turns))


def test_exchanges_pair_questions_with_answers():
    talk = conversation(
        ("assistant", "lost"), ("system", "s"), ("user", "a"), ("user", "b"), ("assistant", "c"), ("tool", "t"),
        ("assistant", "d"), ("user", "e"), ("assistant", "f"), ("user", "open"),
    )  # fmt: skip
    assert talk.exchanges == [("a\nb", "c\nd"), ("e", "f")]
    assert conversation().exchanges == []


def test_vllm_prunes_by_these_lengths():
    kept = Pruning()
    assert kept.keeps(4, 4)
    assert not kept.keeps(3, 4)
    assert not kept.keeps(4, 3)
    assert kept.keeps(1024, 1024)
    assert not kept.keeps(1025, 4)
    assert kept.keeps(1000, 1048)
    assert not kept.keeps(1000, 1049)
    assert Pruning(max_prompt_tokens=None, max_total_tokens=None).keeps(10**6, 10**6)
    with pytest.raises(ConfigError, match="max_total_tokens is 0"):
        Pruning(max_total_tokens=0)


def test_lengths_are_the_tokenizers_else_estimates():
    talk = conversation(("user", "one two three four five"), ("assistant", "one two three four"))
    ((number, source, ask),) = first_asks([conversation(), talk], words)
    assert (number, source, ask.prompt) == (1, talk, "one two three four five")
    assert (ask.prompt_tokens, ask.output_tokens) == (5, 4)
    ((_, _, guess),) = first_asks([talk])
    assert (guess.prompt_tokens, guess.output_tokens) == (6, 5)  # 23 and 18 characters
    assert [estimated_tokens(text) for text in ("", "a", "abcd", "abcde")] == [0, 1, 1, 2]


def test_sessions_are_whole_conversations(tmp_path):
    talks = list(read_sharegpt(write(tmp_path / "x.json", json.dumps(SHAREGPT))))
    (plan,) = session_plans(talks, words)
    assert plan.id == "QWJhYvA_0"
    assert [(ask.prompt_tokens, ask.output_tokens) for ask in plan.asks] == [(8, 13), (7, 9)]
    assert plan.total_tokens == 37
    assert [one.id for one in session_plans(talks, words, min_turns=1)] == ["QWJhYvA_0", "tail_1"]
    cut = list(session_plans(talks, words, min_turns=1, max_total_tokens=36))
    assert [len(one.asks) for one in cut] == [1, 1]
    with pytest.raises(ConfigError, match="min_turns is 0"):
        list(session_plans(talks, min_turns=0))


@pytest.mark.parametrize(("rows", "sessions"), [(SHAREGPT, ["QWJhYvA_0", "tail_1"]), (LMSYS, ["33f2f7c5", "77aa"])])
def test_read_trace_takes_them_by_their_content(tmp_path, rows, sessions):
    for path in forms(tmp_path, rows):
        trace = read_trace(path, encode=words)
        assert [request.session for request in trace.requests] == sessions
        assert trace.requests[0].arrival_s == 0
        assert trace.requests[1].arrival_s > 0
        assert not any("estimate" in note for note in trace.notes)
        assert any("arrivals drawn" in note for note in trace.notes)
        assert "characters / 4" in read_trace(path).notes[-1]
        assert len(read_trace(path, limit=1).requests) == 1


def test_the_trace_scales_and_becomes_prompts(tmp_path):
    trace = read_trace(write(tmp_path / "x.json", json.dumps(SHAREGPT)), encode=words)
    assert [(one.prompt_tokens, one.output_tokens) for one in trace.requests] == [(8, 13), (7, 4)]
    small = scale_trace(trace, length_scale=0.5, time_scale=0.1, limit=1)
    assert len(prompt_ids(small.requests[0], vocab_size=50, seed=0)) == 4


def test_what_is_left_out_and_refused(tmp_path):
    short = write(tmp_path / "x.json", json.dumps([SHAREGPT[1]]))
    with pytest.raises(TraceError, match=r"holds no conversation that begins with a question.*at least 4"):
        read_trace(short)
    with pytest.raises(TraceError, match="holds no conversation"):
        read_trace(write(tmp_path / "x.json", "[]"))
    with pytest.raises(ConfigError, match="limit is 0"):
        conversation_trace(short, [], limit=0)
    other = as_parquet(tmp_path / "y.parquet", [{"text": "a"}])
    with pytest.raises(TraceError, match=r"no column 'conversations' or 'conversation'.*it has text"):
        read_trace(other)
