"""`overwrite=true`, and what a preparation removes: nothing that it did not make, and nothing too early."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.data.test_prepare import contents, killed_at
from tide_mega.data.index import DatasetIndex
from tide_mega.data.prepare.options import PrepareOptions
from tide_mega.data.prepare.pipeline import prepare
from tide_mega.data.tokenizer import load_tokenizer
from tide_mega.errors import ConfigError, DataError

Run = Callable[[PrepareOptions], DatasetIndex]


@pytest.mark.parametrize("note", [None, b"{}", b'{"prepare": "soup"}'])
def test_a_folder_with_names_like_ours_loses_nothing(
    options: PrepareOptions, documents: list[str], run: Run, note: bytes | None
) -> None:
    out = Path(options.out)
    (out / "units").mkdir(parents=True)
    for name in ("index.json", "tokenizer.json", "train-000000-000.tar", "units/000000.json"):
        (out / name).write_text("precious")
    (out / ".index.json.tmp-7").write_text("precious")
    if note is not None:
        (out / "prepare.json").write_bytes(note)
    before = contents(out)
    with pytest.raises(ConfigError, match=r"another origin \(.*index.json.*never removed; name a new folder"):
        run(replace(options, overwrite=True))
    with pytest.raises(ConfigError, match="another origin" if note is None else r"Name another folder$"):
        run(options)
    assert contents(out) == before


@pytest.mark.parametrize("name", ["thesis.tex", "train.tar", "units/notes.txt", "replacement/thesis.tex"])
def test_a_dataset_with_another_file_in_it_loses_nothing(
    options: PrepareOptions, documents: list[str], run: Run, name: str
) -> None:
    run(options)
    (Path(options.out) / name).parent.mkdir(exist_ok=True)
    (Path(options.out) / name).write_text("precious")
    before = contents(options.out)
    with pytest.raises(ConfigError, match=rf"another origin \({name.split('/')[0]}\)"):
        run(replace(options, overwrite=True))
    assert contents(options.out) == before


def test_a_link_in_a_dataset_is_no_work_of_ours(
    options: PrepareOptions, documents: list[str], run: Run, tmp_path: Path
) -> None:
    run(options)
    elsewhere = tmp_path / "shared.json"
    (Path(options.out) / "tokenizer.json").rename(elsewhere)
    (Path(options.out) / "tokenizer.json").symlink_to(elsewhere)
    with pytest.raises(ConfigError, match=r"another origin \(tokenizer.json\)"):
        run(replace(options, overwrite=True, seed=5))


def test_cleaning_up_removes_only_names_that_a_preparation_makes(
    options: PrepareOptions, documents: list[str], run: Run
) -> None:
    run(options)
    out = Path(options.out)
    (out / "units").mkdir()
    ours = ("train-000099-000.tar", "units/000007.json", "units/000007.counts.npy", ".counts.npy.tmp-12")
    theirs = ("backup.tar", "train-old.tar", "units/notes.txt", ".thesis.tex.tmp-12", ".counts.npy.tmp-mine")
    for name in (*ours, *theirs):
        (out / name).write_text("x")
    run(options)
    assert [name for name in (*ours, *theirs) if (out / name).exists()] == list(theirs)


def test_a_datasets_own_tokenizer_may_be_the_source(
    options: PrepareOptions, documents: list[str], run: Run
) -> None:
    run(options)
    own = load_tokenizer(options.out).fingerprint
    for source in (options.out, f"{options.out}/tokenizer.json"):
        anew = replace(options, overwrite=True, tokenizer=source, seed=options.seed + len(source))
        assert run(anew).tokenizer.fingerprint == own == load_tokenizer(options.out).fingerprint


def test_the_old_stands_until_the_new_is_whole_and_what_was_done_is_used(
    options: PrepareOptions, documents: list[str], run: Run, tmp_path: Path
) -> None:
    run(options)
    before = contents(options.out)
    anew = replace(options, overwrite=True, tokenizer=options.out, seed=5, unit_bytes=1500)
    (tmp_path / "in" / "020.txt").write_bytes(b"\xff")
    for _ in range(2):
        with pytest.raises(DataError, match="not UTF-8"):
            run(anew)
        left = contents(options.out)
        assert {name: left[name] for name in left if not name.startswith("replacement/")} == before
    (tmp_path / "in" / "020.txt").write_text("corrected")
    lines: list[str] = []
    prepare(anew, log=lines.append, progress=False)
    assert f"what {options.out} holds stays" in lines[0]
    assert "continuing: " in lines[1]
    fresh = replace(anew, out=str(tmp_path / "fresh"), overwrite=False)
    run(fresh)
    assert contents(options.out) == contents(fresh.out)


def test_a_replacement_with_other_options_is_begun_anew(
    options: PrepareOptions, documents: list[str], run: Run, tmp_path: Path
) -> None:
    run(options)
    (tmp_path / "in" / "020.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        run(replace(options, overwrite=True, seed=5, unit_bytes=1500))
    changed = replace(options, overwrite=True, seed=6, on_bad_file="skip")
    run(changed)
    run(replace(changed, out=str(tmp_path / "fresh")))
    assert contents(options.out) == contents(tmp_path / "fresh")


@pytest.mark.slow
def test_killed_at_any_file_a_whole_dataset_is_left_and_the_same_command_ends_it(
    options: PrepareOptions, run: Run, tmp_path: Path
) -> None:
    for number in range(6):
        (tmp_path / "in" / f"{number}.txt").write_text(f"document {number} says: the quick brown fox " * 9)
    old = replace(options, sample_tokens=64, shard_tokens=64, tokenizer="bpe:512")
    new = replace(options, overwrite=True)
    run(replace(new, out=str(tmp_path / "expected")))
    expected = contents(tmp_path / "expected")
    run(old)
    replaced = contents(options.out)
    kills = moved = 0
    while True:
        out = tmp_path / f"killed{kills}"
        run(replace(old, out=str(out)))
        if not killed_at(replace(new, out=str(out)), kills):
            break
        left = contents(out)
        is_old_whole = replaced.items() <= left.items()
        if not is_old_whole:
            moved += 1
            whole = {name.removeprefix("replacement/"): content for name, content in left.items()}
            assert expected.keys() <= whole.keys(), f"killed around rename {kills / 2}"
            assert (out / "replacement" / "index.json").exists() or left["index.json"] == expected[
                "index.json"
            ]
        run(replace(new, out=str(out), overwrite=is_old_whole))
        assert contents(out) == expected, f"killed around rename {kills / 2}"
        kills += 1
    assert moved >= 10
    assert kills > moved + 10
