"""The configuration schema: meaning, type, unit and default of every key.

Values live in `conf/`; this file gives them types. `tide_mega.config.hydra_door` converts a composed Hydra
configuration to these dataclasses once, at the entry point; nothing below it knows Hydra. A key that is a Python
keyword is a field with an underscore appended: `run.from` is `RunConfig.from_`. Rules that involve several keys
are in `tide_mega.config.validate`. The docstrings of the fields are printed by `--help`.
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class ModelConfig:
    """The LLaMA-style base transformer; the same for the baseline and for TIDE."""

    name: str = MISSING
    num_layers: int = MISSING
    hidden_size: int = MISSING
    ffn_hidden_size: int = MISSING
    num_attention_heads: int = MISSING
    num_query_groups: int = MISSING
    """Key/value heads of grouped-query attention; equal to `num_attention_heads` for plain attention."""
    vocab_size: int = 128_256
    """Rows of the embedding and of every memory table; at least the tokenizer's vocabulary."""
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    """Whether the output layer shares the input embedding's matrix."""
    init_std: float = 0.02
    """Standard deviation of every matrix at initialisation; output projections use it / sqrt(2 L)."""


@dataclass
class MemoryConfig:
    """EmbeddingMemory and its routers (paper, section 3)."""

    num_blocks: int = 0
    """K. 0 is the baseline: no tables, no routers, through the same code."""
    width: int | None = None
    """d_b. Null means the model's hidden size, the only width for which the paper defines injection."""
    table_init_std: float = 0.02
    gain_init: float = 1.0
    """Initial gain of each block's RMSNorm. Small values start training close to the base model."""
    router_init_std: float = 0.0
    """0 starts every router uniform: each block and the null bank weigh 1 / (K + 1)."""
    owners: str = "tensor"
    """Who owns the tables' rows: tensor (sharded over the tensor-parallel group, replicated over data
    parallelism and reduced with it), or tensor_data (each row has one owner among tensor x data: no
    data-parallel reduction of tables, their AdamW runs with the owner)."""
    window: int | None = None
    """Micro-batches served by one reading of the memory; null means all of a step. Use fewer if the rows of a
    whole step do not fit."""
    exchange_ahead: bool = False
    """Plan the next step's reading at the end of a step instead of at the start of the next, and with
    owners=tensor_data also start the transfer of its rows once the tables are updated, to overlap with logging,
    evaluation and checkpoint. Not earlier, since dense AdamW changes every row."""


@dataclass
class ParallelConfig:
    """How the model is spread over processes; the data-parallel size is the remaining factor of the world size."""

    tensor: int = 1
    pipeline: int = 1
    """Pipeline stages."""
    virtual_pipeline: int = 1
    """Model chunks of each stage: 1 runs the 1F1B schedule, more the interleaved one."""
    sequence_parallel: bool = False
    """Shard activations outside matrix products along the sequence over the tensor-parallel group."""
    zero_stage: int = 1
    """DeepSpeed ZeRO: 1 shards optimizer state, 2 gradients too, 3 parameters too (no pipeline)."""
    recompute: str = "none"
    """Activation recompute: none, selective (attention's core and the MLP), or full (whole layers)."""


@dataclass
class KernelConfig:
    """Which implementations a step uses; every choice gives the same results up to rounding."""

    mix: str = "auto"
    """Mix by index and its row gradient: auto (triton on a GPU, cpu on a CPU), naive, cpu, or triton."""
    row_norm: str = "auto"
    """RMSNorm of the step's distinct rows: auto, naive, cpu, or triton."""
    norm_router: str = "auto"
    """RMSNorm before the feed-forward network with the router: auto (triton on a GPU), naive, or triton."""
    loss_tokens: int | None = None
    """Tokens whose logits exist at a time in the loss; null chooses by device and vocabulary."""
    compile: bool = True
    """Whether a GPU runs the loss, RoPE and SwiGLU through torch.compile; a CPU never does."""


@dataclass
class OptimConfig:
    """AdamW and the learning-rate schedule (the paper's appendix L gives the defaults).

    The schedule is part of the run. In a run with `trainer.max_tokens` its steps are steps of the batch that
    the run was started with, and it follows the tokens.
    """

    lr: float = 1e-4
    """Peak learning rate, reached after `warmup_steps`."""
    init_lr: float = 1e-6
    min_lr: float = 1e-5
    schedule: str = "cosine"
    """After the warm-up: cosine (falls to `min_lr`), or wsd (stays at `lr`, and falls in the last
    `cooldown_steps`: min_lr + (lr - min_lr) (1 - sqrt(part of the cooldown done)), arXiv 2405.18392)."""
    warmup_steps: int = 10_000
    decay_steps: int | None = None
    """Step at which the cosine reaches `min_lr`; null means the number of training steps."""
    cooldown_steps: int = 0
    """Last steps of a wsd run, in which the rate falls; 0: it stays at `lr`, for branches (`run.from`) to
    decay."""
    rewarmup_steps: int = 0
    """With `run.from`: the schedule restarts at the branch, rising over this many steps to `lr` from the rate of
    the parent's schedule; 0: the branch follows this schedule from its current step."""
    reschedule: bool = False
    """For a run resumed with another `trainer.max_steps` or `max_tokens`: false keeps its original schedule (after
    whose end the rate stays at `min_lr`), true switches to that of the new length. The log gives both rates."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """For matrices and tables; never for the gains of norms."""
    clip_grad: float = 1.0
    """Largest global gradient norm over all parameters, tables included; 0 switches clipping off."""
    table_lr_multiplier: float = 1.0
    table_weight_decay: float | None = None
    """Null means `weight_decay`."""


@dataclass
class DataConfig:
    """A prepared dataset: the folder `tools/prepare_data.py` writes."""

    path: str = MISSING
    seq_length: int = 2048
    """Tokens in a training sequence (T)."""
    seed: int = 1234
    """Seed of the global order of sequences; the order does not depend on the data-parallel size."""
    num_workers: int = 1
    """Loader processes of each rank; 0 reads in the training process."""
    on_bad_shard: str = "fail"
    """What a missing, truncated or altered shard does: fail, or skip (named in the log; unreadable windows are
    replaced by others). May differ between starts of a run."""
    verify: str = "size"
    """How shards are verified at start: size, or checksum (reads everything once)."""
    perplexity_texts: list[str] = field(default_factory=list)
    """Text files (UTF-8, or JSON lines with key `text`) whose perplexity every evaluation measures, whole and by
    decile, under their names without suffix."""
    perplexity_tokens: int = 65_536
    """Maximum tokens of each text, from its beginning; 0 means all."""
    max_document_bytes: int = 134_217_728
    """Maximum bytes of one of their documents (a plain text, or a JSON line), decompressed."""


@dataclass
class TrainerConfig:
    """Length, batch and numerics of the training run."""

    max_steps: int | None = None
    """Optimizer steps. Give this or `max_tokens`, not both. Everything on the way (schedule, evaluations, log
    lines, checkpoints) is counted in the same unit; a branch includes its parent's steps and tokens."""
    max_tokens: int | None = None
    """Training tokens, rounded up to whole sequences: the last batch may be smaller."""
    global_batch_size: int = 512
    """Sequences in an optimizer step over all ranks. A run may be resumed with another value: with `max_tokens` it
    keeps its tokens and schedule and makes more or fewer steps; with `max_steps` it keeps its steps and reads
    more or fewer tokens."""
    micro_batch_size: int = 8
    """Sequences in one forward pass of one data-parallel rank."""
    precision: str = "bf16"
    """bf16 (fp32 master weights), fp32, or auto: bf16 if matrix products are faster in it, else fp32."""
    z_loss: float = 1e-6
    """Weight of the mean squared log-partition function in the loss."""
    eval_every: int = 1000
    """Steps between evaluations on held-out text; 0 evaluates only at the end."""
    eval_sequences: int = 1024
    """Held-out sequences in an evaluation; 0 means all of the validation split."""
    seed: int = 1234
    """Seed of the initial weights."""
    deterministic: bool = False
    """On a GPU, whether repeating a step gives the same bits: attention, cuBLAS and NCCL then sum in a fixed
    order, and an operation that cannot raises an error. Slower. On a CPU steps are always deterministic."""


@dataclass
class CheckpointConfig:
    """Saving and resuming."""

    every: int = 1000
    """Steps between checkpoints; 0 saves none but the last."""
    at_end: bool = True
    """Whether the last step is saved too if it is not a multiple of `every`."""
    keep_last: int = 2
    """Newest checkpoints kept in the run folder."""
    keep_every: int | None = None
    """Steps; checkpoints at its multiples are kept forever."""
    export_hf_every: int | None = None
    """Steps, a multiple of `every`: checkpoints at its multiples, and the one at the end, are also exported for
    transformers (`python -m tide_mega.export`), in the training's precision, to `hf/step-N` of the run folder. A
    process beside the training does it once the checkpoint is committed. Exports stay until you remove them."""
    resume: bool = True
    """Continue from the newest whole checkpoint, if there is one; false moves existing ones aside."""
    asynchronous: bool = True
    """Continue training while a thread writes the copy in host memory; false writes before training continues."""
    on_error: str = "stop"
    """What a failed save (a full disk, for instance) does: stop the run, or continue it with the previous
    checkpoints."""
    remote: str | None = None
    """A second folder: finished checkpoints are copied to `remote/run.name`, where a resuming run finds them.

    That folder belongs to one run, by the random id in its `run_id.json`; another run of the same name is
    refused."""
    remote_keep_last: int = 2


@dataclass
class FaultConfig:
    """What a run does when a step, a rank or a machine goes wrong."""

    max_skipped_in_a_row: int = 5
    """A step whose loss or gradient is not finite on any rank is skipped on all: nothing is updated, the data goes
    on. After this many in a row the run stops with exit status 4."""
    spike_z: float = 8.0
    """A loss spike: the step's loss lies this many robust standard deviations (1.4826 x the median distance from
    the median, at least 0.1 % of the median) above the median of the last `spike_window` applied steps."""
    spike_window: int = 128
    """Applied steps by which a spike is judged; there is no judgement before that many."""
    on_spike: str = "log"
    """log, skip (the step is not applied), or rollback (load the newest checkpoint and continue with the data
    after the spike)."""
    max_rollbacks: int = 3
    """Rollbacks in a run; one more stops it with exit status 4."""
    straggler_ratio: float = 1.5
    """A replica is reported as slow if its computing time is at least this multiple of the median replica's."""
    hang_minutes: float | None = None
    """Without progress for so long every rank writes its stacks to hangs/rank-R.txt in the run folder and to
    stderr, and ends with exit status 76, so that the job can be restarted. Null means two thirds of
    `cluster.timeout_minutes` (collectives must not give up first), 0 never."""
    inject: list[str] = field(default_factory=list)
    """For debugging: faults to inject on purpose, `kind@step[:rank]`, such as [nan_grad@7:1,kill@15:0]. Kinds
    are nan_loss, nan_grad, spike, slow (a third field gives seconds), hang, kill, bad_shard and disk_full. One
    that could not strike in the run is refused."""


@dataclass
class LoggingConfig:
    """Where metrics go, besides the run folder's metrics.jsonl."""

    every: int = 10
    """Steps between log lines; each line averages the loss over these steps."""
    diagnostics: bool = True
    """Whether log lines and evaluations also contain diagnostics of TIDE: training loss and null weight by
    decile, gradient norm of each table, norms of tables and embedding by decile, cosine distances, memory in
    use."""
    wandb: str = "auto"
    """auto (as WANDB_DISABLED or WANDB_MODE say, else online with a login and offline without), online, offline,
    or disabled."""
    wandb_project: str = "tide_mega"
    wandb_entity: str | None = None
    wandb_machine: bool = False
    """Whether the W&B run also records host name, user, command line, paths, hardware and commit; in any case
    environment.json in the run folder has versions, device and commit."""


@dataclass
class ClusterConfig:
    """The machine: the kind of device and its properties."""

    name: str = MISSING
    device: str = "auto"
    """auto (cuda when there is a GPU, else cpu), cpu, or cuda."""
    peak_tflops: float | None = None
    """Dense peak of one device for MFU; null, as in every profile, means the known value for the device's name and
    `trainer.precision`, or a measurement on CPU."""
    memory_gb: float | None = None
    """Memory of one device in 10^9 bytes; null skips the check that a step fits. Subtract 3 to 6 GB from what the
    device has, for context, communication library and fragmentation."""
    threads: int | None = None
    """CPU threads of each process; null means the cores divided by the processes of the node."""
    timeout_minutes: float = 30.0
    """How long a collective may hang before the run stops."""
    min_node_gbs: float | None = None
    """Bus bandwidth in GB/s that tide_mega.health requires of an all-reduce of 256 MiB within a node; null means
    the value known for the GPU, 0 no requirement."""
    min_network_gbs: float | None = None
    """The same between two nodes, of the GPUs of both together."""
    stop_before_minutes: float = 5.0
    """In a SLURM job with a time limit, how long before its end the run saves and stops, to be continued by the
    next start; long enough for two steps, an evaluation and a checkpoint."""


@dataclass
class RunConfig:
    """Where the run lives."""

    name: str = MISSING
    root: str = "runs"
    """The run folder is `root/name`: metrics, checkpoints, resolved configuration."""
    from_: str | None = None
    """Branch from another run's checkpoint: its folder and the step, such as runs/a@3000; without @ the newest.
    The model must be the same; schedule, length, batch and data may differ. The steps count on; where the data
    and their order are the parent's they go on, else they begin anew. Only a run without checkpoints of its own
    branches."""


@dataclass
class TideConfig:
    """Everything a training run depends on."""

    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    kernels: KernelConfig = field(default_factory=KernelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultConfig = field(default_factory=FaultConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    run: RunConfig = field(default_factory=RunConfig)
    experiment: Any = None
    """Name of the chosen experiment, for the record."""
