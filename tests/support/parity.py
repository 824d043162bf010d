"""Running a topology and the plain reference on the same weights and data, and measuring the difference."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tide_mega.config.schema import (
    DataConfig,
    MemoryConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TideConfig,
    TrainerConfig,
)
from tide_mega.data.batch import TokenBatch
from tide_mega.model.reference import ReferenceShape, ReferenceTide
from tide_mega.model.spec import DTYPES
from tide_mega.model.stage import TideStage
from tide_mega.model.weights import InitialWeights, initialise, local_tensors
from tide_mega.parallel.device import Device, choose_device
from tide_mega.parallel.engine import Engine, EngineOptions
from tide_mega.parallel.groups import ParallelGroups, make_groups
from tide_mega.training.optimizer import TABLES, parameter_groups
from tide_mega.training.step import compute_gradients, read_ahead

SEQUENCE, MICRO_BATCH, STEPS, Z_LOSS = 24, 2, 5, 1e-3


@dataclass(frozen=True)
class Case:
    """One topology of the parity tests."""

    tensor: int = 1
    sequence_parallel: bool = False
    data: int = 1
    num_blocks: int = 3
    zero_stage: int = 1
    precision: str = "fp32"
    recompute: str = "none"
    accumulation: int = 2
    tie_embeddings: bool = True
    table_lr_multiplier: float = 1.0
    pipeline: int = 1
    virtual_pipeline: int = 1
    owners: str = "tensor"
    window: int | None = None
    ahead: bool = False
    device: str = "cpu"

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline * self.data

    def __str__(self) -> str:
        plain = vars(Case())
        return (
            " ".join(f"{key}={value}" for key, value in vars(self).items() if value != plain[key]) or "plain"
        )


@dataclass
class Deviation:
    """Largest relative differences from the reference."""

    loss: float
    norm: float
    tensors: dict[str, float]

    def worst(self) -> float:
        return max(self.loss, self.norm, *self.tensors.values())


def configuration(case: Case) -> TideConfig:
    model = ModelConfig(
        name="parity",
        num_layers=4,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=64,
        init_std=0.2,
        tie_embeddings=case.tie_embeddings,
    )
    memory = MemoryConfig(
        case.num_blocks,
        table_init_std=0.3,
        gain_init=0.7,
        router_init_std=0.4,
        owners=case.owners,
        window=case.window,
    )
    # Adam divides by sqrt(v) + eps: with eps far below the gradients' rounding noise, an element whose gradient
    # is almost 0 would turn that noise into a whole step of either sign, in any two correct programs.
    optim = OptimConfig(lr=3e-3, clip_grad=0.5, eps=1e-4, table_lr_multiplier=case.table_lr_multiplier)
    return TideConfig(
        model=model,
        memory=memory,
        optim=optim,
        parallel=ParallelConfig(
            tensor=case.tensor,
            sequence_parallel=case.sequence_parallel,
            pipeline=case.pipeline,
            virtual_pipeline=case.virtual_pipeline,
            zero_stage=case.zero_stage,
            recompute=case.recompute,
        ),
        data=DataConfig(path="none", seq_length=SEQUENCE),
        trainer=TrainerConfig(micro_batch_size=MICRO_BATCH, precision=case.precision, z_loss=Z_LOSS),
    )


def batches_of_step(case: Case, config: TideConfig, step: int) -> list[TokenBatch]:
    """Return the whole step's microbatches, those of data-parallel rank 0 first."""
    generator = torch.Generator().manual_seed(1000 + step)
    # Few types and an uneven distribution: repeated ids, ids at shard edges, most rows untouched.
    draws = torch.rand(case.data * case.accumulation, MICRO_BATCH, SEQUENCE + 1, generator=generator)
    tokens = (draws.pow(2) * config.model.vocab_size).long()
    tokens = tokens.to(case.device)
    return [TokenBatch(x[:, :-1].contiguous(), x[:, 1:].contiguous()) for x in tokens]


def reference_model(config: TideConfig, device: str = "cpu") -> ReferenceTide:
    model, memory = config.model, config.memory
    reference = ReferenceTide(
        ReferenceShape(
            model.num_layers,
            model.hidden_size,
            model.ffn_hidden_size,
            model.num_attention_heads,
            model.num_query_groups,
            model.vocab_size,
            memory.num_blocks,
            model.rope_theta,
            model.norm_eps,
            model.tie_embeddings,
        )
    )
    initial = InitialWeights(model, memory, config.trainer.seed)
    with torch.no_grad():
        for name, parameter in canonical_parameters(reference).items():
            values = initial.rows(name, 0, parameter.size(0))
            # DeepSpeed makes the fp32 master weights from the model it has cast, so they start rounded.
            parameter.copy_(values.to(DTYPES[config.trainer.precision]))
    return reference.to(device)


def canonical_parameters(reference: ReferenceTide) -> dict[str, Tensor]:
    named = {}
    for name, parameter in reference.named_parameters():
        if name == "memory.tables_KVD":
            named.update({f"memory.tables.{k}": table for k, table in enumerate(parameter)})
        elif name.startswith("memory.norms."):
            named[f"memory.gains.{name.split('.')[2]}"] = parameter
        else:
            named[name] = parameter
    return named


def canonical_gradients(reference: ReferenceTide) -> dict[str, Tensor]:
    holder = {id(p): p.grad for p in reference.parameters()}
    named = {}
    for name, parameter in reference.named_parameters():
        gradient = holder[id(parameter)]
        if name == "memory.tables_KVD":
            named.update({f"memory.tables.{k}": table for k, table in enumerate(gradient)})
        elif name.startswith("memory.norms."):
            named[f"memory.gains.{name.split('.')[2]}"] = gradient
        else:
            named[name] = gradient
    return named


def fetch_from(tensors: dict[str, Tensor]) -> Callable[[str, int, int], Tensor]:
    return lambda name, first, last: tensors[name][first:last]


def relative(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest magnitude."""
    difference = (actual.detach().float() - expected.detach().float()).abs().max()
    return float(difference / expected.detach().float().abs().max().clamp_min(1e-30))


def parameter_names(stage: TideStage) -> dict[int, str]:
    names = {id(parameter): name for name, parameter in stage.named_parameters()}
    if stage.owned is not None:
        names[id(stage.owned.master_WKD)] = "memory.tables_WKD"
    return names


def reference_backward(reference: ReferenceTide, batches: list[TokenBatch]) -> float:
    """Accumulate the gradient of the mean loss over microbatches; return the mean cross entropy."""
    total = 0.0
    for batch in batches:
        output = reference(batch.tokens_BT, batch.labels_BT, Z_LOSS)
        (output.loss / len(batches)).backward()
        total += float(output.cross_entropy_BT.detach().mean()) / len(batches)
    return total


def compare_gradients(case: Case) -> Deviation:
    """One forward and backward, no optimizer: loss and the gradient of every parameter."""
    from tests.support.bare_engine import BareEngine

    config = configuration(case)
    groups = make_groups(config.parallel, 1, config.memory.owners)
    model = TideStage(config, groups, torch.device(case.device))
    initialise(model, config.model, config.memory, config.trainer.seed)
    model.to(case.device)
    batches = batches_of_step(replace(case, data=1), config, 0)
    result = compute_gradients(BareEngine(model), batches, Z_LOSS)
    reference = reference_model(config, case.device)
    expected_loss = reference_backward(reference, batches)
    names = parameter_names(model)
    pairs = local_tensors(model, config.model, fetch_from(canonical_gradients(reference)))
    return Deviation(
        loss=abs(float(result.loss_sum / result.tokens) - expected_loss) / expected_loss,
        norm=0.0,
        tensors={names[id(p)]: relative(p.grad, expected) for p, expected in pairs},
    )


def build_engine(
    model: TideStage, case: Case, config: TideConfig, groups: ParallelGroups, device: Device
) -> Engine:
    options = EngineOptions(
        case.zero_stage,
        case.precision,
        config.optim.clip_grad,
        MICRO_BATCH,
        case.accumulation,
        shares_norm=case.owners == "tensor_data",
    )
    return Engine(
        model, parameter_groups(model, config.optim), config.optim, options, groups, device, model.owned
    )


def own_batches(case: Case, config: TideConfig, groups: ParallelGroups, step: int) -> list[TokenBatch]:
    return batches_of_step(case, config, step)[groups.data_rank * case.accumulation :][: case.accumulation]


def train_side_by_side(
    case: Case, config: TideConfig, engine: Engine, reference: ReferenceTide, groups: ParallelGroups
) -> tuple[list[float], list[float]]:
    """Train both for some clipped AdamW steps; return relative differences of loss and norm of each."""
    optimizer = reference_optimizer(reference, config.optim)
    losses, norms = [], []
    ahead = None
    for step in range(STEPS):
        lr = config.optim.lr * (1 - 0.1 * step)
        batches = batches_of_step(case, config, step)
        own = own_batches(case, config, groups, step)
        result = compute_gradients(engine, own, Z_LOSS, window=case.window, ahead=ahead)
        engine.step(lr)
        if case.ahead:
            ahead = read_ahead(engine.module, own_batches(case, config, groups, step + 1))
        sums = torch.stack([result.loss_sum.double(), result.tokens.double()])
        torch.distributed.all_reduce(sums, group=groups.data)
        torch.distributed.all_reduce(sums, group=groups.pipeline)
        expected_loss = reference_backward(reference, batches)
        expected_norm = float(torch.nn.utils.clip_grad_norm_(reference.parameters(), config.optim.clip_grad))
        assert expected_norm > config.optim.clip_grad, "clipping is not active: the test would not see it"
        for group in optimizer.param_groups:
            group["lr"] = lr * group["multiplier"]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(abs(float(sums[0] / sums[1]) - expected_loss) / expected_loss)
        norms.append(abs(engine.grad_norm() - expected_norm) / expected_norm)
    return losses, norms


def compare_training(case: Case) -> Deviation:
    """Five AdamW steps with clipping active: loss and norm of each, all parameters at the end."""
    config = configuration(case)
    device = choose_device(case.device, 0)
    groups = make_groups(config.parallel, 1, config.memory.owners)
    model = TideStage(config, groups, device.torch_device)
    initialise(model, config.model, config.memory, config.trainer.seed)
    engine = build_engine(model, case, config, groups, device)
    reference = reference_model(config, case.device)
    losses, norms = train_side_by_side(case, config, engine, reference, groups)
    names = parameter_names(engine.module)
    pairs = local_tensors(engine.module, config.model, fetch_from(canonical_parameters(reference)))
    tensors = {names[id(p)]: relative(p, expected) for p, expected in pairs}
    engine.close()
    return Deviation(max(losses), max(norms), tensors)


def compare_updates(case: Case) -> Deviation:
    """As `compare_training` for bf16: `tensors` are errors of the whole update, in the L2 norm.

    They are divided by the error that the plain reference makes when it computes in bf16: about 1 means
    that bf16 explains the difference.
    """
    config = configuration(case)
    device = choose_device(case.device, 0)
    groups = make_groups(config.parallel, 1, config.memory.owners)
    model = TideStage(config, groups, device.torch_device)
    initialise(model, config.model, config.memory, config.trainer.seed)
    engine = build_engine(model, case, config, groups, device)
    start = {id(p): engine.master_weight(p).clone() for p in engine.module.parameters()}
    reference = reference_model(config, case.device)
    losses, norms = train_side_by_side(case, config, engine, reference, groups)
    names = parameter_names(engine.module)
    exact = local_tensors(engine.module, config.model, fetch_from(canonical_parameters(reference)))
    rounded = local_tensors(engine.module, config.model, fetch_from(bf16_reference_updates(case)))
    tensors = {}
    for (parameter, expected), (_, explained) in zip(exact, rounded, strict=True):
        error = (engine.master_weight(parameter) - expected.detach()).norm()
        size = (expected.detach() - start[id(parameter)]).norm()
        tensors[names[id(parameter)]] = float(error / ((explained - expected.detach()).norm() + 0.005 * size))
    engine.close()
    return Deviation(max(losses), max(norms), tensors)


def bf16_reference_updates(case: Case) -> dict[str, Tensor]:
    """What the plain reference itself makes of bf16 compute with fp32 master weights: its final parameters."""
    config = configuration(case)
    master = reference_model(config, case.device)
    optimizer = reference_optimizer(master, config.optim)
    for step in range(STEPS):
        low = copy.deepcopy(master).bfloat16()
        batches = batches_of_step(case, config, step)
        for batch in batches:
            (low(batch.tokens_BT, batch.labels_BT, Z_LOSS).loss / len(batches)).backward()
            for wide, narrow in zip(master.parameters(), low.parameters(), strict=True):
                wide.grad = narrow.grad.float() + (0 if wide.grad is None else wide.grad)
                narrow.grad = None
        torch.nn.utils.clip_grad_norm_(master.parameters(), config.optim.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = config.optim.lr * (1 - 0.1 * step) * group["multiplier"]
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in canonical_parameters(master).items()}


def reference_optimizer(reference: ReferenceTide, optim: OptimConfig) -> torch.optim.Optimizer:
    decayed, plain, tables = [], [], []
    for name, parameter in reference.named_parameters():
        if name == "memory.tables_KVD":
            tables.append(parameter)
        elif parameter.ndim == 1:
            plain.append(parameter)
        else:
            decayed.append(parameter)
    groups = [
        {"params": decayed, "weight_decay": optim.weight_decay, "multiplier": 1.0},
        {"params": plain, "weight_decay": 0.0, "multiplier": 1.0},
        {
            "params": tables,
            "weight_decay": optim.weight_decay,
            "multiplier": optim.table_lr_multiplier,
            "name": TABLES,
        },
    ]
    betas = (optim.beta1, optim.beta2)
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=optim.lr, betas=betas, eps=optim.eps)
