"""Bytes the mix must move: the floor of its time, once they are divided by the memory's bandwidth."""


def mix_floor_bytes(
    *, tokens: int, width: int, blocks: int, rows: int, layers: int, element: int
) -> dict[str, int]:
    """Count each tensor that must come from or go to memory, once; N tokens, D width, K blocks, U rows, L layers.

    order, once: token rows read (8 N) and kept (4 N), tokens by row (4 N) and where each row begins (4 U) written.

    forward, each layer: router logits (N (K+1) e), residual (N D e), FFN output (N D e), distinct rows (U K D e)
    and token rows (4 N) read; output (N D e) and router weights (4 N (K+1)) written.

    backward, each layer: the output's gradient (N D e), distinct rows again for the weights' gradient (U K D e),
    router weights (4 N (K+1)) and token rows (4 N) read; the logits' gradient (N (K+1) e) written. The
    gradients of residual and FFN output are the output's own: nothing moves.

    row gradient, once: of each layer the output's gradient (L N D e) and router weights (4 L N (K+1)) read,
    with tokens by row (4 N) and where each row begins (4 U); the fp32 sum (4 U K D) written.

    A version may move more (rows that fall out of the cache between tokens of one type, temporaries) or, where
    a cache is as large as a tensor, less.

    Args:
        tokens: of a microbatch.
        width: D.
        blocks: K.
        rows: distinct types of the microbatch.
        layers: that add to one row gradient.
        element: bytes of a value of rows and hidden states (e).
    """
    hidden, board, banks = tokens * width, rows * blocks * width, tokens * (blocks + 1)
    forward = element * (3 * hidden + board + banks) + 4 * (banks + tokens)
    backward = element * (hidden + board + banks) + 4 * (banks + tokens)
    return {
        "order": 16 * tokens + 4 * rows,
        "forward": layers * forward,
        "backward": layers * backward,
        "row gradient": layers * (element * hidden + 4 * banks) + 4 * (tokens + rows + board),
    }
