"""A scorer over a run, as an evaluation makes it."""

from tide_mega.evaluation.replicas import Replicas
from tide_mega.evaluation.requests import TextScorer
from tide_mega.evaluation.scorer import ReplicaScorer
from tide_mega.parallel.groups import make_host_group
from tide_mega.trained.model import TrainedModel


def text_scorer(run, device, batch=4, **kwargs):
    model = TrainedModel(run, device, **kwargs)
    return TextScorer(Replicas(ReplicaScorer(model, batch), make_host_group()), run.tokenizer)
