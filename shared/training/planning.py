"""What a training run needs: memory, communication and time from a model's shape and the way it is spread
over GPUs.

Every formula is checked against something that was counted: parameters and FLOPs exactly, activations and
the bytes of two real processes to a few percent. Bandwidths and peaks are those of data sheets: the times
are lower bounds of the right order.

Left out: mixtures of experts, context parallelism, offloading, memory that an allocator loses.

Follows Rajbhandari et al. (2020, "ZeRO"), Narayanan et al. (2021, "Efficient Large-Scale Language Model
Training on GPU Clusters Using Megatron-LM") and Korthikanti et al. (2022, "Reducing Activation
Recomputation in Large Transformer Models").

Explained and proven in ch05_pretraining/04_precision_memory_and_scaling.ipynb and
ch05_pretraining/05_many_machines.ipynb; written from there by `make promote`.
"""

import math
from dataclasses import dataclass

from shared.model.gpt import GPTConfig


def block_matrices(config: GPTConfig) -> int:
    """Return the number of weights in the matrices of one block, biases left out."""
    heads = (2 * config.n_heads + 2 * (config.n_kv_heads or config.n_heads)) * config.actual_head_dim
    maps = 3 if config.feed_forward == "swiglu" else 2
    return config.emb_dim * (heads + maps * feed_forward_width(config))


def feed_forward_width(config: GPTConfig) -> int:
    """Return the width inside the feed-forward network; ValueError for a mixture of experts."""
    if config.feed_forward == "moe":
        raise ValueError("config.feed_forward must be gelu or swiglu, got 'moe'")
    widths = {"gelu": 4 * config.emb_dim, "swiglu": 8 * math.ceil(config.emb_dim / 3)}
    return config.feed_forward_dim or widths[config.feed_forward]


def parameter_count(config: GPTConfig) -> int:
    """Return the number of parameters of a model that is not built; ValueError for a mixture of experts."""
    D, L, V = config.emb_dim, config.n_layers, config.vocab_size
    head_dim, kv_heads = config.actual_head_dim, config.n_kv_heads or config.n_heads
    norm = D * (2 if config.norm == "layernorm" and config.bias else 1)
    biases = (config.n_heads + 2 * kv_heads) * head_dim if config.qkv_bias else 0
    if config.bias:
        maps = 2 if config.feed_forward == "swiglu" else 1
        biases += D + maps * feed_forward_width(config) + D
    block = block_matrices(config) + biases + 2 * norm + (2 * head_dim if config.qk_norm else 0)
    tables = V * D * (1 if config.tie_weights else 2)
    positions = config.context_length * D if config.positions == "learned" else 0
    return tables + positions + L * block + (norm if config.pre_norm else 0)


def flops_per_token(config: GPTConfig, n_tokens: int) -> int:
    """Return the FLOPs to train on one token in sequences of `n_tokens`: products of matrices, forward and backward.

    A product of a weight with a number counts as two, the backward pass as twice the forward pass; attention is counted
    over all pairs of tokens, as usual, although half of them are masked.
    """
    attention = 2 * n_tokens * config.n_heads * config.actual_head_dim
    head = config.vocab_size * config.emb_dim
    return 6 * (config.n_layers * (block_matrices(config) + attention) + head)


def kept_numbers(config: GPTConfig) -> int:
    """Return how many numbers one block keeps per token from the forward to the backward pass, without dropout."""
    D, width = config.emb_dim, config.actual_head_dim
    queries, keys = config.n_heads * width, (config.n_kv_heads or config.n_heads) * width
    # Inputs and outputs of two norms; queries, keys and values; the heads' outputs; the feed-forward network.
    kept = 4 * D + queries + 2 * keys + queries
    kept += (4 if config.feed_forward == "swiglu" else 2) * feed_forward_width(config)
    if config.norm == "rmsnorm":
        kept += 2 * D  # torch keeps the normalised input as well
    if config.positions == "rotary":
        kept += queries + keys  # the projection stays too, for the values in it
    if config.qk_norm:
        kept += 3 * (queries + keys) // 2
    return kept


@dataclass(frozen=True)
class Machine:
    """GPUs in nodes.

    Attributes:
        peak: FLOP per second of one GPU in 16-bit products of matrices.
        memory: Bytes of one GPU.
        node: GPUs of a node.
        inside, between: Bytes per second that one GPU sends to others of its node, or of other nodes.
        utilisation: Share of the peak that is reached while nothing waits for data.
    """

    peak: float
    memory: float
    node: int
    inside: float
    between: float
    utilization: float = 0.5


H100 = Machine(peak=989e12, memory=80e9, node=8, inside=450e9, between=50e9)  # SXM, NVLink, 400 Gbit/s a GPU


@dataclass(frozen=True)
class Layout:
    """How a model is spread: `data` copies of it, each over `tensor` * `pipeline` GPUs.

    With `sharded` (FSDP, ZeRO stage 3) the copies share weights, gradients and optimizer states.
    """

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    sharded: bool = False

    def __post_init__(self) -> None:
        for name in ("data", "tensor", "pipeline"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def n_gpus(self) -> int:
        """Number of GPUs."""
        return self.data * self.tensor * self.pipeline

    def __str__(self) -> str:
        parts = [("FSDP" if self.sharded else "DDP", self.data), ("TP", self.tensor), ("PP", self.pipeline)]
        return " × ".join(f"{name} {n}" for name, n in parts if n > 1) or "one GPU"


@dataclass(frozen=True)
class Plan:
    """What one GPU holds, sends and waits for in one step.

    Attributes:
        layout: The layout.
        state, activations: Bytes of weights, gradients and optimizer states; of activations at their largest.
        sent: Bytes that a GPU sends in a step.
        seconds: Time of a step.
        flops: FLOPs of a step, all GPUs together.
    """

    layout: Layout
    state: float
    activations: float
    sent: float
    seconds: float
    flops: float

    @property
    def memory(self) -> float:
        """Bytes that one GPU needs."""
        return self.state + self.activations


def state_bytes(
    n_parameters: float, layout: Layout, weights: int = 2, gradients: int = 2, optimizer: int = 12
) -> float:
    """Return the bytes of weights, gradients and optimizer states on one GPU.

    The defaults are those of mixed precision with AdamW: 16-bit weights and gradients, and a 32-bit copy of the weights
    with two averages (Rajbhandari et al., 2020, section 3). Training in float32 has 4, 4 and 8.
    """
    shares = layout.tensor * layout.pipeline * (layout.data if layout.sharded else 1)
    return (weights + gradients + optimizer) * n_parameters / shares


def data_parallel_bytes(n_bytes: float, n_ranks: int, sharded: bool) -> float:
    """Return the bytes that a rank sends in a step for the gradients, and with `sharded` for the weights.

    `n_bytes` is the size of all weights in the type in which they travel. A ring all-reduce sends 2 (n - 1) / n of it;
    the sharded way gathers the weights in both passes and scatters the gradients: 3 (n - 1) / n.
    """
    return (3 if sharded else 2) * (n_ranks - 1) / n_ranks * n_bytes


def activation_bytes(
    config: GPTConfig, layout: Layout, n_rows: int, n_tokens: int, width: int = 2, checkpointing: bool = True
) -> float:
    """Return the bytes of activations on one GPU for micro-batches of `n_rows` sequences.

    With checkpointing every block keeps its input, and one block at a time all it needs. The first stage of a pipeline
    holds as many micro-batches as there are stages (one forward, one backward). Logits are kept in `width` and 4 bytes.
    """
    tokens, layers = n_rows * n_tokens, config.n_layers / layout.pipeline
    block = kept_numbers(config) * width / layout.tensor
    blocks = layers * config.emb_dim * width + block if checkpointing else layers * block
    logits = config.vocab_size * (width + 4) / layout.tensor
    # The last stage has the logits and one micro-batch, the first has many micro-batches and no logits.
    return tokens * (
        blocks + logits if layout.pipeline == 1 else max(blocks * layout.pipeline, blocks + logits)
    )


def plan(
    config: GPTConfig, layout: Layout, machine: Machine, n_rows: int, n_tokens: int, micro_rows: int = 1
) -> Plan:
    """Return what a step on `n_rows` sequences of `n_tokens` costs with activation checkpointing.

    Checkpointing computes the forward pass a second time: 4/3 of the FLOPs. Sending gradients and weights overlaps with
    computing, so the longer of the two counts; tensor parallelism has to wait for its sums (two in each pass of each
    block), and a pipeline of p stages idles for p - 1 of its micro-batches (Narayanan et al., 2021).

    Raises:
        ValueError: The rows do not divide, or the layout does not divide heads, blocks or nodes.
    """
    # Refuse what does not divide.
    per_copy = n_rows // layout.data
    for name, value, divisor in (
        ("n_rows", n_rows, layout.data * micro_rows),
        ("n_layers", config.n_layers, layout.pipeline),
        ("n_heads", config.n_heads, layout.tensor),
        ("machine.node", machine.node, layout.tensor),
    ):
        if value % divisor:
            raise ValueError(f"{name}={value} must be a multiple of {divisor} for {layout}")
    # Computing, with the repeated forward pass and the idle ends of the pipeline.
    parameters, micro_batches = parameter_count(config), per_copy // micro_rows
    flops = flops_per_token(config, n_tokens) * n_rows * n_tokens
    computing = 4 / 3 * flops / layout.n_gpus / (machine.peak * machine.utilization)
    computing *= (micro_batches + layout.pipeline - 1) / micro_batches
    # Sending between copies: gradients, and with sharding the weights.
    weights = 2 * parameters / layout.tensor / layout.pipeline
    data = data_parallel_bytes(weights, layout.data, layout.sharded)
    if layout.sharded:
        # Without enough memory to keep them, the weights are gathered again for every micro-batch.
        data += (micro_batches - 1) * data_parallel_bytes(weights, layout.data, False)
    # Sending inside a copy: hidden vectors, between the parts of a matrix and between stages.
    sum_bytes = 2 * per_copy * n_tokens * config.emb_dim  # of one all-reduce, all micro-batches
    blocks = config.n_layers / layout.pipeline
    # Two sums forward, two in the forward pass that is repeated, two backward.
    tensor = 6 * blocks * data_parallel_bytes(sum_bytes, layout.tensor, False)
    stages = 2 * sum_bytes if layout.pipeline > 1 else 0  # hidden vectors on, their gradients back
    # The longer of computing and sending counts; sums of tensor parallelism have to be waited for.
    within = layout.n_gpus <= machine.node
    seconds = max(computing, (data + stages) / (machine.inside if within else machine.between))
    return Plan(
        layout,
        # While a block works, its weights and those of the next are whole.
        state_bytes(parameters, layout)
        + (2 * 2 * block_matrices(config) / layout.tensor if layout.sharded else 0),
        activation_bytes(config, layout, micro_rows, n_tokens),
        data + tensor + stages,
        seconds + tensor / machine.inside,
        flops,
    )


def best_plan(config: GPTConfig, n_gpus: int, machine: Machine, n_rows: int, n_tokens: int) -> Plan | None:
    """Return the plan with the shortest step among those that fit into 90 % of the memory; None if none does."""
    found = []
    for tensor in (1, 2, 4, 8):
        for pipeline in (1, 2, 4, 8, 16):
            data = n_gpus // (tensor * pipeline)
            for sharded in (False, True)[: 2 if data > 1 else 1]:
                for micro_rows in (1, 2, 4, 8):
                    try:
                        layout = Layout(data, tensor, pipeline, sharded)
                        found.append(plan(config, layout, machine, n_rows, n_tokens, micro_rows))
                    except ValueError:  # does not divide
                        continue
    fitting = [p for p in found if p.layout.n_gpus == n_gpus and p.memory <= 0.9 * machine.memory]
    return min(fitting, key=lambda p: (p.seconds, p.sent), default=None)
