"""A scorer over a run, built as an evaluation builds it."""

from tide_mega.lab.zero_shot.replicas import Replicas, TextScorer
from tide_mega.lab.zero_shot.scorer import ReplicaScorer
from tide_mega.parallel.groups import make_host_group
from tide_mega.trained.model import TrainedModel


def text_scorer(run, device, batch=4, **kwargs):
    model = TrainedModel(run, device, **kwargs)
    return TextScorer(Replicas(ReplicaScorer(model, batch), make_host_group()), run.tokenizer)
