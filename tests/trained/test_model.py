"""The opened model against the plain reference with the same stored weights."""

import weakref

import pytest
import torch

from tests.support.checkpoints import config_at
from tests.support.runs import train_here
from tests.support.trained import reference_of
from tide_mega.config.schema import ParallelConfig
from tide_mega.data.loader import TokenBatch
from tide_mega.lab.parity.run import relative
from tide_mega.memory.memory import Memory
from tide_mega.trained.model import TrainedModel
from tide_mega.trained.run import TrainedRun


def batch_of(seed=0, shape=(3, 20)):
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = (torch.randint(640, shape, generator=generator) for _ in range(2))
    labels[0, :4] = -1
    return TokenBatch(tokens, labels)


@pytest.mark.parametrize("k", [0, 2])
def test_scores_are_the_references(tiny_runs, alone, k):
    run = TrainedRun.open(tiny_runs[k])
    model, reference = TrainedModel(run, alone), reference_of(run)
    batches = [batch_of(0), batch_of(1)]
    # Labels that the model would choose itself, so that both answers occur.
    batches[1].labels_BT[:, ::2] = reference.logits(batches[1].tokens_BT)[0].argmax(-1)[:, ::2]
    for batch, scored in zip(batches, model.score(batches, routers="null"), strict=True):
        logits_BTV, alphas = reference.logits(batch.tokens_BT)
        expected = reference(batch.tokens_BT, batch.labels_BT)
        torch.testing.assert_close(scored.cross_entropy_BT, expected.cross_entropy_BT, rtol=0, atol=2e-6)
        is_top_BT = (logits_BTV.argmax(-1) == batch.labels_BT) & (batch.labels_BT >= 0)
        assert torch.equal(scored.is_top_BT, is_top_BT)
        if k:
            torch.testing.assert_close(scored.null_weight_LBT, torch.stack([a[..., -1] for a in alphas]))
    assert is_top_BT.any() and not is_top_BT.all()


@pytest.mark.parametrize("k", [0, 2])
def test_inside_are_the_references_hidden_states_and_weights(tiny_runs, alone, k):
    run = TrainedRun.open(tiny_runs[k])
    reference, tokens_BT = reference_of(run), batch_of().tokens_BT
    hidden = []
    for layer in reference.layers:
        layer.register_forward_hook(lambda _, __, output: hidden.append(output[0]))
    _, alphas = reference.logits(tokens_BT)
    inside = TrainedModel(run, alone).look_inside(tokens_BT)
    torch.testing.assert_close(inside.hidden_LBTD, torch.stack(hidden), rtol=0, atol=2e-6)
    if k:
        torch.testing.assert_close(inside.alpha_LBTJ, torch.stack(alphas), rtol=0, atol=2e-6)
    else:
        assert inside.alpha_LBTJ is None


def test_row_gradients_are_the_references(tiny_runs, alone):
    run = TrainedRun.open(tiny_runs[2])
    reference, batch = reference_of(run), batch_of()
    inputs = []
    reference.embedding.register_forward_hook(lambda _, __, out: (out.retain_grad(), inputs.append(out))[0])
    reference(batch.tokens_BT, batch.labels_BT).loss.backward()
    gradients = TrainedModel(run, alone).row_gradients(batch)
    assert torch.equal(gradients.ids_U, batch.tokens_BT.unique())
    assert int(gradients.counts_U.sum()) == batch.tokens_BT.numel()
    expected_UKD = reference.memory.tables_KVD.grad[:, gradients.ids_U].transpose(0, 1)
    assert relative(gradients.tables_UKD, expected_UKD) < 1e-5
    expected_VD = torch.zeros(640, 32).index_add_(0, batch.tokens_BT.flatten(), inputs[0].grad.flatten(0, 1))
    assert relative(gradients.embedding_UD, expected_VD[gradients.ids_U]) < 1e-5
    assert gradients.tables_UKD.abs().max() > 0


class Held:
    """A tensor kept for the backward pass, counted while it is."""

    now = most = 0

    def __init__(self, tensor):
        self.tensor = tensor
        Held.now += tensor.numel()
        Held.most = max(Held.most, Held.now)

    def __del__(self):
        Held.now -= self.tensor.numel()


def most_held(model, batch):
    Held.now = Held.most = 0
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        gradients = model.row_gradients(batch)
    return Held.most, gradients


def test_row_gradients_hold_the_activations_of_one_layer_at_a_time(tiny_runs, alone):
    model, batch = TrainedModel(TrainedRun.open(tiny_runs[2]), alone), batch_of(shape=(4, 32))
    least, gradients = most_held(model, batch)
    model.stage.transformers[0].decoder.config.recompute_granularity = None
    most, same = most_held(model, batch)
    assert relative(gradients.tables_UKD, same.tables_UKD) < 1e-6
    assert least < 0.7 * most, "of two layers"


def test_kernels_that_the_training_chose_do_not_keep_it_from_opening(tiny_runs, alone):
    run = TrainedRun.open(tiny_runs[2])
    run.config.kernels.mix = "triton"
    assert TrainedModel(run, alone).score([batch_of()])[0].cross_entropy_BT.isfinite().all()


def test_row_gradients_leave_none_on_parameters(tiny_runs, alone):
    model = TrainedModel(TrainedRun.open(tiny_runs[0]), alone)
    assert model.row_gradients(batch_of()).tables_UKD is None
    assert all(parameter.grad is None for parameter in model.stage.parameters())


def test_a_silenced_layer_leaves_the_memory_out_and_only_within(tiny_runs, alone):
    run = TrainedRun.open(tiny_runs[2])
    model, reference, batch = TrainedModel(run, alone), reference_of(run), batch_of()

    with model.silenced(1):
        silent = model.score([batch])[0].cross_entropy_BT
    with_all = model.score([batch])[0].cross_entropy_BT
    layer = reference.layers[1]
    plain = layer.forward

    def forward(h_BTD, memory_BTKD):
        out_BTD, alpha = plain(h_BTD, memory_BTKD)
        return out_BTD - torch.einsum("btk,btkd->btd", alpha[..., :-1], memory_BTKD), alpha

    layer.forward = forward
    expected = reference(batch.tokens_BT, batch.labels_BT).cross_entropy_BT
    torch.testing.assert_close(silent, expected, rtol=0, atol=3e-6)
    assert (with_all - silent).abs().max() > 1e-4


def losses(model, batch):
    return model.score([batch])[0].cross_entropy_BT


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_models_own_rows_read_from_outside_change_no_bit(tiny_runs, alone, precision):
    model, batch = TrainedModel(TrainedRun.open(tiny_runs[2]), alone, precision=precision), batch_of()
    own, asked = losses(model, batch), []

    def rows_of(ids_U):
        asked.append(ids_U)
        return model.normalised(model.table_rows(ids_U))

    with model.reading(rows_of):
        assert torch.equal(losses(model, batch), own)
    assert [ids_U.tolist() for ids_U in asked] == [batch.tokens_BT.unique().tolist()]


def test_rows_of_zeros_are_all_layers_silenced_and_only_within(tiny_runs, alone):
    model, batch = TrainedModel(TrainedRun.open(tiny_runs[2]), alone), batch_of()
    own = losses(model, batch)
    with model.silenced(0, 1):
        silent = losses(model, batch)
    with model.reading(lambda ids_U: torch.zeros(len(ids_U), 2, 32)):
        assert torch.equal(losses(model, batch), silent)
    assert torch.equal(losses(model, batch), own) and not torch.equal(own, silent)


def test_rows_that_are_not_the_models_are_refused(tiny_runs, alone):
    model, batch = TrainedModel(TrainedRun.open(tiny_runs[2]), alone), batch_of()
    for rows in (torch.zeros(1, 2, 32), torch.zeros(len(batch.tokens_BT.unique()), 2, 32).bfloat16()):
        with (
            pytest.raises(ValueError, match=r"must be \[\d+, 2, 32\] in torch.float32"),
            model.reading(lambda _, rows=rows: rows),
        ):
            losses(model, batch)
    with (
        pytest.raises(ValueError, match="no memory"),
        TrainedModel(TrainedRun.open(tiny_runs[0]), alone).reading(torch.zeros_like),
    ):
        pass


def test_an_earlier_checkpoint_is_another_model(tiny_runs, alone):
    run, batch = TrainedRun.open(tiny_runs[2]), batch_of()
    early, late = (
        TrainedModel(run, alone, weights=weights).score([batch])[0].cross_entropy_BT
        for weights in run.history
    )
    assert not torch.equal(early, late)


def test_a_pass_that_fails_leaves_nothing_in_the_memory(tiny_runs, alone, monkeypatch):
    model = TrainedModel(TrainedRun.open(tiny_runs[2]), alone)
    memory, batch = model.stage.memory, batch_of()
    before = model.score([batch], routers="null")[0]

    def fail(*_, **__):
        raise RuntimeError("planted")

    with monkeypatch.context() as patch:
        patch.setattr("tide_mega.model.steps.run_microbatches", fail)
        for routers in ("nothing", "null", "all"):
            with pytest.raises(RuntimeError, match="planted"):
                model.score([batch], routers=routers)
            assert (memory.alpha_L, memory.rows_UKD, memory.sink) == (None, None, None)
        with pytest.raises(RuntimeError, match="planted"):
            model.row_gradients(batch)
        assert (memory.rows_UKD, memory.sink) == (None, None)
    after = model.score([batch], routers="null")[0]
    assert torch.equal(before.null_weight_LBT, after.null_weight_LBT)


def test_a_reading_that_is_over_holds_no_rows(tiny_runs, alone, monkeypatch):
    model = TrainedModel(TrainedRun.open(tiny_runs[2]), alone)
    fetched, held = Memory._fetched, []

    def seen(self, *args):
        origin = fetched(self, *args)
        held.append(weakref.ref(origin.memory_UKD))
        return origin

    monkeypatch.setattr(Memory, "_fetched", seen)
    model.score([batch_of()])
    assert [reference() for reference in held] == [None]


def test_router_weights_that_nobody_asked_for_are_not_collected(tiny_runs, alone, monkeypatch):
    model = TrainedModel(TrainedRun.open(tiny_runs[2]), alone)
    monkeypatch.setattr(Memory, "null_weights", None)
    (scored,) = model.score([batch_of()])
    assert scored.null_weight_LBT is None and scored.alpha_LBTJ is None


def scores_here(path, words, batch):
    from tide_mega.parallel.device import choose_device

    model = TrainedModel(TrainedRun.open(path), choose_device("cpu", 0), parallel=ParallelConfig(**words))
    scored = model.score([batch, batch], routers="null")[1]
    return scored.cross_entropy_BT, scored.is_top_BT, scored.null_weight_LBT


@pytest.mark.parametrize("words", [{"tensor": 2}, {"pipeline": 2}, {"tensor": 2, "sequence_parallel": True}])
def test_shards_of_a_model_say_the_same(tiny_runs, pools, alone, words):
    batch = batch_of()
    (one,) = TrainedModel(TrainedRun.open(tiny_runs[2]), alone).score([batch], routers="null")
    last = pools(2).run(scores_here, tiny_runs[2], words, batch)[-1]
    torch.testing.assert_close(last[0], one.cross_entropy_BT, rtol=0, atol=2e-6)
    assert torch.equal(last[1], one.is_top_BT)
    torch.testing.assert_close(last[2], one.null_weight_LBT, rtol=0, atol=2e-6)


def test_bf16_is_near(tiny_runs, alone):
    run, batch = TrainedRun.open(tiny_runs[2]), batch_of()
    (exact,), (rounded,) = (TrainedModel(run, alone, precision=p).score([batch]) for p in ("fp32", "bf16"))
    assert 0 < (exact.cross_entropy_BT - rounded.cross_entropy_BT).abs().max() < 0.05


def looks_into_a_shard(path, tokens_BT):
    from tide_mega.parallel.device import choose_device

    parallel = ParallelConfig(tensor=2)
    model = TrainedModel(TrainedRun.open(path), choose_device("cpu", 0), parallel=parallel)
    with pytest.raises(ValueError, match="only a model in one process"):
        model.look_inside(tokens_BT)
    with pytest.raises(ValueError, match="only a model in one process"), model.reading(torch.zeros_like):
        pass


def test_a_shard_is_not_looked_into(tiny_runs, pools):
    pools(2).run(looks_into_a_shard, tiny_runs[2], batch_of().tokens_BT)


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["dp2 zero2 owners", "pp2 vpp2", "zero3 dp2", "tp2 sp"])
def test_a_checkpoint_saved_by_many_opens_in_one(pools, tiny_data, tmp_path, alone, topology):
    config = config_at(topology, tiny_data, tmp_path, "memory.router_init_std=0.5", "trainer.max_steps=3")
    pools(2).run(train_here, config)
    run, batch = TrainedRun.open(tmp_path / "tiny"), batch_of()
    assert len(list(run.weights.path.glob("rank-*.safetensors"))) == 2
    (scored,) = TrainedModel(run, alone).score([batch])
    expected = reference_of(run)(batch.tokens_BT, batch.labels_BT)
    torch.testing.assert_close(scored.cross_entropy_BT, expected.cross_entropy_BT, rtol=0, atol=3e-6)
