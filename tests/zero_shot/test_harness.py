"""The harness on hand-made questions, answered by a scorer with planted likelihoods."""

import json
import math
import os
import socket
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from tide_mega.errors import ConfigError, EvaluationError
from tide_mega.lab.zero_shot import harness
from tide_mega.lab.zero_shot.options import TITLES
from tide_mega.lab.zero_shot.results import Score
from tide_mega.lab.zero_shot.scorer import Counts

QUESTIONS = [
    {"query": "Question: one?\n", "choices": ["red", "no"], "gold": 0},
    {"query": "Question: two?\n", "choices": ["no", "red"], "gold": 1},
    {"query": "Question: three?\n", "choices": ["red", "no", "no!", "?"], "gold": 2},
    {"query": "Question: four?\n", "choices": ["no", "a red ball", "none", "?"], "gold": 1},
]


class Planted:
    """Likes what has "red" in it, by 1 nat a request; every other text costs 1 nat a character."""

    longest = 32

    def __init__(self):
        self.counts, self.asked = Counts(), []

    def loglikelihood(self, pairs):
        self.asked += pairs
        self.counts.requests += len(pairs)
        return [(-1.0, True) if "red" in tail else (-float(len(tail)), False) for _, tail in pairs]


def load(tmp_path, **contents):
    files = {}
    for name, examples in contents.items():
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(example) + "\n" for example in examples))
    return harness.load_local(files, tmp_path / "cache")


def test_accuracy_of_known_answers(tmp_path):
    scorer = Planted()
    found = load(tmp_path, piqa=QUESTIONS).measure("piqa", scorer, None)
    # The third question's right answer is not liked, whatever its length.
    deviation = math.sqrt(0.75 * 0.25 * 4 / 3 / 4)
    assert found.scores == {
        "acc": Score(0.75, pytest.approx(deviation)),
        "acc_norm": Score(0.75, pytest.approx(deviation)),
    }
    assert found.examples == 4 and found.requests == 12
    assert found.chance == pytest.approx((0.5 + 0.5 + 0.25 + 0.25) / 4)
    assert found.constant == ()
    assert scorer.asked[:2] == [("Question: one?\nAnswer:", " red"), ("Question: one?\nAnswer:", " no")]


def test_length_normalisation_can_turn_an_answer(tmp_path):
    class ByLength(Planted):
        def loglikelihood(self, pairs):
            return [(-3.0 if len(tail) > 5 else -2.0, False) for _, tail in pairs]

    examples = [
        {"query": "Question: x?", "choices": ["no", "a long answer"], "gold": gold} for gold in (1, 1, 0)
    ]
    found = load(tmp_path, arc_easy=examples).measure("arc_easy", ByLength(), None)
    assert found.scores["acc"].value == pytest.approx(1 / 3)
    assert found.scores["acc_norm"].value == pytest.approx(2 / 3)


def test_a_limit_takes_the_first_examples(tmp_path):
    found = load(tmp_path, piqa=QUESTIONS).measure("piqa", Planted(), 2)
    assert (found.examples, found.scores["acc"].value, found.chance) == (2, 1.0, 0.5)


def test_a_task_can_be_measured_again_for_another_model(tmp_path):
    tasks = load(tmp_path, piqa=QUESTIONS)
    first, second = (tasks.measure("piqa", Planted(), None) for _ in range(2))
    assert first == second and first.requests == 12


def test_boolq_says_what_one_answer_given_always_scores(tmp_path):
    examples = [
        {"query": f"Passage: text.\nQuestion: is it {i}?", "choices": ["no", "yes"], "gold": int(i > 0)}
        for i in range(4)
    ]
    scorer = Planted()
    found = load(tmp_path, boolq=examples).measure("boolq", scorer, None)
    assert found.chance == 0.5 and found.constant == (0.25, 0.75)
    assert found.scores["acc"].value == 0.25  # " no" is shorter
    assert scorer.asked[1] == ("text.\nQuestion: is it 0?\nAnswer:", " yes")


def test_lambada_is_accuracy_and_perplexity_of_the_last_word(tmp_path):
    examples = [
        {"context": "the ball is", "continuation": "red"},
        {"context": "I say", "continuation": "word"},
    ]
    scorer = Planted()
    found = load(tmp_path, lambada_openai=examples).measure("lambada_openai", scorer, None)
    assert scorer.asked == [("the ball is", " red"), ("I say", " word")]
    assert found.scores["acc"].value == 0.5 and found.chance == 0.0
    assert found.scores["perplexity"].value == pytest.approx(math.exp((1 + 5) / 2))
    assert found.scores["perplexity"].stderr > 0


@pytest.mark.parametrize(
    ("task", "example", "prompt"),
    [
        ("openbookqa", {"query": "Fog is", "choices": ["wet", "dry"], "gold": 0}, "Fog is"),
        (
            "arc_challenge",
            {"query": "Question: Why?", "choices": ["so", "no"], "gold": 0},
            "Question: Why?\nAnswer:",
        ),
    ],
)
def test_prompts_are_those_of_the_harness_own_tasks(tmp_path, task, example, prompt):
    scorer = Planted()
    load(tmp_path, **{task: [example]}).measure(task, scorer, None)
    assert scorer.asked[0] == (prompt, f" {example['choices'][0]}")


def test_text_made_by_the_model_and_whole_documents_reach_the_scorer(tmp_path):
    from lm_eval.tasks import TaskManager

    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": "red", "answer": "2"}) + "\n")
    data = {"data_files": {"test": str(path)}, "cache_dir": str(tmp_path / "cache")}
    shared = {"dataset_path": "json", "dataset_kwargs": data, "test_split": "test", "doc_to_text": "{{text}}"}
    exact = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    byte = [{"metric": "byte_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}]
    stops = {"until": ["."], "do_sample": False}
    tasks = [
        {**shared, "task": "made", "output_type": "generate_until", "doc_to_target": "{{answer}}",
         "generation_kwargs": stops, "metric_list": exact},
        {**shared, "task": "rolled", "output_type": "loglikelihood_rolling", "doc_to_target": "{{text}}",
         "doc_to_text": "", "metric_list": byte},
    ]  # fmt: skip

    class Speaks(Planted):
        def generate(self, requests):
            assert requests == [("red", stops)]
            return ["2"]

        def loglikelihood_rolling(self, texts):
            assert texts == ["red"]
            return [-6.0]

    loaded = harness.Tasks(TaskManager(include_defaults=False).load(tasks)["tasks"])
    made = loaded.measure("made", Speaks(), None)
    assert made.scores == {"exact_match": Score(1.0, None)} and made.chance is None
    assert loaded.measure("rolled", Speaks(), None).scores["byte_perplexity"].value == pytest.approx(
        math.exp(2)
    )


def test_nothing_is_left_in_the_cache_of_the_datasets_library(tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    load(tmp_path, piqa=QUESTIONS)
    assert not list(home.rglob("*.arrow"))
    assert list((tmp_path / "cache").rglob("*.arrow"))
    assert "DISABLE_MULTIPROC" not in os.environ


def test_without_the_hub_every_task_says_that_it_needs_it(monkeypatch, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused at once
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert not harness.hub_is_reachable()

    class Offline:
        all_subtasks = ("sciq", "hellaswag")

        def load(self, names):
            assert os.environ["HF_DATASETS_OFFLINE"] == "1"
            raise ConnectionError("Couldn't reach the hub\nand more")

    monkeypatch.setattr(harness, "hub_is_reachable", lambda: False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", Offline)
    tasks, absent = harness.load_from_hub(["sciq", "hellaswag"])
    assert tasks.names == []
    reason = "needs the hub (ConnectionError: Couldn't reach the hub)"
    assert absent == {"sciq": reason, "hellaswag": reason}
    with pytest.raises(
        ConfigError, match=r"tasks=nonsense is no task of lm_eval .*: `lm_eval ls tasks` lists"
    ):
        harness.load_from_hub(["sciq", "nonsense"])
    with pytest.raises(
        ConfigError, match=r"is no task of .*: the nearest name is hellaswag, and `lm_eval ls"
    ):
        harness.check_names(["sciq", "hella_swag"])
    harness.check_names(["sciq"])


def test_the_eight_tasks_of_the_paper_are_tasks_of_the_harness():
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent
    names = (
        "arc",
        "hellaswag",
        "lambada",
        "openbookqa",
        "piqa",
        "sciq",
        "super_glue",
    )  # all of them take long
    manager = lm_eval.tasks.TaskManager(include_path=[folder / n for n in names], include_defaults=False)
    assert set(TITLES) <= set(manager.all_subtasks) and len(TITLES) == 8


def test_a_hub_task_that_can_be_had_is_measured_beside_one_that_cannot(tmp_path, monkeypatch):
    local = load(tmp_path, piqa=QUESTIONS)

    class Hub:
        all_subtasks = ("sciq", "piqa")

        def load(self, names):
            if names == ["sciq"]:
                raise FileNotFoundError("no such data set")
            return {"tasks": {"piqa": local._loaded["piqa"]}}

    monkeypatch.setattr(harness, "hub_is_reachable", lambda: True)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", Hub)
    tasks, absent = harness.load_from_hub(["sciq", "piqa"])
    assert absent == {"sciq": "needs the hub (FileNotFoundError: no such data set)"}
    assert tasks.measure("piqa", Planted(), None).scores["acc"].value == 0.75


def test_a_missing_harness_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'tide_mega\[eval\]'"):
        harness.require()


def test_an_error_of_the_scorer_reaches_the_caller(tmp_path):
    class Failing(Planted):
        def loglikelihood(self, pairs):
            raise EvaluationError("rank 1: out of memory")

    with pytest.raises(EvaluationError, match="rank 1: out of memory"):
        load(tmp_path, piqa=QUESTIONS).measure("piqa", Failing(), None)
