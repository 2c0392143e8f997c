import pytest

from unimed import io
from unimed.errors import UserError


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    io.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        io.write_json(path, {"a": object()})
    with pytest.raises(UnicodeEncodeError):
        io.write_text(path, "\ud800")
    assert io.read_json(path) == {"a": 1}
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_folder_leaves_the_old_one(tmp_path):
    folder = tmp_path / "model"
    io.write_folder(folder, lambda beside: (beside / "a").write_text("old"))

    def fails(beside):
        (beside / "a").write_text("new")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        io.write_folder(folder, fails)
    assert (folder / "a").read_text() == "old"
    io.verify_folder(folder)
    io.write_folder(folder, lambda beside: (beside / "b").write_text("new"))
    assert sorted(item.name for item in folder.iterdir()) == ["b", "manifest.json"]
    assert [item.name for item in tmp_path.iterdir()] == ["model"]


def test_two_writers_of_a_folder_do_not_meet(tmp_path):
    folder = tmp_path / "model"

    def fill(beside):
        (beside / "a").write_text("first")
        with pytest.raises(UserError, match=r"model: another process is writing it"):
            io.write_folder(folder, lambda other: (other / "b").write_text("second"))

    io.write_folder(folder, fill)
    assert sorted(item.name for item in folder.iterdir()) == ["a", "manifest.json"]
    killed = tmp_path / ".model.partial"  # what a killed process leaves
    (killed / "part").mkdir(parents=True)
    (killed / "c").write_text("cut off")
    io.write_folder(folder, lambda beside: (beside / "b").write_text("next"))
    assert sorted(item.name for item in folder.iterdir()) == ["b", "manifest.json"]
    assert [item.name for item in tmp_path.iterdir()] == ["model"]


def test_what_changed_in_a_folder_is_named(tmp_path):
    folder = tmp_path / "model"
    io.write_folder(folder, lambda beside: (beside / "weights").write_text("12345"))
    (folder / "weights").write_text("12346")
    with pytest.raises(UserError, match=r"weights.*sha256"):
        io.verify_folder(folder)
    (folder / "weights").write_text("123")
    with pytest.raises(UserError, match=r"weights has 3 bytes, 5 were written"):
        io.verify_folder(folder)


def test_reading_what_is_not_there_or_not_json(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        io.read_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        io.read_json(tmp_path / "bad.json")
