"""Log-likelihoods, rolling and greedy text against the plain reference with the same weights."""

import math
import random

import pytest

from tests.zero_shot.texts import WORDS, documents, pairs, words
from tests.zero_shot.tiny import text_scorer
from tide_mega.errors import EvaluationError
from tide_mega.lab.zero_shot.scorer import _cut, encode_pair, windows


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
    encoded = [encode_pair(run.tokenizer, *pair)[:2] for pair in pairs()]
    windowed = sum(len(tail) > oracle.longest for _, tail in encoded)
    too_long = sum(len(head) + len(tail) > oracle.longest + 1 for head, tail in encoded)
    counts = scorer.counts
    assert (counts.requests, counts.truncated, counts.windowed) == (
        len(pairs()),
        too_long - windowed,
        windowed,
    )
    assert too_long > windowed > 0


def greedy_request(oracle, prompt):
    """The longest text of the model's own choice, up to three tokens, that is encoded again as it was made."""
    ids = oracle.encode(prompt)
    for most in (3, 2, 1):
        made = oracle.greedy(ids, most)
        text = oracle.run.tokenizer.decode(made)
        if encode_pair(oracle.run.tokenizer, prompt, text)[:2] == (ids, made):
            return prompt, text
    return None


def test_what_the_model_would_say_itself_is_greedy(oracle, scorer):
    likely = [request for word in WORDS if (request := greedy_request(oracle, f"import {word}"))]
    assert len(likely) > 3
    requests = [*likely, *((prompt, " zebra") for prompt, _ in likely)]
    results = scorer.loglikelihood(requests)
    assert [greedy for _, greedy in results] == [True] * len(likely) + [False] * len(likely)
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
    assert any(made)


def naively_cut(oracle, ids, stops):
    """The text as it is when a stop sequence first shows, without it."""
    texts = [oracle.run.tokenizer.decode(ids[: n + 1]) for n in range(len(ids))]
    for text in texts:
        if found := [text.find(stop) for stop in stops if stop in text]:
            return text[: min(found)]
    return texts[-1]


def test_generation_ends_before_the_earliest_stop_sequence(oracle, scorer):
    ids = oracle.greedy(oracle.encode("def value(self"), 12)
    whole = oracle.run.tokenizer.decode(ids)
    early, late = whole[len(whole) // 3 :][:2], whole[-2:]
    assert early and late
    wanted = [[late, early], [early], [late], ["never this"]]
    arguments = [{"until": stops, "max_gen_toks": 12} for stops in wanted[:3]]
    arguments += [{"until": "never this", "max_gen_toks": 12}]
    made = scorer.generate([("def value(self", a) for a in arguments])
    assert made == [naively_cut(oracle, ids, stops) for stops in wanted]
    assert made[3] == whole and len(made[0]) < len(whole)


@pytest.mark.parametrize(
    ("stops", "cut"), [(["d", "b"], ("a ", True)), (["x"], ("a b c d", False)), ([""], ("a b c d", False))]
)
def test_text_is_cut_at_the_earliest_of_several_stops(stops, cut):
    assert _cut("a b c d", stops) == cut


def test_the_model_sees_as_much_of_the_growing_text_as_fits(oracle, scorer, monkeypatch):
    replica, seen = scorer.replicas.scorer, []
    monkeypatch.setattr(replica, "_next_tokens", lambda sequences: (seen.extend(sequences), [5])[1])
    prompt = " ".join(WORDS[:8])
    scorer.generate([(prompt, {"max_gen_toks": 40})])
    ids = oracle.encode(prompt)
    assert seen == [tuple([*ids, *[5] * n][-oracle.longest :]) for n in range(40)]
    assert len(seen[-1]) == oracle.longest


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


def test_a_broken_checkpoint_is_an_error_and_no_score(run, alone):
    broken = text_scorer(run, alone)
    for weight in broken.replicas.scorer.model.stage.parameters():
        weight.fill_(math.nan)
    with pytest.raises(
        EvaluationError, match=r"^2 of 2 log-likelihoods of k2 \(/.*/step-0+6\) are not finite"
    ):
        broken.loglikelihood([("import os", " def"), ("class", " path")])
    with pytest.raises(EvaluationError, match=r"1 of 1 greedy choices of k2 \(/.*\) are not finite"):
        broken.generate([("import os", {"max_gen_toks": 2})])


def test_bf16_is_near(run, scorer, alone):
    rounded = text_scorer(run, alone, precision="bf16")
    for (exact, _), (near, _) in zip(
        scorer.loglikelihood(pairs()), rounded.loglikelihood(pairs()), strict=True
    ):
        assert near == pytest.approx(exact, rel=0.02, abs=0.2)
