"""`python -m tide_mega.generate`: text, JSON lines, batches, refusals and statuses."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tide_mega import generate
from tide_mega.errors import Exit, StatedError

ROOT = Path(__file__).parents[2]


def run(*words):
    """Return the exit status of a command in this process."""
    try:
        return generate.main(["threads=1", "device=cpu", "dtype=fp32", *words])
    except StatedError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    except SystemExit as ended:
        return ended.code


@pytest.fixture
def feed(monkeypatch):
    """Return what sets the bytes of standard input."""

    def give(content):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    return give


def lines_of(capsys):
    found = capsys.readouterr()
    return [json.loads(line) for line in found.out.splitlines()], found.err


def greedy_text(model, prompt, count):
    """Return the ids that computing everything anew for each token gives."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model.logits(torch.tensor([ids]))[0][0, -1].argmax()))
    return ids[len(prompt) :]


def test_the_text_is_the_models_greedy_one(folders, references, capsys):
    from tide_mega.inference.folder import ModelFolder

    assert run(f"model={folders[3, True]}", "prompt=Hello", "max_tokens=20") == 0
    found = capsys.readouterr()
    tokenizer = ModelFolder.open(folders[3, True]).tokenizer
    ids = greedy_text(references[3, True], tokenizer.encode_batch(["Hello"])[0], 20)
    if 0 in ids:
        ids = ids[: ids.index(0)]
    assert found.out == tokenizer.decode([i for i in ids if i <= 256]) + "\n"
    assert "prompts 5 tokens" in found.err and "ms a step" in found.err


def test_lines_of_standard_input_are_answered_in_order(folders, feed, capsys):
    feed(b'ab\n\n{"prompt": "x", "max_tokens": 3, "seed": 5, "temperature": 0.5}\n{not json\n')
    assert run(f"model={folders[3, True]}", "batch=2", "max_tokens=6") == 0
    found, _ = lines_of(capsys)
    assert [(one["line"], one["prompt"]) for one in found] == [(1, "ab"), (3, "x"), (4, "{not json")]
    assert found[1]["seed"] == 5 and found[1]["tokens"] <= 3
    assert all(one["finish"] in ("eos", "length") for one in found)


def test_an_answer_does_not_depend_on_its_batch(folders, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\nsecond\nthe third\nfourth one\nfive\n")
    answers = []
    for batch in (1, 2, 5):
        words = ["temperature=1", "top_p=0.9", "seed=3", "max_tokens=12"]
        assert run(f"model={folders[3, True]}", f"prompts={prompts}", f"batch={batch}", *words) == 0
        answers.append(lines_of(capsys)[0])
    assert answers[0] == answers[1] == answers[2]


def test_a_seed_that_was_drawn_gives_the_same_again(folders, capsys):
    words = [f"model={folders[3, True]}", "prompt=a", "temperature=1", "max_tokens=12", "json=true"]
    assert run(*words) == 0
    (first,), _ = lines_of(capsys)
    assert run(*words, f"seed={first['seed']}") == 0
    assert lines_of(capsys)[0] == [first]


def test_rows_from_disk_are_counted(sidecar_folder, folders, capsys):
    assert run(f"model={folders[3, True]}", "prompt=Hello", "max_tokens=9") == 0
    wanted = capsys.readouterr().out
    for place in ("disk", "host", "device"):
        assert run(f"model={sidecar_folder}", f"memory={place}", "prompt=Hello", "max_tokens=9") == 0
        found = capsys.readouterr()
        assert found.out == wanted
        assert ("bytes read" in found.err) is (place == "disk")


def test_stop_strings_and_the_end_of_the_room(folders, capsys):
    words = [f"model={folders[0, True]}", "prompt=Hello", "json=true"]
    assert run(*words, "max_tokens=1000") == 0
    (whole,), _ = lines_of(capsys)
    if whole["finish"] == "length":
        assert whole["tokens"] + 5 in (64, 65)
    stop = whole["text"][2]
    assert run(*words, "max_tokens=30", f"stop=['{stop}']") == 0
    (cut,), _ = lines_of(capsys)
    assert cut["finish"] == "stop" and cut["text"] == whole["text"][: whole["text"].index(stop)]


def test_an_empty_prompt_begins_a_document(folders, tmp_path, capsys):
    assert run(f"model={folders[0, True]}", "prompt=", "json=true", "max_tokens=4") == 0
    assert lines_of(capsys)[0][0]["prompt_tokens"] == 1
    shutil.copytree(folders[0, True], tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text()) | {"bos_token_id": None}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    assert run(f"model={tmp_path / 'hf'}", "prompt=") == Exit.DATA
    assert "no bos_token_id to begin with" in capsys.readouterr().err


BAD_LINES = b"""good
{"prompt": 3}
{"max_tokens": 3}
{"prompt": "a", "tempature": 3}
{"prompt": "a", "temperature": -1}
{"prompt": "a", "max_tokens": 0}
{"prompt": "a", "seed": -1}
{"prompt": "a", "stop": [""]}
{"prompt": "a", "top_k": true}
\xff\xfe
"""


def test_lines_that_cannot_be_answered_keep_no_other_from_being(folders, feed, capsys):
    feed(BAD_LINES + b"a" * 64 + b"\nlast")
    assert run(f"model={folders[0, True]}", "batch=3", "max_tokens=3") == Exit.DATA
    found, said = lines_of(capsys)
    assert sorted(one["line"] for one in found if "text" in one) == [1, 12]
    assert sorted(one["line"] for one in found if "error" in one) == list(range(2, 12))
    assert all(f"line {n}" in said for n in range(2, 12))
    assert "64 tokens, and with an answer there is room for 64: shorten it" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prompt=a", "prompts=b"], "stands beside prompt"),
        (["prompts=none.txt"], "prompts=none.txt cannot be read"),
        (["prompt=a", "memory=tape"], "memory=tape"),
        (["prompt=a", "memory=disk"], "export with memory=sidecar"),
        (["prompt=a", "cache=0"], "cache=0"),
        (["prompt=a", "weights=int3"], "weights=int3"),
        (["prompt=a", "weights=int8", "compile=true"], "weights=int8"),
        (["prompt=a", "temperature=-1"], "temperature=-1"),
        (["prompt=a", "top_p=0"], "top_p=0"),
        (["prompt=a", "max_tokens=0"], "max_tokens=0"),
        (["prompt=a", "max_length=65"], "max_length=65 is beyond the model's 64"),
        (["prompt=a", "promt=b"], "did you mean prompt"),
        (["prompt=a", "seed=-1"], "seed=-1"),
    ],
)
def test_wrong_arguments_end_in_a_sentence(words, said, folders, capsys):
    assert run(f"model={folders[3, True]}", *words) == Exit.CONFIG
    assert said in capsys.readouterr().err


def test_logits_that_are_no_numbers_write_no_text(folders, tmp_path, capsys):
    shutil.copytree(folders[0, True], tmp_path / "hf")
    shard = next(
        path for path in (tmp_path / "hf").glob("*.safetensors") if "model.norm.weight" in load_file(path)
    )
    weights = load_file(shard)
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, shard, metadata={"format": "pt"})
    assert run(f"model={tmp_path / 'hf'}", "prompt=a") == Exit.ERROR
    found = capsys.readouterr()
    assert found.out == "" and "logits are not numbers" in found.err


def start(folder, *words, **kwargs):
    return subprocess.Popen(
        [sys.executable, "-m", "tide_mega.generate", f"model={folder}", "threads=1", *words],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **kwargs,
    )


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_written(folders):
    # A shell that starts the tests in the background has its children ignore SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = start(folders[0, True], "prompts=-", "json=true", "max_tokens=3")
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.stdin and process.stdout
    process.stdin.write(b"a\n")
    process.stdin.flush()
    assert json.loads(process.stdout.readline())["line"] == 1
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=60)
    assert process.returncode == generate.INTERRUPTED
    assert out == b"" and b"interrupted" in said and b"Traceback" not in said


@pytest.mark.slow
def test_nobody_reads(folders):
    process = start(folders[0, True], "prompts=-", "max_tokens=3")
    assert process.stdout
    process.stdout.close()
    process.stdout = None
    _, said = process.communicate(b"a\n" * 5, timeout=60)
    assert process.returncode == 141 and b"Traceback" not in said
