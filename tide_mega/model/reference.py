"""The whole TIDE transformer in plain torch: one process, no library, no optimisation. The oracle.

Every distributed path and every kernel of this package is tested against this file, so it is written to be read
beside the paper (arXiv 2605.06216, section 3), never to be fast.

Dimensions: B batch, T sequence, D hidden size, V vocabulary, K memory blocks, L layers, H query heads, G key/value
heads (query groups), C head size, F feed-forward size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tide_mega.config.schema import ModelConfig


@dataclass(frozen=True)
class ReferenceShape:
    """The sizes that define the architecture; K = 0 is the LLaMA baseline."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_groups: int
    vocab_size: int
    num_blocks: int = 0
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True

    @classmethod
    def of(cls, model: ModelConfig, num_blocks: int) -> "ReferenceShape":
        """Return the shape of a configuration with K memory blocks."""
        return cls(
            model.num_layers,
            model.hidden_size,
            model.ffn_hidden_size,
            model.num_attention_heads,
            model.num_query_groups,
            model.vocab_size,
            num_blocks,
            model.rope_theta,
            model.norm_eps,
            model.tie_embeddings,
        )

    @property
    def head_size(self) -> int:
        """C = D / H."""
        return self.hidden_size // self.num_heads


def widened(x: Tensor) -> Tensor:
    """Return x in at least fp32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def rows(table_VD: Tensor, tokens_BT: Tensor) -> Tensor:
    """Return the tokens' rows [B, T, D]; the gradient of a row is accumulated in at least fp32."""
    return F.embedding(tokens_BT, widened(table_VD)).to(table_VD.dtype)


class Embedding(nn.Embedding):
    """An embedding table read with `rows`."""

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Return [B, T, D]."""
        return rows(self.weight, tokens_BT)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · gain, over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise in at least fp32 and return the input's dtype."""
        wide = widened(x)
        unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return unit.to(x.dtype) * self.weight


class EmbeddingMemory(nn.Module):
    """K MemoryBlocks: own table, own RMSNorm, M_k(v) = RMSNorm(E_k[v])  (3.3), (3.4)."""

    def __init__(self, shape: ReferenceShape) -> None:
        super().__init__()
        self.tables_KVD = nn.Parameter(torch.empty(shape.num_blocks, shape.vocab_size, shape.hidden_size))
        self.norms = nn.ModuleList(
            RMSNorm(shape.hidden_size, shape.norm_eps) for _ in range(shape.num_blocks)
        )

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Return M [B, T, K, D], computed once and shared by all layers."""
        blocks = [
            norm(rows(table_VD, tokens_BT))
            for norm, table_VD in zip(self.norms, self.tables_KVD, strict=True)
        ]
        return torch.stack(blocks, dim=2)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions, no biases."""

    def __init__(self, shape: ReferenceShape) -> None:
        super().__init__()
        self.shape = shape
        D, C = shape.hidden_size, shape.head_size
        self.query = nn.Linear(D, shape.num_heads * C, bias=False)
        self.key = nn.Linear(D, shape.num_groups * C, bias=False)
        self.value = nn.Linear(D, shape.num_groups * C, bias=False)
        self.output = nn.Linear(shape.num_heads * C, D, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Attend to the same and earlier positions."""
        B, T, _ = x_BTD.shape
        C, repeats = self.shape.head_size, self.shape.num_heads // self.shape.num_groups
        q_BHTC = self.query(x_BTD).view(B, T, -1, C).transpose(1, 2)
        k_BGTC = self.key(x_BTD).view(B, T, -1, C).transpose(1, 2)
        v_BGTC = self.value(x_BTD).view(B, T, -1, C).transpose(1, 2)
        q_BHTC, k_BGTC = (rotate(x, self.shape.rope_theta) for x in (q_BHTC, k_BGTC))
        k_BHTC, v_BHTC = (x.repeat_interleave(repeats, dim=1) for x in (k_BGTC, v_BGTC))
        scores_BHTT = q_BHTC @ k_BHTC.transpose(-1, -2) / C**0.5
        later_TT = torch.ones(T, T, dtype=torch.bool, device=x_BTD.device).triu(1)
        weights_BHTT = scores_BHTT.masked_fill(later_TT, float("-inf")).softmax(-1)
        return self.output((weights_BHTT @ v_BHTC).transpose(1, 2).reshape(B, T, -1))


def rotate(x: Tensor, theta: float) -> Tensor:
    """Apply RoPE: rotate the pair (i, i + C/2) of each head at position t by the angle t · theta^(-2i/C)."""
    T, C = x.shape[-2:]
    frequencies = theta ** (-torch.arange(0, C, 2, dtype=torch.float32, device=x.device) / C)
    angles_TC = torch.outer(torch.arange(T, dtype=torch.float32, device=x.device), frequencies).repeat(1, 2)
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * angles_TC.cos().to(x.dtype) + turned * angles_TC.sin().to(x.dtype)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, shape: ReferenceShape) -> None:
        super().__init__()
        D, ffn = shape.hidden_size, shape.ffn_hidden_size
        self.gate = nn.Linear(D, ffn, bias=False)
        self.up = nn.Linear(D, ffn, bias=False)
        self.down = nn.Linear(ffn, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply position by position."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    """One block; with K > 0 it also reads the memory."""

    def __init__(self, shape: ReferenceShape) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.attention = Attention(shape)
        self.ffn_norm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.ffn = FeedForward(shape)
        if shape.num_blocks:
            self.router = nn.Linear(shape.hidden_size, shape.num_blocks + 1, bias=False)

    def forward(self, h_BTD: Tensor, memory_BTKD: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return h_l and the router's weights α [B, T, K + 1], the null bank last."""
        h_BTD = h_BTD + self.attention(self.attention_norm(h_BTD))  # (3.1)
        n_BTD = self.ffn_norm(h_BTD)
        if memory_BTKD is None:
            return h_BTD + self.ffn(n_BTD), None
        alpha_BTK1 = self.router(n_BTD).softmax(-1)  # (3.5)
        m_BTD = torch.einsum("btk,btkd->btd", alpha_BTK1[..., :-1], memory_BTKD)
        return h_BTD + self.ffn(n_BTD) + m_BTD, alpha_BTK1  # (3.6)


@dataclass
class ReferenceOutput:
    """The result of one forward pass; `loss` is what training minimises."""

    loss: Tensor
    cross_entropy_BT: Tensor
    log_partition_BT: Tensor
    null_weight_LBT: Tensor | None


class ReferenceTide(nn.Module):
    """TIDE, or with K = 0 the LLaMA baseline."""

    def __init__(self, shape: ReferenceShape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = Embedding(shape.vocab_size, shape.hidden_size)
        if shape.num_blocks:
            self.memory = EmbeddingMemory(shape)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.final_norm = RMSNorm(shape.hidden_size, shape.norm_eps)
        if not shape.tie_embeddings:
            self.output = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)

    def logits(self, tokens_BT: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the logits [B, T, V] and each layer's router weights [B, T, K + 1]."""
        memory_BTKD = self.memory(tokens_BT) if self.shape.num_blocks else None
        h_BTD = self.embedding(tokens_BT)
        alphas = []
        for layer in self.layers:
            h_BTD, alpha_BTK1 = layer(h_BTD, memory_BTKD)
            if alpha_BTK1 is not None:
                alphas.append(alpha_BTK1)
        weight_VD = self.embedding.weight if self.shape.tie_embeddings else self.output.weight
        return F.linear(self.final_norm(h_BTD), weight_VD), alphas

    def forward(self, tokens_BT: Tensor, labels_BT: Tensor, z_loss: float = 0.0) -> ReferenceOutput:
        """Return mean cross entropy + z_loss · mean(log Z²) over the labels that are not negative."""
        logits_BTV, alphas = self.logits(tokens_BT)
        log_partition_BT = logits_BTV.float().logsumexp(-1)
        kept_BT = labels_BT >= 0
        target_BT = logits_BTV.float().gather(-1, labels_BT.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        cross_entropy_BT = (log_partition_BT - target_BT) * kept_BT
        loss = (cross_entropy_BT + z_loss * log_partition_BT.pow(2) * kept_BT).sum() / kept_BT.sum()
        null_LBT = torch.stack([alpha[..., -1] for alpha in alphas]) if alphas else None
        return ReferenceOutput(loss, cross_entropy_BT, log_partition_BT, null_LBT)
