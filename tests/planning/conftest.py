import pytest

from diffinstruct.planning import remembered


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch, tmp_path):
    """Each test counts for itself."""
    monkeypatch.setattr(remembered, "FOLDER", tmp_path / "footprints")
