"""The formulas of traffic and memory against cases worked out by hand."""

import math

import pytest
import torch
import torch.distributed as dist

from tests.support.tables import planned_route
from tide_mega.memory.traffic import (
    Layout,
    Tables,
    Traffic,
    TrafficMeter,
    Widths,
    dense_sync,
    exchange,
    owner_memory,
    plain_memory,
)

SMALL = Tables(vocab=100, blocks=2, width=5)  # 10 elements a row, 1,000 in all


def test_dense_sync_moves_gradients_and_weights_but_for_the_share_at_home():
    found = dense_sync(SMALL, Layout(data=4))
    # 3/4 of 1,000 elements x 2 bytes, once for gradients and once for weights
    assert found.sent == found.received == {"table gradients": 1500, "table weights": 1500}
    assert dense_sync(SMALL, Layout(data=4), Widths(gradient=4)).sent["table gradients"] == 3000


def test_dense_sync_is_divided_by_tensor_parallelism_and_absent_on_one_replica():
    assert dense_sync(SMALL, Layout(tensor=2, data=4)).total_sent == 1500
    assert dense_sync(SMALL, Layout(tensor=2, data=1)).total_sent == 0


def test_the_paper_size_of_8_blocks_takes_8_4_gigabytes_without_the_ring_factor():
    tables = Tables(vocab=128_256, blocks=8, width=2048)
    found = dense_sync(tables, Layout(data=32))
    assert found.total_sent == pytest.approx(8.4054e9 * 31 / 32, rel=1e-4)
    assert found.seconds(400) == pytest.approx(0.16286, rel=1e-3)


def test_exchange_over_data_parallelism_counts_ids_rows_and_gradients():
    found = exchange(SMALL, Layout(data=5), distinct=20)
    # 16 of 20 rows are not at home: ids of 8 bytes, rows of 20 bytes, gradients of 20 bytes
    assert found.sent == found.received == {"ids": 128, "rows": 320, "row gradients": 320}
    assert (found.total_sent, found.each_way, found.waited_for) == (768, 768, 768)


def test_without_ids_the_exchange_is_v_over_u_times_smaller():
    layout = Layout(data=7)
    moved = exchange(SMALL, layout, distinct=25, widths=Widths(id=0))
    assert dense_sync(SMALL, layout).each_way / moved.each_way == pytest.approx(100 / 25)


def test_one_owner_exchanges_nothing():
    assert exchange(SMALL, Layout(), distinct=50).each_way == 0


def test_tensor_ranks_ask_for_parts_and_gather_them():
    found = exchange(SMALL, Layout(tensor=2, data=2), distinct=20)
    # each asks for 10 rows, 7.5 of them elsewhere; the other half of the 20 comes from its neighbour
    assert found.sent == {"ids": 60, "rows": 150, "row gradients": 150, "tensor rows": 200}
    assert found.received == found.sent


def test_sequence_parallelism_sums_gradients_in_fp32():
    found = exchange(SMALL, Layout(tensor=2, data=2, sequence_parallel=True), distinct=20)
    assert found.sent["sequence sum"] == found.received["sequence sum"] == 2 * 0.5 * 20 * 10 * 4


def test_a_pipeline_broadcasts_rows_and_sums_gradients():
    found = exchange(SMALL, Layout(data=2, pipeline=4), distinct=20)
    assert found.sent["stage rows"] == 20 * 10 * 2
    assert "stage rows" not in found.received
    assert found.sent["stage sum"] == found.received["stage sum"] == 2 * 0.75 * 20 * 10 * 4


def test_a_busy_owner_delays_rows_on_their_way_out_and_gradients_on_their_way_in():
    found = exchange(SMALL, Layout(data=5), distinct=20, skew=3)
    assert found.sent == {"ids": 128, "rows": 960, "row gradients": 320}
    assert found.received == {"ids": 384, "rows": 320, "row gradients": 960}
    assert found.waited_for == 3 * 768


def test_traffic_is_divided_into_inside_and_between_replicas():
    layout = Layout(tensor=2, data=2, pipeline=2, sequence_parallel=True)
    found = exchange(SMALL, layout, distinct=20)
    assert found.between().sent == {"ids": 60, "rows": 150, "row gradients": 150}
    assert found.inside().sent == {
        "tensor rows": 200,
        "sequence sum": 800,
        "stage rows": 400,
        "stage sum": 800,
    }
    assert found.inside().received == {"tensor rows": 200, "sequence sum": 800, "stage sum": 800}
    assert dense_sync(SMALL, layout).inside().each_way == 0


def test_time_is_of_the_busier_direction_of_each_kind():
    traffic = Traffic({"out": 3e9, "both": 1e9}, {"both": 2e9})
    assert traffic.waited_for == 5e9
    assert traffic.seconds(400) == pytest.approx(0.1)
    with pytest.raises(ValueError, match=r"gigabits=0"):
        traffic.seconds(0)


@pytest.mark.parametrize("distinct", [-1, 101])
def test_more_types_than_rows_are_refused(distinct):
    for function in (exchange, owner_memory):
        with pytest.raises(ValueError, match=f"distinct={distinct} is not within 0 to the 100 rows"):
            function(SMALL, Layout(data=2), distinct)


def test_impossible_layouts_and_skews_are_refused():
    with pytest.raises(ValueError, match="data=0"):
        Layout(data=0)
    with pytest.raises(ValueError, match="skew=9 is not within 0 to the 2 owners"):
        exchange(SMALL, Layout(data=2), 10, skew=9)


def test_plain_memory_by_hand():
    found = plain_memory(SMALL, Layout(tensor=2, data=5), microbatch_tokens=30)
    assert found == {
        "weights": 500 * 2,
        "gradients": 500 * 2,
        "optimizer state": 500 * 12 / 5,
        "M": 30 * 10 * 2,
        "gradient of M": 30 * 10 * 2,
    }
    assert plain_memory(SMALL, Layout(), 30, in_flight=4)["M"] == 4 * 600


def test_owner_memory_by_hand():
    found = owner_memory(SMALL, Layout(tensor=2, data=4), distinct=20)
    # 13 rows each (100 over 8 owners, rounded up) of 10 elements; 200 elements fetched
    assert found == {
        "weights": 130 * 4,
        "gradients": 130 * 4,
        "optimizer state": 130 * 8,
        "rows": 200 * (2 + 2 + 4),
        "gradient of rows": 200 * (4 + 2 + 2),
    }


def metered_exchange(seed):
    """Return (U, bytes by kind) of an exchange between as many owners as there are processes."""
    group, meter = dist.group.WORLD, TrafficMeter()
    rows_per_owner, blocks, width = 10, 2, 5
    generator = torch.Generator().manual_seed(seed + group.rank())
    # As many rows of each owner, so that the share at home is 1 / n for everyone.
    asked = [
        torch.randperm(rows_per_owner, generator=generator)[:4] * group.size() + owner
        for owner in range(group.size())
    ]
    ids_U = torch.cat(asked).sort().values
    route = planned_route(ids_U, group, meter)
    owned_QKD = torch.zeros(len(route.rows_Q), blocks, width, dtype=torch.bfloat16)
    rows_UKD = route.fetch(owned_QKD, meter).wait()
    route.give_back(torch.zeros_like(rows_UKD), meter)
    return len(ids_U), meter.read()


def test_the_exchange_counts_in_a_run_what_the_formula_predicts(pools):
    for distinct, reading in pools(2).run(metered_exchange, 7):
        predicted = exchange(Tables(vocab=20, blocks=2, width=5), Layout(data=2), distinct)
        assert {kind: moved["sent"] for kind, moved in reading.items()} == predicted.sent
        assert {kind: moved["received"] for kind, moved in reading.items()} == predicted.received


def test_a_paused_meter_counts_nothing_and_goes_on_from_where_it_was():
    meter = TrafficMeter()
    meter.add("rows", 5, 3)
    with pytest.raises(KeyError), meter.paused():
        meter.add("rows", 100, 100)
        meter.add("ids", 7, 7)
        raise KeyError
    meter.add("rows", 1, 1)
    assert meter.read() == {"rows": {"sent": 6, "received": 4}}


def test_collectives_are_counted_as_the_meter_counts_them():
    distinct, tensor, pipeline = 12, 2, 4
    layout = Layout(tensor=tensor, data=2, pipeline=pipeline, sequence_parallel=True)
    predicted = exchange(SMALL, layout, distinct)
    rows, gradient = torch.zeros(distinct, 2, 5, dtype=torch.bfloat16), torch.zeros(distinct, 2, 5)
    meter = TrafficMeter()
    meter.add_gather("tensor rows", rows, tensor)
    meter.add_sum("sequence sum", gradient, tensor)
    meter.add_sum("stage sum", gradient, pipeline)
    meter.add_broadcast("stage rows", rows, pipeline, is_root=True)
    for kind, moved in meter.read().items():
        assert math.isclose(predicted.sent[kind], moved["sent"])
        assert math.isclose(predicted.received.get(kind, 0), moved["received"])
