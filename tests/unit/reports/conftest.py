import pytest
from tests.unit.reports.made_up import study_file

from kvatlas.reports.page import write_report


@pytest.fixture(scope="session")
def records_path(tmp_path_factory):
    return study_file(tmp_path_factory.mktemp("records") / "records.duckdb")


@pytest.fixture(scope="session")
def report(records_path, tmp_path_factory):
    """The page of the made-up study, written once: drawing every figure takes seconds."""
    return write_report(records_path, tmp_path_factory.mktemp("report") / "new" / "out")
