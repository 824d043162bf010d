"""Scores of the plain reference, one sequence at a time and without padding."""

import torch

from tests.support.trained import reference_of
from tide_mega.trained.run import TrainedRun


class Oracle:
    """Log-likelihoods and greedy text by the reference with a checkpoint's weights."""

    def __init__(self, run: TrainedRun) -> None:
        self.run, self.reference = run, reference_of(run).eval()
        self.longest = run.config.data.seq_length

    def encode(self, text):
        return self.run.tokenizer.encode_batch([text])[0].tolist()

    @torch.no_grad()
    def log_probabilities(self, inputs):
        """Of every next token [T, V]."""
        return self.reference.logits(torch.tensor([inputs]))[0][0].double().log_softmax(-1)

    def score(self, context_ids, ids):
        """Nats of `ids` after as much context as fits, and whether each is the first choice."""
        tokens = [*context_ids, *ids][-(self.longest + 1) :]
        log_p = self.log_probabilities(tokens[:-1])[-len(ids) :]
        chosen = torch.tensor(tokens[-len(ids) :])
        return float(log_p.gather(1, chosen[:, None]).sum()), bool((log_p.argmax(1) == chosen).all())

    def greedy(self, prompt_ids, most):
        """Ids until the end-of-document token, which is left out, or `most`."""
        made = []
        while len(made) < most:
            token = int(self.log_probabilities([*prompt_ids, *made][-self.longest :])[-1].argmax())
            if token == self.run.tokenizer.eos_id:
                break
            made.append(token)
        return made
