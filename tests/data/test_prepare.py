import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tide_mega import files
from tide_mega.data.frequency import DecileTable
from tide_mega.data.index import DatasetIndex
from tide_mega.data.prepare.folder import STATE_FILE, locked
from tide_mega.data.prepare.options import PrepareOptions
from tide_mega.data.prepare.pipeline import prepare
from tide_mega.data.prepare.worker import split_of
from tide_mega.data.tokenizer import HFTokenizer, load_tokenizer
from tide_mega.errors import ConfigError, DataError
from tide_mega.jobs.lock import FolderTakenError

Run = Callable[[PrepareOptions], DatasetIndex]
ReadSplit = Callable[[Path, str], tuple[np.ndarray, list[int]]]


def contents(folder: str | Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("unit_bytes", [0, 1, 1500])
def test_each_split_is_its_documents_in_order_with_eos(
    options: PrepareOptions,
    documents: list[str],
    tokenizer: HFTokenizer,
    run: Run,
    read_split: ReadSplit,
    unit_bytes: int,
) -> None:
    index = run(replace(options, unit_bytes=unit_bytes))
    for split in ("train", "validation"):
        chosen = [text for text in documents if split_of(text, options.seed, 0.25) == split]
        encoded = [[*ids.tolist(), tokenizer.eos_id] for ids in tokenizer.encode_batch(chosen)]
        tokens, ends = read_split(Path(options.out), split)
        assert tokens.tolist() == [token for ids in encoded for token in ids]
        assert ends == np.cumsum([len(ids) for ids in encoded]).tolist()
        assert (index.splits[split].tokens, index.splits[split].documents) == (len(tokens), len(chosen))
        assert 3 <= len(chosen) <= 37
    assert index.totals.documents == 40


def test_counts_and_deciles_are_of_the_training_split(
    options: PrepareOptions, documents: list[str], tokenizer: HFTokenizer, run: Run, read_split: ReadSplit
) -> None:
    index = run(replace(options, unit_bytes=1000))
    out = Path(options.out)
    counts = np.load(out / "counts.npy")
    assert counts.dtype == np.uint64
    expected = np.bincount(read_split(out, "train")[0], minlength=tokenizer.vocab_size)
    assert np.array_equal(counts, expected)
    table = DecileTable.load(out)
    assert np.array_equal(table.bin_of_type, DecileTable.from_counts(expected, tokenizer).bin_of_type)
    assert table.bin_of_type[tokenizer.eos_id] == -1
    assert load_tokenizer(out, options.eos_token).fingerprint == index.tokenizer.fingerprint


@pytest.mark.slow
def test_output_is_the_same_for_any_number_of_workers(
    options: PrepareOptions, documents: list[str], run: Run, tmp_path: Path
) -> None:
    outputs = []
    for workers in (1, 2):
        out = str(tmp_path / f"out{workers}")
        run(replace(options, out=out, unit_bytes=4000, workers=workers, tokenizer="bpe:512"))
        outputs.append(contents(out))
    assert outputs[0] == outputs[1]
    assert sorted(name for name in outputs[0] if not name.endswith(".tar")) == [
        "counts.npy", "deciles.json", "deciles.npy", "index.json", "prepare.json", "tokenizer.json",
    ]  # fmt: skip


def test_the_split_of_a_document_does_not_depend_on_order_or_neighbours(
    options: PrepareOptions, documents: list[str], run: Run, tmp_path: Path
) -> None:
    index = run(options)
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for i, text in enumerate(reversed(documents)):
        (renamed / f"{i:03d}.txt").write_text(text)
    again = run(replace(options, inputs=[str(renamed)], out=str(tmp_path / "out2")))
    for split in index.splits:
        assert (again.splits[split].tokens, again.splits[split].documents) == (
            index.splits[split].tokens,
            index.splits[split].documents,
        )
    other_seed = {split_of(text, 99, 0.25) + text for text in documents}
    assert other_seed != {split_of(text, options.seed, 0.25) + text for text in documents}


def killed_at(options: PrepareOptions, nth: int) -> bool:
    """Runs `prepare` in a child that is killed by SIGKILL around its nth rename; whether it was killed.

    An even nth kills before a rename, an odd one just after it.
    """

    def child() -> None:
        renames = 0
        rename = Path.replace

        def rename_or_die(self: Path, target: Path) -> Path:
            nonlocal renames
            if renames == nth // 2 and nth % 2 == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            result = rename(self, target)
            if renames == nth // 2:
                os.kill(os.getpid(), signal.SIGKILL)
            renames += 1
            return result

        files.Path.replace = rename_or_die  # type: ignore[method-assign]
        prepare(options, log=lambda line: None, progress=False)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["given", "bpe:512"])
def test_killed_at_any_file_it_goes_on_to_the_same_output(
    options: PrepareOptions, documents: list[str], run: Run, tmp_path: Path, tokenizer: str
) -> None:
    options = replace(options, unit_bytes=6000, shard_tokens=2048, sample_tokens=512)
    if tokenizer != "given":
        options = replace(options, tokenizer=tokenizer)
    run(options)
    expected = contents(options.out)
    kills = 0
    while killed_at(replace(options, out=str(tmp_path / f"killed{kills}")), kills):
        out = tmp_path / f"killed{kills}"
        run(replace(options, out=str(out)))
        assert contents(out) == expected, f"killed around rename {kills / 2}"
        kills += 1
    assert kills > 20


def test_killed_again_and_again_every_run_makes_progress(
    options: PrepareOptions, documents: list[str], run: Run, tmp_path: Path
) -> None:
    options = replace(options, unit_bytes=3000)
    run(options)
    out = str(tmp_path / "again")
    runs = 0
    while killed_at(replace(options, out=out), 13):
        runs += 1
        assert runs < 40
    assert runs >= 3
    assert contents(out) == contents(options.out)


def test_a_finished_preparation_returns_at_once(
    options: PrepareOptions, documents: list[str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = run(options)
    before = {path: path.stat().st_mtime_ns for path in Path(options.out).iterdir()}
    lines: list[str] = []
    assert prepare(options, log=lines.append, progress=False) == index
    assert "nothing to do" in lines[0]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_done_units_are_used_again_and_damaged_ones_are_not(
    options: PrepareOptions, documents: list[str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(options, unit_bytes=3000)
    with monkeypatch.context() as patched:
        patched.setattr(
            "tide_mega.data.prepare.pipeline.merge", lambda *args: (_ for _ in ()).throw(RuntimeError("stop"))
        )
        with pytest.raises(RuntimeError, match="stop"):
            run(options)
    out = Path(options.out)
    shards = sorted(out.glob("train-*.tar"))
    shards[0].write_bytes(shards[0].read_bytes()[:-512])
    records = sorted((out / "units").glob("*.json"))
    records[-1].write_bytes(b"\xff{")
    units = len(records)
    lines: list[str] = []
    prepare(options, log=lines.append, progress=False)
    assert f"continuing: {units - 2} of {units}" in lines[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 5),
        ("validation_fraction", 0.5),
        ("sample_tokens", 32),
        ("text_key", "body"),
        ("tokenizer", "bpe:600"),
    ],
)
def test_a_changed_option_is_refused_by_name_unless_overwritten(
    options: PrepareOptions, documents: list[str], run: Run, tmp_path: Path, name: str, value: object
) -> None:
    run(options)
    changed = replace(options, **{name: value})
    with pytest.raises(ConfigError, match=f"{name} was .* and is now .*overwrite=true"):
        run(changed)
    run(replace(changed, overwrite=True))
    fresh = replace(changed, out=str(tmp_path / "fresh"))
    run(fresh)
    assert contents(options.out) == contents(fresh.out)


def test_changed_input_is_refused_when_complete_and_taken_up_when_not(
    options: PrepareOptions, documents: list[str], run: Run, tmp_path: Path
) -> None:
    (tmp_path / "in" / "020.txt").write_bytes(b"\xff")
    options = replace(options, unit_bytes=1500)
    with pytest.raises(DataError, match=r"in/020.txt is not UTF-8"):
        run(options)
    done = len(list((Path(options.out) / "units").glob("*.json")))
    assert done > 2
    (tmp_path / "in" / "020.txt").write_text("corrected")
    lines: list[str] = []
    prepare(options, log=lines.append, progress=False)
    assert f"continuing: {done} of" in lines[0]
    (tmp_path / "in" / "021.txt").write_text("changed later")
    with pytest.raises(ConfigError, match="input files are other ones"):
        run(options)


@pytest.mark.parametrize("content", [b"\xff", b"{", b"[]", b"null", b'{"options": 3, "inputs": ""}'])
def test_a_damaged_note_of_what_was_prepared_is_refused_unless_overwritten(
    options: PrepareOptions, documents: list[str], run: Run, content: bytes
) -> None:
    run(options)
    (Path(options.out) / STATE_FILE).write_bytes(content)
    with pytest.raises(ConfigError, match=r"is damaged .* pass overwrite=true to prepare it anew"):
        run(options)
    run(replace(options, overwrite=True))


def test_a_folder_with_other_files_is_left_alone(
    options: PrepareOptions, documents: list[str], run: Run
) -> None:
    Path(options.out).mkdir()
    (Path(options.out) / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"another origin \(thesis.tex\)|of another origin"):
            run(replace(options, overwrite=overwrite))
    assert (Path(options.out) / "thesis.tex").read_text() == "precious"


def test_two_preparations_of_one_folder_exclude_each_other(
    options: PrepareOptions, documents: list[str], run: Run
) -> None:
    with locked(Path(options.out)), pytest.raises(FolderTakenError, match="is in use by a preparation"):
        run(options)
    run(options)


BAD = {
    "binary.txt": (b"\x7fELF\x00\x01", "NUL byte at offset 4"),
    "latin1.txt": ("naïve".encode("latin-1"), "byte 0xef at offset 2"),
    "lines.jsonl": (b'{"text": "good line"}\n{"text": \n', "not JSON"),
    "keys.jsonl": (b'{"body": "x"}\n', "its keys are 'body'"),
    "cut.jsonl.zst": (b"\x28\xb5\x2f\xfd\x04", "cut off"),
    "cut.parquet": (b"PAR1", "not a readable parquet"),
}


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_an_error_that_names_the_file(
    options: PrepareOptions, documents: list[str], run: Run, tmp_path: Path, name: str, workers: int
) -> None:
    content, reason = BAD[name]
    (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(DataError, match="pass on_bad_file=skip") as raised:
        run(replace(options, workers=workers, unit_bytes=4000))
    assert f"in/{name}" in str(raised.value)
    assert reason in str(raised.value)
    assert not (Path(options.out) / "index.json").exists()
    assert not [path for path in Path(options.out).iterdir() if files.unfinished(path.name)]


def test_bad_input_can_be_skipped_and_is_then_counted_and_named(
    options: PrepareOptions, documents: list[str], run: Run, tmp_path: Path
) -> None:
    for name, (content, _) in BAD.items():
        (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(DataError):
        run(options)
    skipping = replace(options, on_bad_file="skip")
    index = run(skipping)
    assert index.totals.bad == 6
    assert index.totals.documents == 41  # and the good line
    named = {bad["source"].split("/")[1].split(":")[0]: bad["reason"] for bad in index.bad}
    assert set(named) == set(BAD)
    for name, (_, reason) in BAD.items():
        assert reason in named[name]
    assert run(skipping) == index
    with pytest.raises(DataError, match="left out 6 bad"):
        run(options)


def test_empty_files_and_documents_are_counted_and_not_written(
    options: PrepareOptions, documents: list[str], run: Run, tmp_path: Path, read_split: ReadSplit
) -> None:
    (tmp_path / "in" / "empty.txt").write_bytes(b"")
    (tmp_path / "in" / "a.jsonl").write_text('{"text": ""}\n{"text": "kept"}\n{"text": ""}\n')
    index = run(options)
    assert (index.totals.empty_files, index.totals.empty_documents, index.totals.documents) == (1, 2, 41)
    assert index.empty_files == ["in/empty.txt"]
    ends = [end for split in index.splits for end in np.diff([0, *read_split(Path(options.out), split)[1]])]
    assert len(ends) == 41
    assert min(ends) >= 2


def test_input_without_any_document_is_an_error(options: PrepareOptions, run: Run, tmp_path: Path) -> None:
    (tmp_path / "in" / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="no document: 1 empty documents"):
        run(options)


def test_validation_fraction_zero_holds_nothing_out(
    options: PrepareOptions, documents: list[str], run: Run
) -> None:
    index = run(replace(options, validation_fraction=0.0))
    assert (index.splits["train"].documents, index.splits["validation"].documents) == (40, 0)


def test_no_path_of_this_machine_is_in_the_output(
    options: PrepareOptions, documents: list[str], run: Run, tmp_path: Path
) -> None:
    run(options)
    for name, content in contents(options.out).items():
        assert str(tmp_path).encode() not in content, name
    assert json.loads((Path(options.out) / "prepare.json").read_text())["options"]["seed"] == options.seed


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("inputs", [], "inputs is empty"),
        ("on_bad_file", "ignore", "on_bad_file=ignore is unknown; use fail or skip"),
        ("validation_fraction", 1.0, "validation_fraction=1.0"),
        ("tokenizer", "bpe:x", "tokenizer=bpe:x"),
        ("tokenizer", "bpe:100", "at least 512"),
        ("tokenizer", "none.json", "does not exist"),
        ("sample_tokens", 0, "sample_tokens=0"),
        ("sample_tokens", 2**32, "below 2"),
        ("shard_tokens", 10, "shard_tokens=10 is below sample_tokens=64"),
        ("workers", -1, "workers=-1"),
        ("suffixes", ["py"], "use '.py'"),
    ],
)
def test_impossible_options_are_refused_before_anything_is_written(
    options: PrepareOptions, run: Run, name: str, value: object, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(replace(options, **{name: value}))
    assert not Path(options.out).exists()
