import sysconfig
from pathlib import Path

import pytest

from tide_mega.config.errors import ConfigError
from tide_mega.data.inputs import find_inputs


def write(path: Path, content: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def test_folders_are_read_recursively_in_sorted_order_and_inputs_in_the_given_one(tmp_path: Path) -> None:
    for name in ("d/b.txt", "d/a/z.jsonl", "d/a.txt", "d/c.parquet", "d/B.TXT", "d/e.jsonl.zst", "z.txt"):
        write(tmp_path / name)
    found = find_inputs([str(tmp_path / "z.txt"), str(tmp_path / "d")], [])
    assert [file.name for file in found.files] == [
        "z.txt", "d/B.TXT", "d/a/z.jsonl", "d/a.txt", "d/b.txt", "d/c.parquet", "d/e.jsonl.zst",
    ]  # fmt: skip
    assert [file.kind for file in found.files] == [
        "text", "text", "jsonl", "text", "text", "parquet", "jsonl.zst",
    ]  # fmt: skip


def test_empty_and_ignored_files_are_counted(tmp_path: Path) -> None:
    for name, content in {
        "a.txt": "x",
        "b.txt": "",
        "c.jsonl": "",
        "d.py": "x",
        "e.py": "x",
        "README": "x",
    }.items():
        write(tmp_path / name, content)
    found = find_inputs([str(tmp_path)], [])
    assert [file.name for file in found.files] == [f"{tmp_path.name}/a.txt"]
    assert found.empty == [f"{tmp_path.name}/b.txt", f"{tmp_path.name}/c.jsonl"]
    assert found.ignored == {"(none)": 1, ".py": 2}


def test_further_suffixes_are_plain_text(tmp_path: Path) -> None:
    write(tmp_path / "a.py")
    write(tmp_path / "b.rst")
    assert [f.kind for f in find_inputs([str(tmp_path)], [".py", ".rst"]).files] == ["text", "text"]
    with pytest.raises(ConfigError, match=r"pass suffixes=\[\.py\]"):
        find_inputs([str(tmp_path / "a.py")], [])


def test_what_does_not_exist_or_holds_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a file nor a folder"):
        find_inputs([str(tmp_path / "none")], [])
    with pytest.raises(ConfigError, match="no file with a suffix"):
        find_inputs([str(tmp_path)], [])


def test_the_same_file_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "d" / "a.txt")
    with pytest.raises(ConfigError, match="a second time"):
        find_inputs([str(tmp_path), str(path)], [])


def test_linked_folders_are_followed_and_loops_end(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "a.txt")
    write(tmp_path / "d" / "b.txt")
    (tmp_path / "d" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "d")
    assert [f.name for f in find_inputs([str(tmp_path / "d")], []).files] == ["d/b.txt", "d/link/a.txt"]


def test_stdlib_is_the_running_pythons_source_without_packages() -> None:
    names = [file.name for file in find_inputs(["stdlib"], []).files]
    assert "stdlib/os.py" in names
    assert "stdlib/json/decoder.py" in names
    assert all(name.endswith(".py") for name in names)
    assert not any("site-packages" in name or "dist-packages" in name for name in names)
    assert sum(f.size for f in find_inputs(["stdlib"], []).files) > 5e6
    assert Path(sysconfig.get_paths()["stdlib"], "os.py").is_file()
