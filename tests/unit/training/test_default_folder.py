"""A run without `--out` has a folder of its own, whatever began in the same second."""

from restuning.data import Data
from restuning.training.run import default_folder


def test_runs_of_one_second_have_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: "20261129-215321")
    data = Data("photos", [], None, None, ["a", "b"])
    made = []
    for _ in range(3):
        made.append(default_folder(data, "linear"))
        made[-1].mkdir(parents=True)
    first = "photos-linear-20261129-215321"
    assert [folder.name for folder in made] == [first, f"{first}-2", f"{first}-3"]
