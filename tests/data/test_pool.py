import subprocess
import sys
import textwrap
from pathlib import Path

import pytest


@pytest.mark.slow
def test_workers_die_with_a_killed_parent(tmp_path: Path, tokenizer_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(f"""
        import multiprocessing, os, threading
        from concurrent.futures import ProcessPoolExecutor
        from tide_mega.data.prepare.pipeline import _initialise

        def wait_for_ever():
            os.write(1, b"ready\\n")
            threading.Event().wait()

        if __name__ == "__main__":
            context = multiprocessing.get_context("spawn")
            arguments = (None, {str(tokenizer_path)!r}, None, context.Value("q", 0))
            pool = ProcessPoolExecutor(1, context, _initialise, arguments)
            pool.submit(wait_for_ever).result()
        """)
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    parent.kill()
    # The worker holds the other end of the pipe: the pipe closes when it is gone.
    assert parent.communicate(timeout=60)[0] == ""


@pytest.mark.slow
def test_a_killed_worker_is_a_clear_error(tmp_path: Path, tokenizer_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("some text " * 20)
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, signal
        from pathlib import Path
        from tide_mega.data.prepare import pipeline as pool
        from tide_mega.errors import DataError
        from tide_mega.data.prepare.inputs import find_inputs
        from tide_mega.data.prepare.inputs import plan_units
        from tide_mega.data.prepare.worker import Job

        pool.process_unit = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
        if __name__ == "__main__":
            units = plan_units(find_inputs([{str(tmp_path)!r}], []).files, 1)
            job = Job({str(tmp_path)!r}, "text", 1 << 20, 0.0, 0, 64, 64, False)
            pairs = [(unit, "") for unit in units]
            try:
                pool.run_units(pairs, job, Path({str(tokenizer_path)!r}), None, 2, lambda count: None)
            except DataError as error:
                print(error)
        """)
    )
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert "a worker process was killed" in result.stdout, result.stderr
