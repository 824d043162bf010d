"""What a step may do that costs time on a GPU: each place with its reason.

A place is the innermost function of this package, DeepSpeed or megatron-core. To hold the number of host waits of
a step, see `test_host_waits`.
"""

from collections.abc import Iterable, Iterator

from tests.fake_cuda.training import Report, Seen

STAGE_12 = "deepspeed/runtime/zero/stage_1_and_2.py:DeepSpeedZeroOptimizer"
STAGE_3 = "deepspeed/runtime/zero/stage3.py:DeepSpeedZeroOptimizer_Stage3"
DEEPSPEED = "DeepSpeed's own, at every version up to 0.19.8"

STEP_WAITS = {
    ("deepspeed/runtime/utils.py:is_invalid_grad_norm", "item"): DEEPSPEED,
    ("deepspeed/runtime/utils.py:mask_nan_or_inf_with_val_inplace", "copy to device"): DEEPSPEED,
    (
        "deepspeed/runtime/zero/partition_parameters.py:Init._allgather_params_coalesced",
        "synchronize",
    ): DEEPSPEED,
    ("deepspeed/runtime/zero/utils.py:assert_lst_len_same_as_other_ranks", "copy to device"): DEEPSPEED,
    ("deepspeed/runtime/zero/utils.py:assert_lst_len_same_as_other_ranks", "copy to host"): DEEPSPEED,
    ("deepspeed/runtime/zero/utils.py:get_lst_from_rank0", "copy to device"): DEEPSPEED,
    ("deepspeed/runtime/zero/utils.py:get_lst_from_rank0", "copy to host"): DEEPSPEED,
    (f"{STAGE_12}.get_grad_norm_direct", "copy to device"): DEEPSPEED,
    (f"{STAGE_12}.has_overflow", "item"): DEEPSPEED,
    (f"{STAGE_3}.get_grad_norm_direct", "copy to device"): DEEPSPEED,
    (f"{STAGE_3}.independent_gradient_partition_epilogue", "synchronize"): DEEPSPEED,
    ("tide_mega/memory/plan.py:plan_rows", "tolist"): "all sizes of an exchange, once a reading",
    ("tide_mega/parallel/engine.py:Engine._clip_together", "item"): "the norm, after the vote has waited",
    ("tide_mega/training/faults/policy.py:take_vote", "tolist"): "the vote on the step",
}

EVALUATION_WAITS = {
    (
        "tide_mega/kernels/vocab_loss/scores.py:vocab_scores",
        "sized by data",
    ): "labelled tokens alone are scored",
    ("tide_mega/metrics/deciles.py:SumAndCount.reduced", "copy to host"): "the result, once an evaluation",
    ("tide_mega/training/evaluation.py:Evaluator._groups_of", "copy to device"): "its tokens",
}

SNAPSHOT_WAITS = {
    ("tide_mega/checkpoint/contents.py:Contents.snapshot", "synchronize"): "once, for all copies",
    ("tide_mega/memory/owned.py:OwnedTables.updates", "item"): "AdamW's count",
    ("tide_mega/parallel/optimizer_state.py:OptimizerState.updates", "item"): "AdamW's count",
    (f"{STAGE_3}._get_fp32_opt_state_partition", "synchronize"): DEEPSPEED,
}

DOUBLES = {
    "deepspeed/runtime/utils.py:combine_grad_norm_groups": "norms: numbers, not tensors",
    "deepspeed/runtime/utils.py:is_invalid_grad_norm": "norms: numbers, not tensors",
    f"{STAGE_12}.get_grad_norm_direct": "DeepSpeed widens every gradient to fp64 for its norm",
    f"{STAGE_3}.get_grad_norm_direct": "DeepSpeed widens every gradient to fp64 for its norm",
    f"{STAGE_3}.step": "the norm: one number",
    f"{STAGE_3}.unscale_and_clip_grads": "the clip factor: one number",
    "tide_mega/kernels/vocab_loss/scores.py:_of_all_ranks": "ids beside scores: fp64 holds both exactly",
    "tide_mega/kernels/vocab_loss/scores.py:vocab_scores": "ids beside scores, four numbers a token",
    "tide_mega/memory/owned.py:OwnedTables.square_norm": "a sum over rows: one number each",
    "tide_mega/memory/ranges.py:_squares": "one number a row",
    "tide_mega/memory/ranges.py:row_squares": "one number a row",
    "tide_mega/memory/ranges.py:sum_by_block": "one number a row",
    "tide_mega/memory/owned.py:TableGradient.square_norms": "one number a block",
    "tide_mega/metrics/deciles.py:DecileLoss.update": "sums over an evaluation, one number a token",
    "tide_mega/metrics/deciles.py:NullWeight.update": "sums over an evaluation, one number a token and layer",
    "tide_mega/metrics/deciles.py:ExactDecileLoss.update": "exact sums, one number a token",
    "tide_mega/metrics/deciles.py:SumAndCount.reduced": "sums by decile",
    "tide_mega/metrics/deciles.py:SumAndCount.reset": "sums by decile",
    "tide_mega/parallel/engine.py:Engine._clip_together": "the norm: one number",
    "tide_mega/parallel/engine.py:Engine.is_gradient_finite": "the owners' norm: one number",
    "tide_mega/training/faults/policy.py:take_vote": "five numbers a rank",
    "tide_mega/training/report.py:LossWindow.add": "three numbers",
}


def unused(reports: Iterable[Report]) -> list[object]:
    """Return the lines that none of these trainings needs."""
    waits, doubles = set(), set()
    for report in reports:
        for seen in (report.step, report.evaluation, report.snapshot):
            waits |= {(wait.place, wait.kind) for wait in seen.waits}
            doubles |= {place for place, _ in seen.doubles}
    listed = STEP_WAITS | EVALUATION_WAITS | SNAPSHOT_WAITS
    return [*(set(listed) - waits), *(set(DOUBLES) - doubles)]


def complaints(report: Report, dtype: str) -> list[str]:
    """Say what a training did that no list allows; matrices are to be multiplied in `dtype`."""
    return [
        *_of(report.step, "step", STEP_WAITS, dtype),
        *_of(report.evaluation, "evaluation", STEP_WAITS | EVALUATION_WAITS, dtype),
        *_of(report.snapshot, "snapshot", SNAPSHOT_WAITS, dtype),
    ]


def _of(seen: Seen, part: str, waits: dict[tuple[str, str], str], dtype: str) -> Iterator[str]:
    for wait, times in seen.waits.items():
        if (wait.place, wait.kind) not in waits:
            yield f"{part}: {wait.place} makes the host wait {times} times ({wait.kind})"
    for (place, operation), times in seen.doubles.items():
        if place not in DOUBLES:
            yield f"{part}: {place} computes in float64 on the device, {times} times ({operation})"
    for (place, of), times in seen.products.items():
        if of != dtype:
            yield f"{part}: {place} multiplies matrices of {of}, {times} times"
