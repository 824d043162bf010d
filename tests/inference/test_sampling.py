"""Drawing tokens: against the probabilities by hand, and each request by itself."""

import pytest
import torch

from tide_mega.errors import ConfigError, GenerationError
from tide_mega.inference import sampling as sampling_module
from tide_mega.inference.sampling import Sampler, Sampling, draw

LOGITS_V = torch.tensor([0.3, 2.0, -1.0, 1.5, 0.0, -3.0])
CPU = torch.device("cpu")


def frequencies(sampling, draws=20_000):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([draw(LOGITS_V, sampling, generator) for _ in range(draws)])
    return torch.bincount(drawn, minlength=len(LOGITS_V)) / draws


def allowed_softmax(temperature, allowed):
    scaled_V = LOGITS_V / temperature
    return torch.where(torch.tensor([v in allowed for v in range(6)]), scaled_V, float("-inf")).softmax(-1)


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(1.0), range(6)),
        (Sampling(0.5), range(6)),
        (Sampling(2.0, top_k=3), (1, 3, 0)),
        (Sampling(1.0, top_k=99), range(6)),
        # softmax: 0.505, 0.306, 0.092, 0.068, ... of ids 1, 3, 0, 4
        (Sampling(1.0, top_p=0.4), (1,)),
        (Sampling(1.0, top_p=0.6), (1, 3)),
        (Sampling(1.0, top_p=0.85), (1, 3, 0)),
        # of the three that are left 0.559, 0.339, 0.102
        (Sampling(1.0, top_k=3, top_p=0.85), (1, 3)),
    ],
)
@pytest.mark.parametrize("first_look", [1024, 2], ids=["topk", "sorted"])
def test_draws_follow_the_probabilities_that_are_left(sampling, allowed, first_look, monkeypatch):
    monkeypatch.setattr(sampling_module, "_FIRST_LOOK", first_look)
    found_V, wanted_V = frequencies(sampling, 4000), allowed_softmax(sampling.temperature, allowed)
    assert (found_V - wanted_V).abs().max() < 0.03
    assert not found_V[wanted_V == 0].any()


def test_no_temperature_takes_the_likeliest():
    logits_BV = torch.randn(3, 50)
    sampler = Sampler([Sampling()] * 3, [0] * 3, CPU)
    assert torch.equal(sampler.choose(logits_BV, ["a", "b", "c"], set()), logits_BV.argmax(-1))


def test_what_one_request_draws_depends_on_nothing_else():
    logits_BV = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    drawing = Sampling(1.0, top_p=0.9)

    def drawn(requests, finished=frozenset()):
        sampler = Sampler([s for _, s, _ in requests], [seed for _, _, seed in requests], CPU)
        rows = torch.stack([logits_BV[b] for b, _, _ in requests])
        names = [str(b) for b, _, _ in requests]
        return torch.stack([sampler.choose(rows, names, finished) for _ in range(40)]).T.tolist()

    alone = drawn([(1, drawing, 7)])[0]
    assert len(set(alone)) > 3
    beside = drawn([(0, drawing, 7), (1, drawing, 7), (2, Sampling(), 3)])
    assert beside[1] == alone and beside[0] != alone and len(set(beside[2])) == 1
    assert drawn([(0, drawing, 7), (1, drawing, 7)], {0})[1] == alone
    assert drawn([(1, drawing, 8)])[0] != alone


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_name_the_request(wrong):
    logits_BV = torch.randn(2, 9)
    logits_BV[1, 4] = wrong
    sampler = Sampler([Sampling()] * 2, [0, 0], CPU)
    with pytest.raises(GenerationError, match="line 2: the model's logits are not numbers"):
        sampler.choose(logits_BV, ["line 1", "line 2"], set())
    sampler.choose(logits_BV, ["line 1", "line 2"], {1})
    with pytest.raises(GenerationError):
        sampler.choose(torch.full((2, 9), float("-inf")), ["line 1", "line 2"], set())


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}],
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Sampling(**wrong)
