import os
import sysconfig
from pathlib import Path

import pytest

from tide_mega.data.prepare.inputs import describe_links, find_inputs
from tide_mega.errors import ConfigError


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
    with pytest.raises(ConfigError, match=r"if it is plain text as it stands, pass suffixes=\[\.py\]"):
        find_inputs([str(tmp_path / "a.py")], [])


def test_every_suffix_of_the_field_is_read_plain_and_compressed(tmp_path: Path) -> None:
    kinds = {"txt": "text", "jsonl": "jsonl", "ndjson": "jsonl", "json": "jsonl", "md": "text"}
    compressions = ("", ".gz", ".zst", ".xz", ".bz2")
    wanted = {f"a.{suffix}{end}": kind + end for suffix, kind in kinds.items() for end in compressions}
    wanted["A.JSON.GZ"] = "jsonl.gz"
    for name in (*wanted, "b.parquet", "b.parquet.gz", "c.csv.gz"):
        write(tmp_path / name)
    found = find_inputs([str(tmp_path)], [".md"])
    assert {Path(f.path).name: f.kind for f in found.files} == {**wanted, "b.parquet": "parquet"}
    assert found.ignored == {".gz": 2}


def test_json_is_plain_text_where_suffixes_says_so(tmp_path: Path) -> None:
    write(tmp_path / "a.json")
    assert [f.kind for f in find_inputs([str(tmp_path)], [".json"]).files] == ["text"]


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("a.csv", "pass suffixes=[.csv]"),
        ("a.py.gz", "pass suffixes=[.py]"),
        ("a.GZ", "rename it to a.txt.GZ"),
        ("README", "rename it to README.txt"),
    ],
)
def test_another_suffix_is_refused_with_what_is_read(tmp_path: Path, name: str, advice: str) -> None:
    with pytest.raises(ConfigError) as raised:
        find_inputs([str(write(tmp_path / name))], [])
    assert ".json, .jsonl, .ndjson, .txt, each as it is or .gz, .zst, .xz, .bz2, and .parquet" in str(
        raised.value
    )
    assert str(raised.value).endswith(advice)


@pytest.mark.parametrize("suffix", [".gz", ".md.gz", ".ZST"])
def test_a_compression_is_no_suffix_of_text(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / "a.md.gz")
    with pytest.raises(
        ConfigError, match=r"a compression: name what stands before it, as in suffixes=\[\.md\]"
    ):
        find_inputs([str(tmp_path)], [suffix])


def test_an_input_that_is_no_file_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "link.txt").symlink_to("gone")
    os.mkfifo(tmp_path / "pipe.txt")
    for name, reason in {
        "link.txt": "is a link to what does not exist",
        "pipe.txt": "is a named pipe: write its content to a file",
        "x" * 300: "cannot be read: File name too long",
    }.items():
        with pytest.raises(ConfigError, match=reason):
            find_inputs([str(tmp_path / name)], [])


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


def test_links_that_were_followed_are_named_with_where_they_lead(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    write(folder / "sub" / "own.txt")
    for name in ("e/a.txt", "e/x.bin", "f/b\n.txt", "f/c.txt"):
        write(tmp_path / name)
    assert find_inputs([str(folder)], []).links == []
    (folder / "folder").symlink_to(tmp_path / "e")
    (folder / "sub" / "file.txt").symlink_to("../../f/b\n.txt")
    for name, target in {
        "not_read": "../e/x.bin",
        "broken.txt": "gone",
        ".hidden.txt": "../f/c.txt",
        ".hidden": "../f",
        "sub/again": "..",
    }.items():
        (folder / name).symlink_to(target)
    found = find_inputs([str(folder)], [])
    assert [file.name for file in found.files if not file.problem] == [
        "d/folder/a.txt", "d/sub/file.txt", "d/sub/own.txt",
    ]  # fmt: skip
    assert found.links == [f"d/folder -> {tmp_path / 'e'}", "d/sub/file.txt -> ../../f/b\\n.txt"]
    assert describe_links([str(i) for i in range(12)]) == (
        "links followed: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"
    )


def test_stdlib_is_the_running_pythons_source_without_packages() -> None:
    names = [file.name for file in find_inputs(["stdlib"], []).files]
    assert "stdlib/os.py" in names
    assert "stdlib/json/decoder.py" in names
    assert all(name.endswith(".py") for name in names)
    assert not any("site-packages" in name or "dist-packages" in name for name in names)
    assert sum(f.size for f in find_inputs(["stdlib"], []).files) > 5e6
    assert Path(sysconfig.get_paths()["stdlib"], "os.py").is_file()
