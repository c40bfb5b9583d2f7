import pytest
from tests.unit.reports.building import small_file

from kvatlas.reports.page import write_report


@pytest.fixture(scope="session")
def records_path(tmp_path_factory):
    return small_file(tmp_path_factory.mktemp("records") / "records.duckdb")


@pytest.fixture(scope="session")
def report(records_path, tmp_path_factory):
    """The page of the small file, written once: drawing nine figures takes seconds."""
    return write_report(records_path, tmp_path_factory.mktemp("report") / "new" / "out")
