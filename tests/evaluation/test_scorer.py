"""Log-likelihoods, rolling and greedy text against the plain reference with the same weights."""

import random

import pytest

from tests.evaluation.texts import documents, pairs, words
from tests.evaluation.tiny import text_scorer
from tide_mega.evaluation.errors import EvaluationError
from tide_mega.evaluation.spans import encode_pair, windows


def reference_pairs(oracle, requests):
    expected = []
    for context, continuation in requests:
        head, tail, _ = encode_pair(oracle.run.tokenizer, context, continuation)
        parts = [
            oracle.score(span.tokens[: -span.scored], span.tokens[-span.scored :])
            for span in (windows(head, tail, oracle.longest) if tail else ())
        ]
        expected.append((sum(nats for nats, _ in parts), all(top for _, top in parts)))
    return expected


def assert_alike(results, expected, tolerance=1e-4):
    assert len(results) == len(expected)
    for (nats, greedy), (nats_expected, greedy_expected) in zip(results, expected, strict=True):
        assert nats == pytest.approx(nats_expected, abs=tolerance)
        assert greedy == greedy_expected


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_log_likelihoods_are_the_references_whatever_the_batch(run, oracle, alone, batch):
    scorer = text_scorer(run, alone, batch)
    assert_alike(scorer.loglikelihood(pairs()), reference_pairs(oracle, pairs()))
    counts = scorer.counts
    assert (counts.requests, counts.truncated, counts.windowed) == (len(pairs()), 1, 1)


def test_what_the_model_would_say_itself_is_greedy(oracle, scorer):
    prompt = oracle.encode("import os def")
    made = oracle.greedy(prompt, 3)
    likely = "".join(oracle.run.tokenizer.decode(made))
    assert encode_pair(oracle.run.tokenizer, "import os def", likely)[:2] == (prompt, made)
    requests = [("import os def", likely), ("import os def", " zebra")]
    results = scorer.loglikelihood(requests)
    assert [greedy for _, greedy in results] == [True, False]
    assert_alike(results, reference_pairs(oracle, requests))


def test_a_long_context_keeps_its_end(oracle, scorer):
    head, tail, _ = encode_pair(oracle.run.tokenizer, pairs()[15][0], pairs()[15][1])
    assert len(head) + len(tail) > oracle.longest + 1
    kept = head[-(oracle.longest + 1 - len(tail)) :]
    assert_alike(scorer.loglikelihood([pairs()[15]]), [oracle.score(kept, tail)])


def test_results_come_in_the_order_of_the_requests(scorer):
    requests = pairs(3)
    backwards = scorer.loglikelihood(requests[::-1])[::-1]
    assert_alike(scorer.loglikelihood(requests), backwards, tolerance=1e-5)


def test_rolling_is_the_references_sum_over_windows(oracle, scorer):
    expected = []
    for text in documents():
        ids, total = [oracle.run.tokenizer.eos_id, *oracle.encode(text)], 0.0
        first = 1
        while first < len(ids):
            last = min(first + oracle.longest, len(ids))
            total += oracle.score(ids[:first], ids[first:last])[0]
            first = last
        expected.append(total)
    assert scorer.loglikelihood_rolling(documents()) == pytest.approx(expected, abs=1e-4)
    assert expected[-1] == 0.0 and expected[-2] < -200


def prompts():
    return ["import os", "", "def value(self", words(random.Random(2), 50), "class path"]


def test_generation_is_naive_greedy_decoding(oracle, scorer):
    most = [5, 3, 40, 8, 1]
    made = scorer.generate(
        [(p, {"until": [], "max_gen_toks": n}) for p, n in zip(prompts(), most, strict=True)]
    )
    for prompt, n, text in zip(prompts(), most, made, strict=True):
        ids = oracle.greedy(oracle.encode(prompt) or [oracle.run.tokenizer.eos_id], n)
        assert text == oracle.run.tokenizer.decode(ids)
        assert text


def test_generation_ends_before_the_earliest_stop_sequence(oracle, scorer):
    whole = oracle.run.tokenizer.decode(oracle.greedy(oracle.encode("def value(self"), 12))
    early, late = whole[3:5], whole[8:10]
    arguments = [{"until": [late, early]}, {"until": early}, {"until": ["never this"], "max_gen_toks": 12}]
    made = scorer.generate([("def value(self", {"max_gen_toks": 12, **a}) for a in arguments])
    cut = whole[: min(whole.find(early), whole.find(late))]
    assert made == [cut, whole[: whole.find(early)], whole]


def test_nothing_is_generated_where_nothing_is_wanted(scorer):
    assert scorer.generate([("import os", {"max_gen_toks": 0})]) == [""]
    assert scorer.generate([]) == [] and scorer.loglikelihood([]) == []


def test_an_end_of_document_ends_the_text(run, scorer, monkeypatch):
    replica = scorer.replicas.scorer
    script = iter([[5, 6], [7, run.tokenizer.eos_id], [run.tokenizer.eos_id]])
    monkeypatch.setattr(replica, "_next_tokens", lambda sequences: next(script))
    made = scorer.generate([("import os", {"max_gen_toks": 9}), ("def", {"max_gen_toks": 9})])
    assert made == [run.tokenizer.decode([5, 7]), run.tokenizer.decode([6])]


def test_sampled_text_is_refused(scorer):
    with pytest.raises(EvaluationError, match="only greedy decoding"):
        scorer.generate([("import os", {"do_sample": True, "temperature": 0.7})])


def test_bf16_is_near(run, scorer, alone):
    rounded = text_scorer(run, alone, precision="bf16")
    for (exact, _), (near, _) in zip(
        scorer.loglikelihood(pairs()), rounded.loglikelihood(pairs()), strict=True
    ):
        assert near == pytest.approx(exact, rel=0.02, abs=0.2)
