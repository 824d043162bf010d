import weakref

import pytest

from tide_mega.lab.figures import analysis as analyses
from tide_mega.lab.figures import perplexity
from tide_mega.lab.figures.analysis import Analysis
from tide_mega.lab.figures.registry import AnalyzeOptions
from tide_mega.trained.model import TrainedModel


@pytest.mark.slow
def test_one_model_is_in_memory_at_a_time(tiny_runs, alone, monkeypatch):
    there, before = weakref.WeakSet(), []

    def build(*args, **kwargs):
        before.append(len(there))
        model = TrainedModel(*args, **kwargs)
        there.add(model)
        return model

    monkeypatch.setattr(analyses, "TrainedModel", build)
    options = AnalyzeOptions(run=[str(path) for path in tiny_runs.values()], sequences=2, batch=2)
    perplexity.run(Analysis.open(options, alone))
    assert before == [0] * 4  # two runs of two checkpoints
