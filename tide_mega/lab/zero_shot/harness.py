"""The only module that imports lm-evaluation-harness: its tasks, and our model as it sees it.

Tasks come from the hub, or are defined over local JSONL files for machines without access to it.
"""

import contextlib
import importlib.util
import io
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

from tide_mega.data.prepare.compressed import MAX_DOCUMENT_BYTES, read_line
from tide_mega.data.prepare.documents import parse_json_object, problem_of
from tide_mega.errors import ConfigError, EvaluationError
from tide_mega.lab.zero_shot.options import refuse_unknown
from tide_mega.lab.zero_shot.replicas import TextScorer
from tide_mega.lab.zero_shot.results import Measured, Score
from tide_mega.lab.zero_shot.scorer import Counts

DEFINITIONS = Path(__file__).parent / "tasks"
"""The harness's definitions of the local tasks, one YAML file per task."""

FILES = {
    "arc_challenge": "arc_challenge.jsonl",
    "arc_easy": "arc_easy.jsonl",
    "boolq": "boolq.jsonl",
    "lambada_openai": "lambada_openai.jsonl",
    "openbookqa": "openbook_qa.jsonl",
    "piqa": "piqa.jsonl",
}
_OPEN = ("lambada_openai",)
"""Tasks with context and continuation; the others have query, choices and gold."""


def find_files(folder: Path, tasks: list[str]) -> tuple[dict[str, Path], dict[str, str]]:
    """Return the checked file of each task that has one in the folder, and why each other is absent.

    Raises:
        ConfigError: the folder does not exist, or a line of a file is not an example.
    """
    if not folder.is_dir():
        raise ConfigError(f"local={folder} is not a folder: give the one with {', '.join(FILES.values())}.")
    files: dict[str, Path] = {}
    absent: dict[str, str] = {}
    for task in tasks:
        if task not in FILES:
            absent[task] = "needs the hub: it has no local version (leave out local=)"
        elif not (path := folder / FILES[task]).is_file():
            absent[task] = f"needs the hub, or {FILES[task]} in the folder of local="
        else:
            _check(path, is_open=task in _OPEN)
            files[task] = path.resolve()
    return files, absent


def _check(path: Path, *, is_open: bool) -> None:
    examples = 0
    with path.open("rb") as file:
        for number in count(start=1):
            line, size = read_line(file, MAX_DOCUMENT_BYTES)
            if size == 0:
                break
            if line is None:
                raise ConfigError(
                    f"{path} line {number} is longer than {MAX_DOCUMENT_BYTES} bytes, which is no example: "
                    "correct the file."
                )
            example = parse_json_object(line)
            if example is None:
                continue
            if problem := example if isinstance(example, str) else _problem(example, is_open=is_open):
                raise ConfigError(f"{path} line {number} {problem}.")
            examples += 1
    if not examples:
        raise ConfigError(f"{path} has no example: leave the task out, or give another folder as local=.")


def _problem(example: dict[str, Any], *, is_open: bool) -> str | None:
    texts = ("context", "continuation") if is_open else ("query",)
    for name in texts:
        if problem := problem_of(example.get(name)):
            return f"has no text under {name!r}: {problem}"
    if is_open:
        return None if example["continuation"] else "has an empty continuation"
    choices, gold = example.get("choices"), example.get("gold")
    if not isinstance(choices, list) or not all(c and problem_of(c) is None for c in choices) or not choices:
        return "has no list of texts under 'choices'"
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        return f"has gold={gold!r}, which is no index of its {len(choices)} choices"
    return None


log = logging.getLogger(__name__)

BOOTSTRAP = 1000
"""Bootstrap resamples for the standard error of perplexity; that of accuracies has a formula."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
_HUB = "https://huggingface.co"
_HUB_SECONDS = 10.0


def require() -> str:
    """Return the harness's name and version.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "lm-evaluation-harness is not installed: pip install 'tide_mega[eval]' (in a checkout: "
            "pip install -c constraints.txt -e '.[eval]')."
        )
    return f"lm_eval {version('lm_eval')}"


def hub_is_reachable() -> bool:
    """Whether the hub answers (`HF_ENDPOINT`, through the environment's proxies)."""
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return False
    request = urllib.request.Request(os.environ.get("HF_ENDPOINT", _HUB), method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_HUB_SECONDS):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False


class Tasks:
    """Loaded tasks by name."""

    def __init__(self, loaded: Mapping[str, Any]) -> None:
        self._loaded = loaded

    def __contains__(self, name: str) -> bool:
        return name in self._loaded

    @property
    def names(self) -> list[str]:
        """Names of the tasks."""
        return list(self._loaded)

    def measure(self, name: str, scorer: TextScorer, limit: int | None) -> Measured:
        """Run a task's first `limit` examples (None: all), without examples in the prompt (zero-shot).

        Raises:
            EvaluationError: a replica failed, or the task needs something the model cannot do.
        """
        from lm_eval.evaluator import evaluate

        task = self._loaded[name]
        task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=0)
        scorer.counts = Counts()
        with _quiet():
            found = evaluate(
                lm=_adapter(scorer),
                task_dict={"tasks": {name: task}, "groups": {}, "group_map": {}},
                limit=limit,
                bootstrap_iters=BOOTSTRAP,
                log_samples=False,
            )
        values = found["results"][name]
        examples = int(found["n-samples"][name]["effective"])
        counts = scorer.counts
        return Measured(
            _scores(values),
            examples,
            *_guesses(task, examples),
            requests=counts.requests,
            truncated=counts.truncated,
            windowed=counts.windowed,
            apart=counts.apart,
        )


def load_local(files: Mapping[str, Path], cache: Path) -> Tasks:
    """Load tasks from JSONL files; `cache`, a folder for the `datasets` library, is needed while they are used."""
    with _environment(OFFLINE):
        from lm_eval.tasks import TaskManager

    with _environment(OFFLINE), _quiet():
        manager = TaskManager(include_path=str(DEFINITIONS), include_defaults=False)
        loaded: dict[str, Any] = {}
        for name, path in files.items():
            data = {"data_files": {"test": str(path)}, "cache_dir": str(cache)}
            definition = {**(manager.task_index[name].cfg or {}), "dataset_kwargs": data}
            loaded |= manager.load([definition])["tasks"]
    return Tasks(loaded)


def load_from_hub(names: Sequence[str]) -> tuple[Tasks, dict[str, str]]:
    """Load the harness's own tasks; also return why each unavailable one is absent.

    Without access to the hub, tasks still come from the `datasets` library's cache.

    Raises:
        ConfigError: the harness has no task of a name.
    """
    reachable = hub_is_reachable()
    if not reachable:
        log.warning("the hub cannot be reached: only tasks that an earlier evaluation downloaded can be had")
    loaded: dict[str, Any] = {}
    absent: dict[str, str] = {}
    mode = {} if reachable else OFFLINE
    with _environment(mode):
        from lm_eval.tasks import TaskManager

    with _environment(mode), _quiet():
        manager = TaskManager()
        refuse_unknown(names, manager.all_subtasks, require())
        for name in names:
            try:
                loaded |= manager.load([name])["tasks"]
            except Exception as error:  # errors of many libraries: hub, datasets, file system, scripts
                reason = str(error).strip().splitlines() or [""]
                absent[name] = f"needs the hub ({type(error).__name__}: {reason[0][:200]})"
    return Tasks(loaded), absent


def check_names(names: Sequence[str]) -> None:
    """Look up names in the harness's index, which takes seconds; does not access the hub.

    Raises:
        ConfigError: the harness has no task of a name.
    """
    if not names:
        return
    with _environment(OFFLINE):
        from lm_eval.tasks import TaskManager

    with _environment(OFFLINE), _quiet():
        refuse_unknown(names, TaskManager().all_subtasks, require())


def _adapter(scorer: TextScorer) -> Any:
    from lm_eval.api.model import LM

    class TideModel(LM):
        """Our model behind the harness's interface; the harness sees one process, which represents all."""

        def loglikelihood(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
            return scorer.loglikelihood([request.args for request in requests])

        def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[float]:
            return scorer.loglikelihood_rolling([request.args[0] for request in requests])

        def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
            return scorer.generate([request.args for request in requests])

    return TideModel()


def _scores(values: Mapping[str, Any]) -> dict[str, Score]:
    """Turn `acc,none` and `acc_stderr,none` into acc: (value, stderr); keeps a filter's name if it is not none."""
    scores = {}
    for name, value in values.items():
        metric, comma, chosen = name.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        stderr = values.get(f"{metric}_stderr,{chosen}")
        key = metric if chosen == "none" else f"{metric} ({chosen})"
        scores[key] = Score(float(value), float(stderr) if isinstance(stderr, int | float) else None)
    if not scores:
        raise EvaluationError(f"the harness gave no metric, only {', '.join(values)}")
    return scores


def _guesses(task: Any, examples: int) -> tuple[float | None, tuple[float, ...]]:
    """Return `Measured.chance` and `Measured.constant`."""
    if task.OUTPUT_TYPE == "loglikelihood":
        return 0.0, ()
    if task.OUTPUT_TYPE != "multiple_choice":
        return None, ()
    docs = [doc for _, doc in zip(range(examples), task.eval_docs, strict=False)]
    choices = [tuple(task.doc_to_choice(doc)) for doc in docs]
    chance = sum(1 / len(of_doc) for of_doc in choices) / len(docs)
    gold = [task.doc_to_target(doc) for doc in docs]
    if len(set(choices)) > 1 or not all(isinstance(index, int) for index in gold):
        return chance, ()
    return chance, tuple(gold.count(index) / len(docs) for index in range(len(choices[0])))


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Send the libraries' output to the debug log, without progress bars, and keep them single-process."""
    logger, said = logging.getLogger("lm_eval"), io.StringIO()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with (
            _environment({"DISABLE_MULTIPROC": "1"}),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
        ):
            yield
    finally:
        logger.setLevel(level)
        log.debug("the harness said: %s", said.getvalue())
