"""The oracle itself, against the paper's formulas written out for one token at a time."""

import math

import pytest
import torch

from tide_mega.model.reference import ReferenceShape, ReferenceTide, rotate

SHAPE = ReferenceShape(
    num_layers=2,
    hidden_size=16,
    ffn_hidden_size=24,
    num_heads=4,
    num_groups=2,
    vocab_size=20,
    num_blocks=3,
    rope_theta=100.0,
)


def make(shape=SHAPE, seed=0):
    torch.manual_seed(seed)
    model = ReferenceTide(shape).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.5)
    return model


def norm(x, gain, eps=1e-5):
    return x / (sum(v * v for v in x.tolist()) / len(x) + eps) ** 0.5 * gain


def test_one_layer_is_the_papers_equations_token_by_token():
    model = make()
    layer, memory = model.layers[0], model.memory
    tokens = torch.tensor([[3, 7, 3, 19]])
    h = model.embedding(tokens)
    out, alpha = layer(h, memory(tokens))
    attended = h + layer.attention(layer.attention_norm(h))  # (3.1)
    for t, v in enumerate(tokens[0].tolist()):
        n = norm(attended[0, t], layer.ffn_norm.weight)
        logits = [float(w @ n) for w in layer.router.weight]
        z = sum(math.exp(x) for x in logits)
        weights = [math.exp(x) / z for x in logits]  # (3.5), the null bank last
        assert alpha[0, t].tolist() == pytest.approx(weights, rel=1e-10)
        m = sum(
            weights[k] * norm(memory.tables_KVD[k, v], memory.norms[k].weight) for k in range(3)
        )  # the null bank adds nothing
        gate, up = layer.ffn.gate.weight @ n, layer.ffn.up.weight @ n
        ffn = layer.ffn.down.weight @ (gate * torch.sigmoid(gate) * up)
        torch.testing.assert_close(out[0, t], attended[0, t] + ffn + m, rtol=1e-9, atol=1e-9)


def test_attention_is_the_softmax_of_rotated_products_position_by_position():
    model = make()
    attention = model.layers[0].attention
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    expected = torch.zeros(5, 16, dtype=torch.float64)
    C = SHAPE.head_size

    def turned(vector, t):
        half, result = C // 2, vector.clone()
        for i in range(half):
            angle = t * 100.0 ** (-2 * i / C)
            a, b = vector[i], vector[i + half]
            result[i] = a * math.cos(angle) - b * math.sin(angle)
            result[i + half] = b * math.cos(angle) + a * math.sin(angle)
        return result

    for head in range(4):
        group = head // 2
        rows, group_rows = slice(head * C, (head + 1) * C), slice(group * C, (group + 1) * C)
        for t in range(5):
            q = turned(attention.query.weight[rows] @ x[0, t], t)
            scores = [
                float(q @ turned(attention.key.weight[group_rows] @ x[0, s], s)) / C**0.5
                for s in range(t + 1)
            ]
            weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
            mixed = sum(w * (attention.value.weight[group_rows] @ x[0, s]) for s, w in enumerate(weights))
            expected[t] += attention.output.weight[:, rows] @ mixed
    torch.testing.assert_close(attention(x)[0], expected, rtol=1e-5, atol=1e-5)


def test_rotation_depends_on_relative_position_only():
    q, k = torch.randn(2, 1, 8, dtype=torch.float64)
    rows = torch.stack([q, k]).expand(2, 12, 8)
    a, b = rotate(rows, 50.0)
    assert float(a[5] @ b[2]) == pytest.approx(float(a[9] @ b[6]), rel=1e-4)
    assert float(a[5] @ b[2]) != pytest.approx(float(a[5] @ b[3]), rel=1e-4)


def test_a_null_bank_that_takes_all_gives_exactly_the_baseline():
    tide = make()
    base = ReferenceTide(
        ReferenceShape(**{**vars(SHAPE), "num_blocks": 0}),
    ).double()
    base.load_state_dict(
        {k: v for k, v in tide.state_dict().items() if "memory" not in k and "router" not in k}
    )
    with torch.no_grad():
        for layer in tide.layers:
            layer.router.weight.zero_()
    tokens = torch.randint(0, 20, (2, 6))
    logits, alphas = tide.logits(tokens)
    assert all(torch.allclose(alpha, torch.full_like(alpha, 0.25)) for alpha in alphas)
    assert not torch.allclose(logits, base.logits(tokens)[0])
    with torch.no_grad():
        for layer in tide.layers:
            layer.register_forward_pre_hook(lambda _, args: (args[0], torch.zeros_like(args[1])))
    torch.testing.assert_close(tide.logits(tokens)[0], base.logits(tokens)[0])


def test_loss_is_cross_entropy_and_z_loss_of_labelled_tokens_only():
    model = make()
    tokens = torch.randint(0, 20, (2, 6))
    labels = torch.randint(0, 20, (2, 6))
    labels[0, 2] = labels[1, 5] = -1
    output = model(tokens, labels, z_loss=0.1)
    logits = model.logits(tokens)[0].float()
    kept = [(b, t) for b in range(2) for t in range(6) if labels[b, t] >= 0]
    log_z = [float(torch.logsumexp(logits[b, t], 0)) for b, t in kept]
    losses = [z - float(logits[b, t, labels[b, t]]) for z, (b, t) in zip(log_z, kept, strict=True)]
    expected = sum(losses) / len(kept) + 0.1 * sum(z * z for z in log_z) / len(kept)
    assert float(output.loss) == pytest.approx(expected, rel=1e-5)
    assert float(output.cross_entropy_BT[0, 2]) == 0.0


def test_untied_output_is_its_own_matrix():
    untied = ReferenceTide(ReferenceShape(**{**vars(SHAPE), "tie_embeddings": False}))
    assert untied.output.weight.shape == untied.embedding.weight.shape
    assert untied.output.weight is not untied.embedding.weight
