"""lm-evaluation-harness's own `hf` model on an exported folder gives the scores of `tide_mega.evaluate`."""

import json
import random

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

from tests.zero_shot.texts import questions, words
from tests.zero_shot.tiny import text_scorer
from tide_mega.export.export import export
from tide_mega.export.options import ExportOptions
from tide_mega.lab.zero_shot import harness
from tide_mega.lab.zero_shot.harness import find_files
from tide_mega.trained.run import TrainedRun

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def local(tmp_path):
    (tmp_path / "arc_easy.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions()))
    endings = [{"context": "import os def return", "continuation": word} for word in ("self", "os", "x")]
    (tmp_path / "lambada_openai.jsonl").write_text("".join(json.dumps(e) + "\n" for e in endings))
    return tmp_path


@pytest.mark.parametrize("blocks", [0, 2])
def test_scores_are_those_of_our_own_evaluation(blocks, tiny_runs, local, alone, tmp_path, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    out = tmp_path / "hf"
    export(ExportOptions(run=str(tiny_runs[blocks]), out=str(out), dtype="fp32"), progress=False)
    theirs = HFLM(pretrained=str(out), trust_remote_code=True, device="cpu", dtype="float32", batch_size=3)
    scorer = text_scorer(TrainedRun.open(tiny_runs[blocks]), alone)
    tasks = harness.load_local(find_files(local, ["arc_easy", "lambada_openai"])[0], tmp_path / "cache")
    ours = {name: tasks.measure(name, scorer, None).scores for name in tasks.names}
    monkeypatch.setattr(harness, "_adapter", lambda scorer: theirs)
    for name in tasks.names:
        found = tasks.measure(name, scorer, None).scores
        assert found.keys() == ours[name].keys() >= {"acc"}
        for metric, score in found.items():
            assert score.value == pytest.approx(ours[name][metric].value, rel=1e-5), (name, metric)


def test_single_requests_are_answered_alike(tiny_runs, alone, tmp_path):
    """Log-likelihoods, of continuations that a word begins or ends, and after nothing."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    out = tmp_path / "hf"
    export(ExportOptions(run=str(tiny_runs[2]), out=str(out), dtype="fp32"), progress=False)
    theirs = HFLM(pretrained=str(out), trust_remote_code=True, device="cpu", dtype="float32", batch_size=4)

    rng = random.Random(1)
    pairs = [(words(rng, rng.randrange(1, 8)), " " + words(rng, rng.randrange(1, 4))) for _ in range(20)]
    pairs += [("", "import os"), ("return  ", "self")]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    wanted = text_scorer(TrainedRun.open(tiny_runs[2]), alone).loglikelihood(pairs)
    for found, (nats, is_greedy) in zip(theirs.loglikelihood(asked), wanted, strict=True):
        assert found[0] == pytest.approx(nats, abs=1e-4) and found[1] == is_greedy
