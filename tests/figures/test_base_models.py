"""Runs of different base models side by side; the others are copies of trained runs with edited settings."""

import json
import shutil
from pathlib import Path

import pytest

from tide_mega.lab.figures import blocks, curves, deciles
from tide_mega.lab.figures.analysis import Analysis, SkippedError
from tide_mega.lab.figures.kit import caution, unlike
from tide_mega.lab.figures.registry import AnalyzeOptions
from tide_mega.parallel.device import Device

WIDE = {"num_layers: 2": "num_layers: 3", "hidden_size: 32": "hidden_size: 64"}
WHAT = "num_layers 3 instead of 2, hidden_size 64 instead of 32"


def changed(folder: Path, to: Path, edits: dict[str, str]) -> Path:
    """Copy a run, edit its configuration, and let its evaluations be worse by 100 nats."""
    shutil.copytree(folder, to)
    text = (to / "config.yaml").read_text()
    for before, after in edits.items():
        assert f" {before}\n" in text
        text = text.replace(f" {before}\n", f" {after}\n")
    (to / "config.yaml").write_text(text)
    records = [json.loads(line) for line in (to / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        if record["kind"] == "eval":
            record |= {role: record[role] + 100 for role in blocks.ROLES if record[role] is not None}
    (to / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return to


def opened(device: Device, **runs: Path) -> Analysis:
    return Analysis.open(AnalyzeOptions(run=[f"{label}={path}" for label, path in runs.items()]), device)


def test_base_models_are_compared_but_for_their_name(
    tiny_runs: dict[int, Path], alone: Device, tmp_path: Path
) -> None:
    wide = changed(tiny_runs[2], tmp_path / "wide", WIDE)
    named = changed(tiny_runs[2], tmp_path / "named", {"name: demo": "name: other"})
    analysis = opened(alone, k0=tiny_runs[0], k2=tiny_runs[2], wide=wide, named=named)
    assert unlike(analysis.runs) == {"wide": WHAT}
    assert caution(analysis.runs[:2]) == []
    assert caution(analysis.runs) == [
        "CAUTION: the runs do not all have the base model of k0, so they differ by more than their memory: "
        f"wide has {WHAT}."
    ]


def test_figure_7_has_the_baselines_base_model_alone(
    tiny_runs: dict[int, Path], alone: Device, tmp_path: Path
) -> None:
    wide = changed(tiny_runs[2], tmp_path / "wide", WIDE) / "checkpoints" / "step-00000003"
    section = blocks.run(opened(alone, k0=tiny_runs[0], k2=tiny_runs[2], wide=wide))
    without = blocks.run(opened(alone, k0=tiny_runs[0], k2=tiny_runs[2]))
    assert section.tables == without.tables
    assert section.findings == without.findings
    assert section.notes == (f"wide is left out: its base model is not that of k0 ({WHAT}).",)


def test_without_a_baseline_the_first_runs_base_model_counts(
    tiny_runs: dict[int, Path], alone: Device, tmp_path: Path
) -> None:
    more = {"num_blocks: 2": "num_blocks: 4"}
    k4 = changed(tiny_runs[2], tmp_path / "k4", more)
    wide = changed(tiny_runs[2], tmp_path / "wide", more | WIDE)
    section = blocks.run(opened(alone, wide=wide, k2=tiny_runs[2], k4=k4))
    assert [row[0] for row in section.tables["runs"].rows] == ["k2", "k4"]
    with pytest.raises(
        SkippedError, match=r"numbers of memory blocks\. wide is left out: .* that of k2 \(.*\)$"
    ):
        blocks.run(opened(alone, k2=tiny_runs[2], wide=wide))


@pytest.mark.parametrize("diagnostic", [deciles, curves])
def test_others_show_all_runs_with_a_caution(
    tiny_runs: dict[int, Path], alone: Device, tmp_path: Path, diagnostic
) -> None:
    wide = changed(tiny_runs[2], tmp_path / "wide", WIDE)
    alike = diagnostic.run(opened(alone, k0=tiny_runs[0], k2=tiny_runs[2]))
    assert not any("CAUTION" in note for note in alike.notes)
    analysis = opened(alone, k0=tiny_runs[0], k2=tiny_runs[2], wide=wide)
    section = diagnostic.run(analysis)
    assert caution(analysis.runs)[0] in section.notes
    assert any(finding.startswith("wide ") for finding in section.findings)
