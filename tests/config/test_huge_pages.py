"""Huge pages are torch's own switch; it has to be set before torch is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tide_mega.config.command_line import use_huge_pages

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
IN_HUGE_PAGES = """
from pathlib import Path
from tide_mega.config.command_line import use_huge_pages
use_huge_pages()
import torch
held = torch.ones(64 << 18)
lines = dict(line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
print(int(lines["AnonHugePages"].split()[0]))
"""


@pytest.mark.skipif(
    not ENABLED.exists() or "[never]" in ENABLED.read_text(),
    reason="this system has no transparent huge pages",
)
@pytest.mark.parametrize("switch", ["1", "0"])
def test_large_tensors_lie_in_huge_pages(switch):
    done = subprocess.run(
        [sys.executable, "-c", IN_HUGE_PAGES],
        env={**os.environ, "THP_MEM_ALLOC_ENABLE": switch},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    always = "[always]" in ENABLED.read_text()
    assert (int(done.stdout) >= 32 << 10) is (switch == "1" or always)  # of 64 MiB, in kB


def test_what_the_environment_says_stays(monkeypatch):
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    use_huge_pages()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    use_huge_pages()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"
