"""What a PPO step needs on paper: memory of a rank, bytes on the network, seconds.

Sizes are in bytes, counts in parameters or tokens. Symbols: P parameters of the policy, U those that are trained,
N ranks, L layers, h hidden size, a = heads * head_dim, k = kv heads * head_dim, f MLP width, V vocabulary,
B rows of a micro-batch, R rows of a rank's rollout, S = prompt + completion, T completion.
"""

from dataclasses import dataclass

MODES = ("one", "ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2")
SHARDS_WEIGHTS = ("zero3", "zero3_offload", "fsdp2")
DEEPSPEED = ("zero1", "zero2", "zero3", "zero3_offload")
SENT = ("gradients", "weights in updates", "weights in scoring", "weights to generate")
BUCKET = 500_000_000  # elements of DeepSpeed's reduce bucket, its default


@dataclass(frozen=True)
class Shape:
    """A decoder of Llama's kind."""

    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool

    @property
    def attention(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def layer(self) -> int:
        """2 h a + 2 h k + 3 h f + 2 h: four projections of attention, three of the MLP, two norms."""
        return self.hidden * (2 * self.attention + 2 * self.kv + 3 * self.mlp + 2)

    @property
    def trunk(self) -> int:
        return self.vocab * self.hidden + self.layers * self.layer + self.hidden

    @property
    def parameters(self) -> int:
        return self.trunk + (0 if self.tied else self.vocab * self.hidden)

    @property
    def products(self) -> int:
        """Parameters that take part in a matrix product with every token: all but the embedding and the norms."""
        return self.layers * (self.layer - 2 * self.hidden) + self.vocab * self.hidden

    def adapter(self, rank: int) -> int:
        """r (inputs + outputs) of each of the seven matrices of a layer (`target_modules: all-linear`)."""
        ends = 2 * (self.hidden + self.attention) + 2 * (self.hidden + self.kv) + 3 * (self.hidden + self.mlp)
        return self.layers * rank * ends


SHAPES = {
    "SmolLM2-135M": Shape(30, 576, 1536, 9, 3, 64, 49152, True),
    "SmolLM2-360M": Shape(32, 960, 2560, 15, 5, 64, 49152, True),
    "SmolLM2-1.7B": Shape(24, 2048, 8192, 32, 32, 64, 49152, True),
    "Llama-3.2-3B": Shape(28, 3072, 8192, 24, 8, 128, 128256, True),
    "Llama-3.1-8B": Shape(32, 4096, 14336, 32, 8, 128, 128256, False),
    "Llama-3.1-70B": Shape(80, 8192, 28672, 64, 8, 128, 128256, False),
}


def nearest_shape(parameters: float) -> tuple[str, Shape]:
    """The known shape of about this size.

    Raises:
        ValueError: none is within a quarter of it.
    """
    name = min(SHAPES, key=lambda n: abs(SHAPES[n].parameters - parameters))
    if not 0.75 < SHAPES[name].parameters / parameters < 1.25:
        sizes = ", ".join(f"{shape.parameters / 1e9:.3g}e9 ({name})" for name, shape in SHAPES.items())
        raise ValueError(f"no known shape has about {parameters:.3g} parameters; known: {sizes}")
    return name, SHAPES[name]


@dataclass(frozen=True)
class Plan:
    """How a run is set up.

    Args:
        mode: one of `MODES`: the accelerate config, "one" for a single process.
        ranks: N.
        precision: "fp32"; "bf16": the shipped GPU configs, float32 weights under autocast, which DeepSpeed casts to
            bfloat16 beside float32 masters.
        weight_bytes: of frozen and trained weights as they are loaded; 2 with `model_init_kwargs: {dtype: bfloat16}`.
        lora: rank of the adapter; 0 trains everything.
        critic: "shared" or "separate".
        rows, micro_batch: of a rank's rollout and of one forward pass.
        prompt, completion: tokens.
        epochs: `num_ppo_epochs`.
        checkpointing: `activation_checkpointing`.
        gather: `ds3_gather_for_generation`; without it, and always under FSDP2, layers are gathered for every token.
        reward: parameters of the reward model.
        reward_bytes: of each of them.
        frozen_on_disk: reference and reward model are mapped files, resident only while they are asked
            (`rlhf/host_memory.py`): one process on a CPU. With several ranks they were measured to stay.
    """

    mode: str = "one"
    ranks: int = 1
    precision: str = "bf16"
    weight_bytes: int = 4
    lora: int = 0
    critic: str = "shared"
    rows: int = 64
    micro_batch: int = 4
    prompt: int = 512
    completion: int = 512
    epochs: int = 4
    checkpointing: bool = True
    gather: bool = True
    reward: float = 0.0
    reward_bytes: int = 2
    frozen_on_disk: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if (self.mode == "one") != (self.ranks == 1):
            raise ValueError(f"mode {self.mode!r} does not go with {self.ranks} rank(s)")

    @property
    def tokens(self) -> int:
        return self.prompt + self.completion

    @property
    def micro_batches(self) -> int:
        return -(-self.rows // self.micro_batch)

    @property
    def gathers_once(self) -> bool:
        return self.gather and self.mode in ("zero3", "zero3_offload")

    @property
    def casts(self) -> bool:
        """Whether DeepSpeed keeps bfloat16 weights beside float32 masters."""
        return self.precision == "bf16" and self.mode in DEEPSPEED

    @property
    def stored_bytes(self) -> int:
        return 2 if self.casts else self.weight_bytes

    @property
    def compute_bytes(self) -> int:
        return 2 if self.precision == "bf16" else self.weight_bytes


def trained(shape: Shape, plan: Plan) -> int:
    """U: policy and separate critic, or their adapters, and the value head."""
    part = (lambda whole: shape.adapter(plan.lora)) if plan.lora else (lambda whole: whole)
    critic = part(shape.trunk) if plan.critic == "separate" else 0
    return part(shape.parameters) + critic + shape.hidden + 1


def models(shape: Shape, plan: Plan) -> dict[str, float]:
    """Parameters of everything that answers to a token."""
    adapters = shape.adapter(plan.lora) if plan.lora else 0
    return {
        "policy": shape.parameters + adapters,
        "critic": (shape.trunk + adapters if plan.critic == "separate" else 0) + shape.hidden + 1,
        # The policy without its adapter is the reference of a LoRA run.
        "reference": 0 if plan.lora else shape.parameters,
        "reward model": plan.reward,
    }


# ---- Memory -------------------------------------------------------------------------------------------------------


def memory(shape: Shape, plan: Plan) -> dict[str, float]:
    """Bytes on the device of one rank, and in its host memory under offload.

    What stays:        weights, reference, reward model, Adam's moments with masters.
    What comes and goes: gradients, activations and logits in an update; KV cache and gathered weights in a rollout.

        peak = stays + max(rollout, update)

    Frozen models on disk do not stay: peak = weights + optimiser + max(rollout, update, reference, reward model).

    Returns:
        Bytes by component, then "peak", and "host" (0 without offload).
    """
    shares = _stored(shape, plan)
    static = sum(shares.values())
    update = _update(shape, plan)
    rollout = _rollout(shape, plan)
    host = 0.0
    if plan.mode == "zero3_offload":
        host = shares.pop("weights") + shares.pop("optimiser") + shares.pop("reference") + update.pop("gradients")
        static = sum(shares.values())
    phases = [sum(update.values()), sum(rollout.values())]
    if plan.frozen_on_disk and plan.mode == "one":
        phases += [shares["reference"], shares["reward model"]]
        static -= sum(phases[2:])
    peak = static + max(phases)
    return shares | update | rollout | {"peak": peak, "host": host}


def _stored(shape: Shape, plan: Plan) -> dict[str, float]:
    """weights w P / n, reference w P / n, reward model b R / n, optimiser 8 U / m (+ 4 U / m of masters).

    n is N where weights are split (ZeRO-3, FSDP2), else 1; m is N under every ZeRO stage and FSDP2, else 1.
    """
    sizes, ranks = models(shape, plan), plan.ranks
    split = ranks if plan.mode in SHARDS_WEIGHTS else 1
    width = plan.stored_bytes
    moments = 8 * trained(shape, plan) / (ranks if plan.mode not in ("one", "ddp") else 1)
    # ZeRO-1 and 2 clone the weights of their part as masters, float32 or not, as does an optimiser in host memory;
    # ZeRO-3 without offload only where it has cast them.
    masters = plan.mode in ("zero1", "zero2", "zero3_offload") or plan.casts
    return {
        "weights": width * (sizes["policy"] + sizes["critic"]) / split,
        "reference": width * sizes["reference"] / split,
        "reward model": plan.reward_bytes * sizes["reward model"] / (split if plan.mode != "fsdp2" else 1),
        "optimiser": moments * (1.5 if masters else 1),
    }


def _update(shape: Shape, plan: Plan) -> dict[str, float]:
    """Gradients, gathered or cast weights, activations and logits where the backward pass begins or ends."""
    count, ranks, width = trained(shape, plan), plan.ranks, 2 if plan.casts else 4
    gradients = width * count
    if plan.mode == "ddp":
        gradients *= 2  # the buckets that are sent are a second copy
    if plan.mode in ("zero2", "zero3", "zero3_offload", "fsdp2"):
        gradients /= ranks
    if plan.mode in DEEPSPEED:
        gradients += width * min(BUCKET, count)
    if not plan.lora:
        # Embedding and head are the largest matrices; the gradient of one use is whole before it is added.
        gradients += width * shape.vocab * shape.hidden * (2 if shape.tied else 1)
    working = 0.0
    if plan.mode in SHARDS_WEIGHTS:
        working = _two_layers(shape, plan)
    elif plan.precision == "bf16" and not plan.casts and plan.weight_bytes == 4:
        # autocast keeps a bfloat16 copy of each matrix until the backward pass has used it.
        trunks = 2 if plan.critic == "separate" else 1
        working = 2 * shape.products * trunks
    return {
        "gradients": gradients,
        "working copies of weights": working,
        "activations": activations(shape, plan),
        "logits": logits(shape, plan),
    }


def _two_layers(shape: Shape, plan: Plan) -> float:
    """Sharded weights that are whole at a time: this layer, the next one on its way, the embedding and the head."""
    ends = (1 if shape.tied else 2) * shape.vocab * shape.hidden
    return plan.compute_bytes * (2 * shape.layer + ends)


def _rollout(shape: Shape, plan: Plan) -> dict[str, float]:
    """KV cache 2 L k R S, and the gathered weights: all of them where ZeRO-3 gathers once for the rollout."""
    cache = 2 * shape.layers * shape.kv * plan.rows * plan.tokens * plan.stored_bytes
    gathered = 0.0
    if plan.gathers_once:
        gathered = plan.stored_bytes * sum(models(shape, plan)[name] for name in ("policy", "critic"))
    elif plan.mode in SHARDS_WEIGHTS:
        gathered = _two_layers(shape, plan)
    return {"KV cache": cache, "weights gathered to generate": gathered}


def activations(shape: Shape, plan: Plan) -> float:
    """What the graph of one micro-batch holds: B S L (8 h + 5 a + 4 f) numbers, or B S h L and one layer's.

    A layer saves: the inputs of two norms, their normalised values in two copies and the residual after attention
    (8 h together with the casts), queries, keys and values at full width, the answer of attention twice (5 a), and
    four tensors of the MLP (4 f). The adapter of a LoRA run adds its inputs' low-rank images, which are left out.
    """
    trunks = 2 if plan.critic == "separate" else 1
    numbers = plan.micro_batch * plan.tokens
    layer = 8 * shape.hidden + 5 * shape.attention + 4 * shape.mlp
    held = shape.layers * shape.hidden + layer if plan.checkpointing else shape.layers * layer
    return trunks * numbers * held * plan.compute_bytes


def logits(shape: Shape, plan: Plan) -> float:
    """2 B T V in the dtype of the forward pass, the logits and their gradient, and two float32 tables of one row."""
    row = plan.completion * shape.vocab
    return 2 * plan.micro_batch * row * plan.compute_bytes + 2 * row * 4


# ---- Network ------------------------------------------------------------------------------------------------------


def traffic(shape: Shape, plan: Plan) -> dict[str, float]:
    """Bytes that one rank sends for one rollout with its updates, by ring algorithms.

        all-reduce of b bytes: 2 (N - 1) / N b        all-gather, reduce-scatter: (N - 1) / N b

    ZeRO-2, ZeRO-3 and FSDP2 reduce after every micro-batch, DDP and ZeRO-1 once for each optimiser step.
    """
    ring = (plan.ranks - 1) / plan.ranks
    count, sizes, steps, micros = trained(shape, plan), models(shape, plan), plan.epochs, plan.micro_batches
    width, sent = 2 if plan.casts else 4, plan.compute_bytes
    held = sizes["policy"] + sizes["critic"]
    if plan.mode == "one":
        return dict.fromkeys(SENT, 0.0)
    if plan.mode == "ddp":
        parts = (2 * ring * width * count * steps, 0.0, 0.0, 0.0)
    elif plan.mode in ("zero1", "zero2"):
        reductions = steps * (micros if plan.mode == "zero2" else 1)
        parts = (ring * width * count * reductions, ring * plan.stored_bytes * count * steps, 0.0, 0.0)
    else:
        # Forward and backward gather the weights each; scoring gathers policy and reference once a micro-batch.
        scoring = ring * sent * (held + (sizes["reference"] or held)) * micros
        times = 1 if plan.gathers_once else plan.completion
        parts = (
            ring * width * count * steps * micros,
            2 * ring * sent * held * steps * micros,
            scoring,
            ring * sent * held * times,
        )
    return dict(
        zip(("gradients", "weights in updates", "weights in scoring", "weights to generate"), parts, strict=True)
    )


# ---- Time ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Assumptions about a GPU and its network, not measurements: an 80 GB card of 990 dense bfloat16 TFLOP/s.

    Args:
        flops: peak of matrix products.
        update_share, scoring_share: of the peak that forward with backward, and forward alone, reach.
        memory_bandwidth: bytes a second; decoding reads every weight and the cache once a token.
        memory_share: of it that decoding reaches.
        layer_seconds: least time of one layer for one token, however small: kernels are started one by one.
        node: GPUs of one machine.
        inside, between: bytes a second that a GPU sends to another in the machine, and to another machine.
        capacity: bytes of the card; nine tenths of them are planned with.
    """

    flops: float = 990e12
    update_share: float = 0.40
    scoring_share: float = 0.50
    memory_bandwidth: float = 3.35e12
    memory_share: float = 0.60
    layer_seconds: float = 0.8e-3
    node: int = 8
    inside: float = 300e9
    between: float = 40e9
    capacity: float = 80e9


def throughput(shape: Shape, plan: Plan, machine: Machine | None = None) -> dict[str, float]:
    """Seconds of one rollout with its updates, and tokens generated a second over all ranks.

        forward: 2 W + 2 L a S operations a token, W weights of matrix products (half of the S² are masked)
        update:  three times that; two times without weight gradients (LoRA); one forward more with checkpointing
        decode:  T max(bytes of weights and cache / bandwidth, 2 W R / speed, L times the least time of a layer)

    Nothing overlaps: bytes on the network are added to the arithmetic, which is the slowest that it could be.
    """
    machine = machine or Machine()
    forward = 2 * shape.products + 2 * shape.layers * shape.attention * plan.tokens
    critics = 2 if plan.critic == "separate" else 1
    tokens = plan.rows * plan.tokens
    passes = (2 if plan.lora else 3) + (1 if plan.checkpointing else 0)
    update = tokens * forward * critics * passes * plan.epochs / (machine.flops * machine.update_share)
    scored = forward * (critics + 1) + 2 * plan.reward
    scoring = tokens * scored / (machine.flops * machine.scoring_share)
    cache = 2 * shape.layers * shape.kv * plan.rows * (plan.prompt + plan.completion / 2) * plan.stored_bytes
    read = (shape.products * plan.stored_bytes + cache) / (machine.memory_bandwidth * machine.memory_share)
    multiplied = 2 * shape.products * plan.rows / (machine.flops * machine.scoring_share)
    generation = plan.completion * max(read, multiplied, shape.layers * machine.layer_seconds)
    speed = machine.inside if plan.ranks <= machine.node else machine.between
    network = sum(traffic(shape, plan).values()) / speed
    total = generation + scoring + update + network
    return {
        "generation": generation,
        "scoring": scoring,
        "update": update,
        "network": network,
        "total": total,
        "tokens per second": plan.ranks * plan.rows * plan.completion / total,
    }
