"""What tests of single parts share: the embedded backbone, a cache of their own, a server of S3."""

import pytest

import restuning
from s3 import serving


@pytest.fixture(scope="module")
def tiny():
    """The embedded backbone, whose sites are proved."""
    backbone = restuning.load_backbone("restuning-tiny")
    backbone.host()
    return backbone


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """The folder of indexes and mirrors, of this test alone; what is away is asked again without a pause."""
    monkeypatch.setenv("RESTUNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("restuning.data.remote.PAUSE", 0.0)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def s3_client():
    """The client of a server of S3 in this process, with an empty bucket."""
    with pytest.MonkeyPatch.context() as monkeypatch, serving(monkeypatch) as client:
        yield client
