"""The folder of a search: one description, results that are whole, and no folder of others."""

import pytest

from restuning._errors import TrainingError
from restuning.search.folder import SearchFolder


def test_starting_over_removes_the_folder_of_a_search_and_no_other(tmp_path):
    ours = tmp_path / "ours"
    SearchFolder(ours, {"a": 1}, file="grid.json", what="another").write({"x": 1}, "row")
    again = SearchFolder(ours, {"a": 2}, file="grid.json", what="another", resume=False)
    assert not again.has("row")
    photos = tmp_path / "choice"
    photos.mkdir()
    (photos / "cat.jpg").write_bytes(b"mine")
    with pytest.raises(TrainingError, match="not left by a search"):
        SearchFolder(photos, {"a": 1}, file="grid.json", what="another", resume=False)
    (tmp_path / "link").symlink_to(ours)
    with pytest.raises(TrainingError, match="a link"):
        SearchFolder(tmp_path / "link", {"a": 1}, file="grid.json", what="another", resume=False)
    assert (photos / "cat.jpg").exists()
    assert (ours / "grid.json").exists()
