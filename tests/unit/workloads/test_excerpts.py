from importlib.resources import files

import pytest

from kvatlas.core.errors import UnknownNameError
from kvatlas.workloads.excerpts import EXCERPT_NAMES, load_excerpt


@pytest.mark.parametrize("name", EXCERPT_NAMES)
def test_an_excerpt_is_real_and_names_its_source(name):
    trace = load_excerpt(name)
    assert trace.name == name and len(trace.requests) == 200 and trace.notes == ()
    assert " at " in trace.source and trace.licence in ("CC-BY-4.0", "Apache-2.0")
    assert 60 < trace.duration_s < 75


def test_the_mooncake_excerpt_shares_prefixes_and_the_azure_one_has_none():
    assert load_excerpt("mooncake-conversation").shared_fraction == pytest.approx(0.058, abs=0.001)
    assert load_excerpt("azure-conv").shared_fraction == 0.0


def test_licences_and_sources_lie_beside_the_data():
    data = files("kvatlas.workloads") / "data"
    readme = (data / "README.md").read_text(encoding="utf-8")
    for file in (
        "azure-conv-200.csv",
        "mooncake-conversation-200.jsonl",
        "LICENSE.azure-ccby4",
        "LICENSE.mooncake-apache2",
    ):
        assert (data / file).is_file() and file in readme


def test_an_unknown_excerpt_is_refused():
    with pytest.raises(UnknownNameError, match="unknown trace excerpt 'azure-con'; did you mean 'azure-conv'"):
        load_excerpt("azure-con")
    with pytest.raises(UnknownNameError, match="known: azure-conv, mooncake-conversation"):
        load_excerpt("zzz")
