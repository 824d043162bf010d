"""Generates odd inputs for the commands: odd words, odd files, and folders with something wrong in them.

All are harmless: small, confined to the folder of their case, without a GPU or a network.
"""

import gzip
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tide_mega.config.help import describe
from tide_mega.config.schema import TideConfig

SMALL_RUN = (
    *("experiment=demo_tide", "model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=64"),
    *("model.num_attention_heads=4", "model.num_query_groups=2", "model.vocab_size=640", "memory=k2"),
    *("memory.owners=tensor", "data.seq_length=32", "data.num_workers=0", "trainer.precision=fp32"),
    *("trainer.global_batch_size=4", "trainer.micro_batch_size=2", "trainer.max_steps=2"),
    *("trainer.eval_every=0", "trainer.eval_sequences=4", "optim.warmup_steps=1", "checkpoint.every=1"),
    *("logging.every=1", "logging.diagnostics=false", "cluster.device=cpu", "cluster.threads=1"),
    "cluster.peak_tflops=1",
)
"""Overrides for a training of seconds."""
_TEXTS = (
    *(
        "",
        " ",
        "null",
        "007",
        "1e-4",
        "2024_10_01",
        "true",
        "off",
        "nan",
        "inf",
        "-1",
        "0",
        "1.5",
        "x",
        "a b",
    ),
    *(
        "a: b",
        "a=b",
        "a,b",
        "[a,b]",
        "[a",
        "{a: b}",
        "é",
        "日本語",
        "it's",
        '"',
        "'a'",
        "\\",
        "a\\,b",
        "#a",
        "%s",
    ),
    *(
        "~",
        "@",
        "-",
        "--",
        "..",
        ".",
        "a/b",
        "./a/",
        "a" * 300,
        "a\nb",
        "\t",
        "\x1b[0m",
        "\udcff",
        "???",
        "$HOME",
    ),
    *("${x}", "${model.name}", "${", "choice(a,b)", "range(1,3)", "f(x)", "*", "1:30", "0x10", "1_000"),
)
_NUMBERS = (
    "-1",
    "0",
    "1",
    "2",
    "3",
    "0.5",
    "nan",
    "inf",
    "1e400",
    "-0",
    "",
    "null",
    "x",
    "[1]",
    "true",
    "1_0",
    "9" * 30,
)
_FLAGS = (
    *(
        "-m",
        "--multirun",
        "--cfg",
        "--cfg job",
        "--cfg=x",
        "--info",
        "--info x",
        "--resolve",
        "--help",
        "-x",
        "--",
    ),
    *(
        "--package model",
        "--config-name x",
        "--config-dir x",
        "--config-path x",
        "--hydra-help",
        "--version",
        "-p",
    ),
    *("--experimental-rerun x", "--shell-completion", "--run", "--multirun=1", "-"),
)
_LEFT_ALONE = (
    "logging.wandb",
    "cluster.device",
    "trainer.max_steps",
    "trainer.max_tokens",
    "data.num_workers",
)
"""Keys whose values could access the network, start many processes, or train for long."""


@dataclass(frozen=True)
class Material:
    """Material shared by the cases; a case changes only copies."""

    text: Path
    """A folder of text files."""
    data: Path
    """The dataset prepared from them."""
    run: Path
    """A training on it."""


@dataclass(frozen=True)
class Case:
    """A command with its arguments."""

    command: str
    """`train`, or a module of the package or of tools/ with a `main`."""
    words: list[str]


def odd_words(rng: random.Random, folder: Path, material: Material) -> Case:
    """Give a training odd overrides and flags."""
    words = [*SMALL_RUN, f"data.path={material.data}", f"run.root={folder}/runs", "run.name=odd"]
    entries = [entry for entry in describe(TideConfig) if entry.key not in _LEFT_ALONE]
    for _ in range(rng.choice((1, 1, 1, 2))):
        entry = rng.choice(entries)
        is_text = "str" in entry.type_name
        # Half of the cases are about text keys, though most keys are not text.
        if not is_text and rng.random() < 0.4:
            entry = rng.choice([other for other in entries if "str" in other.type_name])
            is_text = True
        key, value = entry.key, rng.choice(_TEXTS if is_text else (*_NUMBERS, *_TEXTS))
        if rng.random() < 0.1:
            value = f"{value},{rng.choice(_TEXTS)}"
        if rng.random() < 0.15:
            key = rng.choice(
                (f"+{key}", f"++{key}", f"~{key}", key[:-1], f"{key}.x", key.upper(), "", f"@{key}")
            )
        words.insert(
            rng.randrange(3, len(words) + 1),
            rng.choice((f"{key}={value}", f"{key}={value}", key)[: 2 + (rng.random() < 0.05)]),
        )
    if rng.random() < 0.1:
        group = rng.choice(
            ("model", "memory", "optim", "experiment", "hydra/launcher", "hydra/sweeper", "nothing")
        )
        words.append(f"{group}={rng.choice(_TEXTS)}")
    if rng.random() < 0.25:
        at = rng.randrange(len(words) + 1)
        words[at:at] = rng.choice(_FLAGS).split(" ")
    return Case("train", words)


def odd_arguments(rng: random.Random, folder: Path, material: Material) -> Case:
    """Give a tool odd arguments."""
    out = f"out={folder}/out"
    command, words = rng.choice(
        (
            ("checkpoints", [rng.choice(("list", "verify", "diff")), f"path={material.run}"]),
            ("plot_run", [f"run={material.run}", out]),
            ("dashboard", [f"run={material.run}", f"json={folder}/board.json"]),
            ("analyze", [f"run={material.run}", out, "which=updates", "device=cpu"]),
            ("evaluate", [f"run={material.run}", out, "tasks=piqa", f"local={folder}", "device=cpu"]),
            ("export.__main__", [f"run={material.run}", out, "tables=int8", "step=2"]),
            ("prepare_data", [f"inputs={material.text}", out, "tokenizer=bpe:512", "workers=1"]),
            ("memory_plan", [f"data={material.data}", "tokens=64"]),
        )
    )
    keys = [word.partition("=")[0] for word in words if "=" in word]
    for _ in range(rng.choice((1, 1, 2))):
        key = rng.choice(
            (*keys, *keys, *keys, "seed", "batch", "text_key", "other", "x", "which", "source", "")
        )
        value = rng.choice(
            (*_TEXTS, f"{folder}", f"{folder}/none", f"{material.text}/0.txt", f"{folder}/{'a' * 300}")
        )
        words = [word for word in words if word.partition("=")[0] != key]
        words.append(rng.choice((f"{key}={value}",) * 8 + (key, f"--{key}", f"{key}.x={value}")))
    return Case(command, words)


def odd_files(rng: random.Random, folder: Path, _material: Material) -> Case:
    """Prepare text from odd files."""
    texts = folder / "texts"
    texts.mkdir(parents=True)
    for _number in range(rng.randint(1, 3)):
        _write_odd(rng, texts)
    if rng.random() < 0.6:
        (texts / "sound.txt").write_text(
            "The quick brown fox jumps over the lazy dog. " * 40, encoding="utf-8"
        )
    words = [f"inputs={rng.choice((texts, texts, next(texts.iterdir())))}", f"out={folder}/out", "workers=1"]
    words.append(
        f"tokenizer={rng.choice(('bpe:512', 'bpe:512', 'bpe:512', 'bpe:1', texts, next(texts.iterdir())))}"
    )
    more = (
        *("on_bad_file=skip", "suffixes=[.json,.x]", "text_key=b", "validation_fraction=0.5"),
        "sample_tokens=7",
    )
    words += [word for word in more if rng.random() < 0.25]
    return Case("prepare_data", words)


def _write_odd(rng: random.Random, folder: Path) -> None:
    sound = b'{"text": "one two three"}\n{"text": "four"}\n' * 20
    contents = (
        *(
            b"",
            b"\n",
            b"\xef\xbb\xbftext with a mark",
            b"\xff\xfe\x00",
            rng.randbytes(200),
            b"\x00" * 50,
            sound,
        ),
        *(
            b"\xef\xbb\xbf" + sound,
            b'{"text": 3}\n',
            b'{"other": "a"}\n',
            b"[1,2]\n",
            b"{\n",
            b'"a"\n',
            b"null\n",
        ),
        *(
            b'{"text": "\\ud800"}\n',
            b"[" * 100_000,
            b'{"text": ' + b"9" * 5000 + b"}\n",
            b"NaN\n",
            b'{"text": null}',
        ),
        *(
            gzip.compress(sound),
            gzip.compress(sound)[:40],
            gzip.compress(b""),
            sound + b'{"text": "cut',
            b"a\r\nb\r",
        ),
        *(b"PAR1", b"PAR1" + bytes(20) + b"PAR1", json.dumps([{"text": "a"}] * 3, indent=1).encode()),
    )
    stem = rng.choice(
        ("a", "b", "é", "a b", "a\nb", ".hidden", "~a", "a" * 240, "a.b", "-a", "a,b", "[a]", "\udcff")
    )
    suffix = rng.choice(
        (
            *(
                ".txt",
                ".jsonl",
                ".json",
                ".ndjson",
                ".jsonl.gz",
                ".jsonl.zst",
                ".txt.gz",
                ".txt.xz",
                ".jsonl.bz2",
            ),
            *(".parquet", ".parquet", ".csv", "", ".TXT", ".txt~", ".tar"),
        )
    )
    path = folder / (stem + suffix)
    if path.exists() or path.is_symlink():
        return
    what = rng.random()
    if what < 0.04:
        path.symlink_to("nowhere")
    elif what < 0.08:
        path.symlink_to(folder)
    elif what < 0.11:
        path.mkdir()
    elif what < 0.14:
        os.mkfifo(path)
    elif what < 0.16:
        path.symlink_to(path)
    elif suffix == ".parquet" and rng.random() < 0.7:
        columns = rng.choice(
            (["text"], ["other"], ["text", "text"], [], ["text", "b"]),
        )
        column = rng.choice(
            (
                pa.array(["a b c", None, ""]),
                pa.array([1, 2, 3]),
                pa.array([b"a", b"\xff", None]),
                pa.array([["a"], [], None]),
            )
        )
        with path.open("wb") as file:
            pq.write_table(pa.Table.from_arrays([column] * len(columns), names=columns), file)
    else:
        path.write_bytes(rng.choice(contents))


def odd_folders(rng: random.Random, folder: Path, material: Material) -> Case:
    """Change something in prepared data or in a run, and use it."""
    data, run = folder / "data", folder / "runs" / "odd"
    shutil.copytree(material.data, data)
    shutil.copytree(material.run, run)
    for _ in range(rng.choice((1, 1, 2))):
        _harm(rng, rng.choice((data, run, run)))
    command, words = rng.choice(
        (
            (
                "train",
                [
                    *SMALL_RUN,
                    f"data.path={data}",
                    f"run.root={folder}/runs",
                    "run.name=odd",
                    "trainer.max_steps=3",
                ],
            ),
            ("train", [*SMALL_RUN, f"data.path={data}", f"run.root={folder}/runs", "run.name=new"]),
            ("checkpoints", [rng.choice(("list", "verify")), f"path={run}"]),
            ("checkpoints", ["diff", f"path={run}", f"other={material.run}"]),
            ("plot_run", [f"run={run}", f"out={folder}/out"]),
            ("dashboard", [f"run={run}", f"json={folder}/board.json"]),
            (
                "analyze",
                [f"run={run}", f"data={data}", f"out={folder}/out", "which=updates,curves", "device=cpu"],
            ),
            ("export.__main__", [f"run={run}", f"data={data}", f"out={folder}/out"]),
            ("prepare_data", [f"inputs={material.text}", f"out={data}", "tokenizer=bpe:640", "workers=1"]),
        )
    )
    if command == "train" and rng.random() < 0.3:
        words = [
            *words,
            rng.choice(("checkpoint.resume=false", "data.on_bad_shard=skip", "data.verify=checksum")),
        ]
    return Case(command, words)


def _harm(rng: random.Random, folder: Path) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and "code" not in path.parts)
    if not paths:
        return
    path = rng.choice(paths)
    content = path.read_bytes()
    what = rng.randrange(11)
    if what == 0:
        path.write_bytes(content[: len(content) // 2])
    elif what == 1:
        path.write_bytes(b"")
    elif what == 2:
        path.unlink()
    elif what == 3:
        path.write_bytes(rng.randbytes(64))
    elif what == 4:
        at = rng.randrange(max(1, len(content)))
        path.write_bytes(content[:at] + bytes([255 - (content[at] if content else 0)]) + content[at + 1 :])
    elif what == 5:
        path.unlink()
        path.mkdir()
    elif what == 6:
        path.unlink()
        path.symlink_to("nowhere")
    elif what == 7:
        path.write_text(
            rng.choice(("{}", "[]", "null", "3", '{"format": 1}', "a: [", "\u2028")), encoding="utf-8"
        )
    elif what == 8:
        lines = content.splitlines(keepends=True)
        lines.insert(
            rng.randrange(len(lines) + 1),
            rng.choice((b"\xff\n", b"{\n", b"\n", b"null\n", b'{"kind": "x"}\n')),
        )
        path.write_bytes(b"".join(lines))
    elif what == 9:
        (
            path.parent / rng.choice((".nfs0000001", ".DS_Store", "x.partial", "a\nb", "step-x", "Thumbs.db"))
        ).write_bytes(b"x")
    else:
        shutil.rmtree(path.parent) if path.parent != folder else path.unlink()


KINDS: dict[str, Callable[[random.Random, Path, Material], Case]] = {
    "words": odd_words,
    "tools": odd_arguments,
    "files": odd_files,
    "folders": odd_folders,
}
