"""Exports beside a training: one at a time, no checkpoint removed under them, no failure that reaches the run."""

import json
import logging
import signal
import sys

import pytest

from tests.support.runs import tiny, train_here
from tide_mega.training.exports import Exports


class Scripted(Exports):
    """Runs a line of Python instead of an export: `scripts[step]`."""

    scripts: dict[int, str]

    def _command(self, step):
        return [sys.executable, "-c", self.scripts[step], str(self.folder(step))]


@pytest.fixture
def exports(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="tide_mega.training.exports")
    made = Scripted(tmp_path / "run", "fp32")
    (tmp_path / "run").mkdir()
    made.scripts = {}
    yield made
    made.stop()


WAIT = "import time; time.sleep(60)"


def test_the_command_is_the_one_for_users(tmp_path):
    words = Exports(tmp_path / "my run", "bf16")._by_hand(500)
    assert words.startswith("python -m tide_mega.export 'run=")
    assert "step-00000500' 'out=" in words and "dtype=bf16 overwrite=true 'name=my run'" in words


def test_a_step_is_exported_once_its_checkpoint_is_there(exports, caplog):
    exports.scripts = {4: "import sys; open(sys.argv[1], 'w')"}
    exports.on_written(2)
    exports.want(4)
    assert exports.in_use() == {4} and not (exports.run / "hf").exists()
    exports.on_written(4)
    assert exports.in_use() == {4}
    exports.finish()
    assert exports.folder(4).exists() and exports.in_use() == set()
    assert f"exported step 4 to {exports.folder(4)}" in caplog.text


def test_a_failure_is_logged_with_its_last_words(exports, caplog):
    exports.scripts = {4: "import sys; print('first'); print('out of room'); sys.exit(6)"}
    exports.want(4)
    exports.on_written(4)
    exports.finish()
    record = caplog.records[-1]
    assert record.levelno == logging.ERROR
    assert "the export of step 4 failed with status 6: out of room; training goes on." in record.getMessage()
    assert exports.folder(4).with_suffix(".log").read_text() == "first\nout of room\n"
    assert exports.in_use() == set()


def test_of_those_that_wait_the_newest_is_made(exports, caplog):
    exports.scripts = {2: WAIT, 4: "", 6: "import sys; open(sys.argv[1], 'w')"}
    for step in (2, 4, 6):
        exports.want(step)
        exports.on_written(step)
    assert exports.in_use() == {2, 6}
    assert "step 4 is not exported, as earlier exports took so long: python -c" in caplog.text
    exports._running.process.terminate()
    exports.finish()
    assert exports.folder(6).exists() and not exports.folder(4).exists()
    assert exports.in_use() == set()


def test_a_stopped_run_ends_its_export_and_says_so(exports, caplog):
    exports.scripts = {2: WAIT, 4: ""}
    for step in (2, 4):
        exports.want(step)
        exports.on_written(step)
    process = exports._running.process
    exports.stop()
    assert process.returncode == -signal.SIGTERM
    assert [r.getMessage()[:42] for r in caplog.records] == [
        "the export of step 4 ended with the run: p",
        "the export of step 2 ended with the run: p",
    ]


@pytest.mark.slow
def test_a_training_exports_its_checkpoints(pools, tiny_data, tmp_path):
    words = ("checkpoint.every=2", "checkpoint.export_hf_every=4", "checkpoint.keep_last=1")
    pools(1).run(
        train_here, tiny(tiny_data, tmp_path, *words, "checkpoint.at_end=false", "trainer.max_steps=6")
    )
    (folder,) = [path for path in (tmp_path / "tiny" / "hf").iterdir() if path.is_dir()]
    note = json.loads((folder / "export.json").read_text())
    assert folder.name == "step-00000004"
    assert (note["step"], note["dtype"], note["tables"], note["memory"]) == (4, "fp32", "fp32", "inline")
    assert (folder / "README.md").read_text().startswith("---\n")
