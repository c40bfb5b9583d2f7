"""Odd values, as Python source: what is found can be pasted, and is as readable as it gets."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from kvatlas.engine.params import SamplingParams

NAMES: dict[str, Any] = {
    "Decimal": Decimal,
    "Fraction": Fraction,
    "Path": Path,
    "SamplingParams": SamplingParams,
    "SimpleNamespace": SimpleNamespace,
    "inf": float("inf"),
    "nan": float("nan"),
    "np": np,
    "partial": partial,
    "torch": torch,
}

WHOLE = (
    *("0", "1", "-1", "2", "3", "5", "16", "255", "256", "10**6", "10**9", "10**12", "10**30", "10**400"),
    *("2**31 - 1", "2**31", "2**32", "2**63 - 1", "2**63", "2**64", "-2**31", "-2**63", "-2**63 - 1", "-(10**30)"),
)
REAL = (
    *("0.0", "-0.0", "0.1", "0.5", "0.999999", "1.0", "1.000001", "1.5", "2.0", "-0.5", "-1.0", "3.0"),
    *("1e-5", "1e-8", "1e-38", "1e-44", "1e-46", "5e-324", "1e-300", "1e300", "inf", "-inf", "nan"),
)
SCALARS = (
    *("np.int64(3)", "np.int32(-1)", "np.uint8(200)", "np.float32(0.5)", "np.float64(2.0)", "np.float64(nan)"),
    *("np.bool_(True)", "np.array(3)", "np.array(0.5)", "np.str_('a')", "np.datetime64(0, 's')"),
    *("torch.tensor(3)", "torch.tensor(0.5)", "torch.tensor(True)", "torch.tensor(nan)", "torch.float32"),
    *("True", "False", "Decimal('0.5')", "Decimal('NaN')", "Fraction(1, 2)", "1j", "complex(nan)"),
)
TEXTS = (
    *("''", "' '", "'0'", "'3'", "'0.5'", "'nan'", "'inf'", "'None'", "'true'", "'a'", "'ab'", "'\\n'", "'\\x00'"),
    *("'\\ud800'", "'a\\udfffb'", "'é'", "'e\\u0301'", "'\\U0001f600'", "'\\u202e'", "'\\ufffd'", "'\\ufeffa'"),
    *("'<|end|>'", "'</s>'", "'[bold]'", "'{0}'", "'%s'", "'a' * 100_000", "'-'", "'--help'", "'../..'", "'/dev/null'"),
)
SEQUENCES = (
    *("[]", "()", "[3]", "(3, 5)", "['a']", "('a', 'b')", "[None]", "[True]", "[3.0]", "[[3]]", "[[]]", "['']"),
    *("{'a'}", "frozenset({3})", "set()", "{}", "{'a': 1}", "{3: 3}", "range(3)", "range(0)", "iter([3, 5])"),
    *("(x for x in [3, 5])", "map(int, '35')", "np.array([])", "np.array([3, 5])", "np.array([3.0, 5.0])"),
    *("np.array([[3, 5]])", "np.array(['a'])", "np.array([3, None], dtype=object)", "torch.tensor([3, 5])"),
    *("torch.tensor([])", "torch.tensor([[3, 5]])", "torch.tensor([0.5])", "torch.zeros(0, dtype=torch.int64)"),
    *("torch.zeros(2, 3, 4)", "[np.int64(3)]", "[torch.tensor(3)]", "[-1]", "[10**30]", "[b'a']", "['a', 3]"),
)
OTHERS = (
    *("None", "b''", "b'ab'", "bytearray(b'ab')", "memoryview(b'ab')", "Path('.')", "...", "NotImplemented"),
    *("object()", "int", "str", "lambda: 3", "partial(int)", "SimpleNamespace(max_tokens=3)", "SamplingParams()"),
    *("SamplingParams", "ValueError('a')", "slice(3)", "print", "type(None)"),
)
ALL = (WHOLE, REAL, SCALARS, TEXTS, SEQUENCES, OTHERS)


def odd(rng: Random, kinds: Sequence[Sequence[str]] = ALL) -> str:
    """Return the source of an odd value: first its kind, then the value, so that small kinds count as much."""
    return rng.choice(rng.choice(kinds))


def value(source: str, **names: object) -> Any:
    """Return what source stands for, each time anew."""
    return eval(source, NAMES | names)


def odd_text(rng: Random, alphabet: str = "ab01 ()=,.|-_\n\x00é\u4e2d\U0001f600\ud800\"'\\[]{}<>") -> str:
    """Return a short random text."""
    return "".join(rng.choice(alphabet) for _ in range(rng.choice((1, 2, 3, 5, 8, 20))))


def mutated(rng: Random, data: bytes) -> bytes:
    """Return bytes with something cut, doubled, flipped or put in, once or a few times."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at, length = rng.randrange(len(data) + 1), rng.choice((1, 2, 7, 40, len(data)))
        piece = data[at : at + length]
        kind = rng.choice(("cut", "drop", "double", "flip", "insert", "swap"))
        if kind == "cut":
            data = data[:at]
        elif kind == "drop":
            data = data[:at] + data[at + length :]
        elif kind == "double":
            data = data[:at] + piece + data[at:]
        elif kind == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        elif kind == "insert":
            data = (
                data[:at] + rng.choice((b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b'"', b"[", b"1e999")) + data[at:]
            )
        else:
            data = data[at:] + data[:at]
    return data
