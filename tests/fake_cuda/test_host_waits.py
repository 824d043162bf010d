"""How often the host waits for the device in a step, place by place: to hold a number, write it here.

A test of a place that must not wait any more is its line taken out; a new wait is a new line with its reason in
`allowed`. `Seen.waits` is the count of the third step of a training, its data loading included.
"""

from collections import Counter

import pytest

from tide_mega.dryrun.recorder import Wait

pytestmark = pytest.mark.fake_cuda

OF_EVERY_STEP = {
    ("deepspeed/runtime/zero/stage_1_and_2.py:DeepSpeedZeroOptimizer.has_overflow", "item"): 1,
    ("tide_mega/training/faults/policy.py:take_vote", "tolist"): 1,
}
WAITS = {
    "baseline": OF_EVERY_STEP
    | {
        # Once for each group of parameters, of which the baseline has two.
        ("deepspeed/runtime/utils.py:is_invalid_grad_norm", "item"): 3,
        ("deepspeed/runtime/utils.py:mask_nan_or_inf_with_val_inplace", "copy to device"): 2,
    },
    "owners of all": OF_EVERY_STEP
    | {
        ("deepspeed/runtime/utils.py:is_invalid_grad_norm", "item"): 1,
        ("deepspeed/runtime/utils.py:mask_nan_or_inf_with_val_inplace", "copy to device"): 4,
        ("tide_mega/memory/plan.py:plan_rows", "tolist"): 1,
        ("tide_mega/parallel/engine.py:Engine._clip_together", "item"): 2,
    },
}
"""By topology: the baseline (K = 0), and K = 8 with owners=tensor_data as in the presets."""


@pytest.mark.parametrize("name", WAITS)
def test_the_host_waits_as_often_as_is_written(trained, name):
    expected = Counter({Wait(*key): times for key, times in WAITS[name].items()})
    assert dict(trained(name).step.waits) == dict(expected)
