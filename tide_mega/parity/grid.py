"""The topologies that are checked against the reference."""

from tide_mega.parity.case import Case

_ONE = [
    Case(),
    Case(num_blocks=0),
    Case(num_blocks=8, tie_embeddings=False, accumulation=4),
    Case(zero_stage=2, recompute="selective"),
    Case(recompute="full", accumulation=1),
    Case(zero_stage=3),
    Case(window=2, accumulation=4),
    Case(owners="tensor_data", exchange_ahead=True, table_lr_multiplier=5.0),
    Case(precision="bf16", accumulation=4),
]
_TWO = [
    Case(tensor=2, num_blocks=0, tie_embeddings=False),
    Case(tensor=2, recompute="selective"),
    Case(tensor=2, sequence_parallel=True, num_blocks=8, zero_stage=2, recompute="full"),
    Case(tensor=2, sequence_parallel=True, owners="tensor_data"),
    Case(data=2, num_blocks=0, zero_stage=3, tie_embeddings=False),
    Case(data=2, accumulation=1),
    Case(data=2, zero_stage=2, accumulation=4),
    Case(data=2, zero_stage=3, num_blocks=8, recompute="full"),
    Case(data=2, owners="tensor_data", vocab_size=61, table_lr_multiplier=3.0),
    Case(data=2, owners="tensor_data", window=1, accumulation=4),
    Case(data=2, owners="tensor_data", zero_stage=2, exchange_ahead=True, num_blocks=8),
    Case(pipeline=2, num_blocks=0, accumulation=4),
    Case(pipeline=2, tie_embeddings=False, accumulation=1),
    Case(pipeline=2, owners="tensor_data", window=2, accumulation=4),
    Case(pipeline=2, virtual_pipeline=2, accumulation=4),
    Case(tensor=2, precision="bf16", accumulation=4),
    Case(data=2, precision="bf16", zero_stage=2, accumulation=4),
    Case(data=2, precision="bf16", zero_stage=3),
    Case(data=2, precision="bf16", owners="tensor_data", accumulation=4),
    Case(pipeline=2, precision="bf16", accumulation=4),
]
_FOUR = [
    Case(data=4, zero_stage=3),
    Case(data=4, owners="tensor_data", zero_stage=2, vocab_size=61),
    Case(tensor=2, data=2, num_blocks=0, accumulation=4),
    Case(tensor=2, data=2, sequence_parallel=True, zero_stage=2),
    Case(tensor=2, data=2, sequence_parallel=True, zero_stage=3, num_blocks=8),
    Case(tensor=2, data=2, sequence_parallel=True, owners="tensor_data", recompute="selective"),
    Case(tensor=2, pipeline=2, sequence_parallel=True, exchange_ahead=True),
    Case(
        tensor=2, pipeline=2, virtual_pipeline=2, owners="tensor_data", accumulation=4, tie_embeddings=False
    ),
    Case(pipeline=2, data=2, num_blocks=8, recompute="full", accumulation=4),
    Case(pipeline=2, data=2, owners="tensor_data", zero_stage=2, exchange_ahead=True),
    Case(pipeline=2, virtual_pipeline=2, data=2, zero_stage=2, window=2, accumulation=4),
    Case(pipeline=4, accumulation=4),
    Case(tensor=2, data=2, sequence_parallel=True, precision="bf16", owners="tensor_data", zero_stage=2),
]
_EIGHT = [
    Case(tensor=2, pipeline=2, data=2, sequence_parallel=True),
    Case(
        tensor=2,
        pipeline=2,
        data=2,
        sequence_parallel=True,
        zero_stage=2,
        owners="tensor_data",
        exchange_ahead=True,
        vocab_size=62,
    ),
    Case(
        tensor=2,
        pipeline=2,
        virtual_pipeline=2,
        data=2,
        num_blocks=8,
        recompute="full",
        accumulation=4,
        tie_embeddings=False,
    ),
    Case(tensor=2, data=4, sequence_parallel=True, owners="tensor_data", window=1, accumulation=4),
    Case(tensor=2, pipeline=4, sequence_parallel=True, recompute="selective", accumulation=4),
    Case(pipeline=4, data=2, owners="tensor_data", zero_stage=2, accumulation=4),
    Case(pipeline=2, data=4, num_blocks=0, zero_stage=2, accumulation=1),
    Case(tensor=2, pipeline=2, data=2, precision="bf16", zero_stage=2, owners="tensor_data", accumulation=4),
]
FULL = [*_ONE, *_TWO, *_FOUR, *_EIGHT]
QUICK = [
    *(_ONE[0], _ONE[2], _ONE[-1]),
    Case(tensor=2, sequence_parallel=True, zero_stage=2, recompute="full"),
    Case(data=2, zero_stage=3),
    Case(data=2, owners="tensor_data", window=1, accumulation=4),
    Case(pipeline=2, tie_embeddings=False, accumulation=4),
    Case(tensor=2, data=2, sequence_parallel=True, owners="tensor_data", exchange_ahead=True),
    Case(tensor=2, pipeline=2, virtual_pipeline=2, sequence_parallel=True, num_blocks=8, accumulation=4),
    Case(pipeline=2, data=2, owners="tensor_data", zero_stage=2),
]
GRIDS = {"full": FULL, "quick": QUICK}
