from pathlib import Path

import pytest

from tide_mega.lab.dashboard.layout import LOSS_BY_FREQUENCY, ROUTING, TABLES, remarks, summary
from tide_mega.lab.dashboard.panel import charts
from tide_mega.lab.dashboard.read import read_run


@pytest.mark.parametrize("k", [0, 2])
def test_a_training_logs_what_the_dashboard_shows(tiny_runs: dict[int, Path], k: int) -> None:
    run = read_run(str(tiny_runs[k]))
    assert not [remark for remark in remarks(run) if "not finite" not in remark]
    assert "step 6" in summary(run) and run.has_memory == bool(k)
    assert all(charts(panel, run.names()) for panel in LOSS_BY_FREQUENCY.panels[:2])
    assert bool(charts(ROUTING.panels[0], run.names())) == bool(k)
    if k:
        (grad_norms,) = charts(TABLES.panels[2], run.names())
        assert list(grad_norms.lines.values()) == ["00", "01"]
