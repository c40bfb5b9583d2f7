import pytest

from kvatlas.core.errors import TraceError
from kvatlas.workloads.azure import read_azure

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


@pytest.fixture
def read(tmp_path):
    def read(text):
        (tmp_path / "x.csv").write_bytes(text.encode())
        return read_azure(tmp_path / "x.csv")

    return read


def test_seven_digits_are_exact_and_the_last_line_needs_no_end(read):
    trace = read(HEADER + "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:46.6805901,396,109")
    assert [r.arrival_s for r in trace.requests] == [0.0, 1e-7]
    assert [(r.prompt_tokens, r.output_tokens, r.number) for r in trace.requests] == [(374, 44, 0), (396, 109, 1)]
    assert (trace.notes, trace.name) == ((), "x")


def test_midnight_windows_lines_zones_and_column_order(read):
    trace = read(
        "\ufeffGeneratedTokens,TIMESTAMP,ContextTokens\r\n"
        "1,2023-12-31 23:59:59.5,10\r\n"
        "\r\n"
        '2,"2024-01-01 01:00:00+01:00",20\r\n'
        "3,2024-01-01T00:00:01Z,30\r\n"
    )
    assert [r.arrival_s for r in trace.requests] == [0.0, 0.5, 1.5]
    assert [r.prompt_tokens for r in trace.requests] == [10, 20, 30]


def test_an_unsorted_file_is_sorted_with_a_note(read):
    trace = read(HEADER + "2023-11-16 18:15:48,3,1\n2023-11-16 18:15:46,1,1\n2023-11-16 18:15:47,2,1\n")
    assert [r.prompt_tokens for r in trace.requests] == [1, 2, 3]
    assert [r.number for r in trace.requests] == [1, 2, 0]
    assert trace.notes == ("the file was not sorted by arrival (1 places); it was sorted",)


@pytest.mark.parametrize(
    ("line", "value", "expected"),
    [
        ("yesterday,1,1", "'yesterday'", "TIMESTAMP like 2023"),
        ("2023-13-16 18:15:46,1,1", "'2023-13-16 18:15:46'", "TIMESTAMP like 2023"),
        (",1,1", "''", "TIMESTAMP like 2023"),
        ("2023-11-16 18:15:46,1.5,1", "'1.5'", "ContextTokens as a whole number"),
        ("2023-11-16 18:15:46,1,0", "'0'", "GeneratedTokens as a whole number from 1"),
        ("2023-11-16 18:15:46,-1,1", "'-1'", "ContextTokens as a whole number"),
        ("2023-11-16 18:15:46,1e3,1", "'1e3'", "ContextTokens as a whole number"),
        ("2023-11-16 18:15:46,²,1", "'²'", "ContextTokens as a whole number"),
        ("2023-11-16 18:15:46,1," + "9" * 5000, "'9999", "GeneratedTokens as a whole number"),
        ("2023-11-16 18:15:46,1", "'2023-11-16 18:15:46,1'", "3 values separated by commas"),
        ("2023-11-16 18:15:46,1,1,1", "'2023-11-16 18:15:46,1,1,1'", "3 values"),
    ],
)
def test_a_malformed_line_is_named(read, line, value, expected):
    with pytest.raises(TraceError) as caught:
        read(HEADER + "2023-11-16 18:15:46,1,1\n" + line + "\n")
    message = str(caught.value)
    assert "x.csv, line 3: got " + value in message
    assert expected in message and "mend or remove the line" in message
    assert len(message) < 400


def test_a_header_without_the_columns_is_refused(read):
    with pytest.raises(TraceError, match="line 1: got 'TIMESTAMP,a,b', expected a header with the columns"):
        read("TIMESTAMP,a,b\n1,2,3\n")


def test_a_header_alone_is_refused(read):
    with pytest.raises(TraceError, match="no requests"):
        read(HEADER)
