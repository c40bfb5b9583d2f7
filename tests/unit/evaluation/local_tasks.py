"""The six tasks of lm-eval on rows of our own: lm-eval's templates and rules, the fields of the real data, no hub."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROWS: dict[str, list[dict[str, Any]]] = {
    "piqa": [
        {
            "goal": "Keep soup warm on the way",
            "sol1": "Pour it into a flask.",
            "sol2": "Pour it on a plate.",
            "label": 0,
        },
        {"goal": "Mark a page", "sol1": "Burn the corner.", "sol2": "Lay a ribbon in it.", "label": 1},
        {"goal": "Loosen a rusty bolt", "sol1": "Give it oil and time.", "sol2": "Give it paint.", "label": 0},
    ],
    "hellaswag": [
        {
            "ind": 7,
            "activity_label": "Baking bread",
            "ctx_a": "A woman kneads dough on a table.",
            "ctx_b": "she",
            "ctx": "A woman kneads dough on a table. she",
            "endings": [
                "puts it into the oven.",
                "stops [title] rides it home.",
                "reads it aloud.",
                "paints the dough blue and sells it.",
            ],
            "source_id": "own~1",
            "split": "val",
            "split_type": "indomain",
            "label": "0",
        },
        {
            "ind": 8,
            "activity_label": "Sailing",
            "ctx_a": "Two men untie a small boat.",
            "ctx_b": "they",
            "ctx": "Two men untie a small boat. they",
            "endings": ["eat the rope.", "hoist the sail.", "fold the lake.", "teach it to sing."],
            "source_id": "own~2",
            "split": "val",
            "split_type": "indomain",
            "label": "1",
        },
    ],
    "copa": [
        {
            "premise": "The lamp went out.",
            "choice1": "The bulb was old.",
            "choice2": "The wall was white.",
            "question": "cause",
            "idx": 0,
            "label": 0,
        },
        {
            "premise": "It rained all night.",
            "choice1": "The moon grew.",
            "choice2": "The river rose.",
            "question": "effect",
            "idx": 1,
            "label": 1,
        },
    ],
    "winogrande": [
        {
            "sentence": "The key did not fit the lock because the _ was too large.",
            "option1": "key",
            "option2": "lock",
            "answer": "1",
        },
        {
            "sentence": "Ada thanked Ruth because _ had helped.",
            "option1": "Ada",
            "option2": "Ruth",
            "answer": "2",
        },
    ],
    "openbookqa": [
        {
            "id": "own-1",
            "question_stem": "A plant on a dark shelf lacks",
            "choices": {"text": ["light", "music", "shoes", "salt"], "label": ["A", "B", "C", "D"]},
            "answerKey": "A",
        },
        {
            "id": "own-2",
            "question_stem": "Ice in a warm room will",
            "choices": {"text": ["sing", "burn", "melt", "grow"], "label": ["A", "B", "C", "D"]},
            "answerKey": "C",
        },
    ],
    "boolq": [
        {
            "passage": "The old bridge was closed to cars in spring. People may still cross it on foot.",
            "question": "can people walk over the old bridge",
            "idx": 0,
            "label": 1,
        },
        {
            "passage": "The museum opens at ten. On Mondays its doors stay shut.",
            "question": "is the museum open on mondays",
            "idx": 1,
            "label": 0,
        },
    ],
}

_OWN_FILES = {
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "copa": "super_glue/copa/default.yaml",
    "winogrande": "winogrande/default.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "boolq": "super_glue/boolq/default.yaml",
}


def write_tasks(folder: Path) -> Path:
    """Write the rows, and task files that change nothing of lm-eval's but where the data comes from."""
    found = find_spec("lm_eval")
    assert found is not None
    assert found.origin is not None
    for name, rows in ROWS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files = dict.fromkeys(("train", "validation", "test"), str(data))
        task = {
            "include": str(Path(found.origin).parent / "tasks" / _OWN_FILES[name]),
            "task": name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
        }
        # JSON is YAML; keys of this file win over those that it includes
        (folder / f"{name}.yaml").write_text(json.dumps(task), encoding="utf-8")
    return folder
