"""The deployment manifest: what the planner decided, and the only thing the runtime executes.

Versioned JSON. Reading it checks every rule that needs no other file (`partition.manifest_rules`);
whether model, device and memory still match is for the runtime to check.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field

SCHEMA_VERSION = "1.0"
SCHEMA_ID = "urn:edgert:manifest:1"
NESTED_PREFIX = "nested_"  # of the formats of nested experts, base and top width follow

Id = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Bytes = Annotated[int, Field(ge=0, le=1 << 60)]
Count = Annotated[int, Field(ge=0, le=1 << 24)]
Text = Annotated[str, Field(max_length=2000)]
TensorName = Annotated[str, Field(min_length=1, max_length=256)]
RelativePath = Annotated[str, Field(min_length=1, max_length=1024)]
Names = Annotated[tuple[TensorName, ...], Field(max_length=1 << 20), FailFast()]
Packed = Annotated[str, Field(max_length=1 << 23)]
CacheType = Literal["f16", "q8_0", "q4_0"]
Codec = Literal["f32", "f16", "adaptive"]
Departure = Literal["input", "embeddings", "hidden_states", "logits", "kv_cache"]

# What a runtime must be able to do; one that cannot refuses the manifest.
Ability = Literal[
    "resident", "streaming", "expert_cache", "nested_precision", "pipeline", "tensor_parallel",
    "edge_cloud", "accelerator", "onnx", "vocabulary_shards",
]  # fmt: skip

# What this release of the runtime does; plans for other hardware may ask for more.
RUNTIME_ABILITIES: frozenset[Ability] = frozenset(
    {
        "resident", "streaming", "expert_cache", "nested_precision",
        "pipeline", "tensor_parallel", "vocabulary_shards", "edge_cloud",
    }
)  # fmt: skip


class ManifestModel(BaseModel):
    """Base: frozen, strict, unknown keys are errors, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelFile(ManifestModel):
    """One file of the model; paths are relative and never leave their folder."""

    path: RelativePath
    size_bytes: Bytes
    sha256: Sha256


class ModelIdentity(ManifestModel):
    """Which model, to the bit."""

    format: Literal["gguf", "onnx"]
    name: Text
    architecture: Text
    n_layer: Annotated[int, Field(ge=1, le=1 << 16)]
    weight_bytes: Bytes
    files: Annotated[tuple[ModelFile, ...], Field(min_length=1, max_length=1000)]


class Pool(ManifestModel):
    """A memory of a host and how much of it the plan takes at most."""

    pool_id: Id
    limit_bytes: Bytes


class Device(ManifestModel):
    """A compute unit that the plan uses."""

    device_id: Id
    kind: Literal["cpu", "gpu", "npu"]
    name: Text
    pool_id: Id
    n_threads: Annotated[int, Field(ge=1, le=4096)] | None = None
    n_threads_batch: Annotated[int, Field(ge=1, le=4096)] | None = None


class Host(ManifestModel):
    """A machine that the plan uses; the fingerprint is that of the hardware that was measured."""

    host_id: Id
    name: Text
    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")] | None
    pools: Annotated[tuple[Pool, ...], Field(min_length=1, max_length=64)]
    devices: Annotated[tuple[Device, ...], Field(min_length=1, max_length=64)]
    address: Annotated[str, Field(max_length=255)] | None = None
    peer_key: Sha256 | None = None


class ExpertCache(ManifestModel):
    """Experts that stay in memory, as a cache of so many bytes, in so many bits.

    Attributes:
        cache_bytes: For all of them.
        bits: Those of the file; of nested experts the widths they are held in, ascending.
        cuts: Of nested experts in several widths, the shares of routing weight where widths change,
            ascending: an expert has the widest while less than the first stands before it.
    """

    cache_bytes: Bytes
    bits: Annotated[tuple[Annotated[int, Field(ge=1, le=16)], ...], Field(max_length=16)]
    cuts: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(max_length=15)] = ()


class Tiers(ManifestModel):
    """Where the weights of a stage live; every tensor of the stage is in exactly one list.

    Attributes:
        layout: As in the file, as in the packed file, or repacked while loading.
        pinned: Always in memory.
        streamed: Read from flash on every pass, through the window.
        looked_up: Only the rows of the tokens at hand are read.
        cached: Expert stacks behind `experts`.
        window_bytes: What streamed weights pass through.
        experts: The cache for `cached`.
    """

    layout: Literal["file", "packed", "repacked"]
    pinned: Names = ()
    streamed: Names = ()
    looked_up: Names = ()
    cached: Names = ()
    window_bytes: Bytes = 0
    experts: ExpertCache | None = None


class TensorShare(ManifestModel):
    """This stage's part of a tensor-parallel split, in groups of KV heads."""

    first_group: Count
    end_group: Count
    n_groups: Annotated[int, Field(ge=1, le=1 << 16)]


class Subgraph(ManifestModel):
    """The part of an ONNX graph that a stage runs."""

    inputs: Names
    outputs: Names


class Stage(ManifestModel):
    """Layers `[first_layer, end_layer)` on one device.

    Attributes:
        stage_id: Name within the manifest.
        host_id: Where.
        device_id: On what.
        first_layer: First layer or, of an ONNX model, first unit between cuts.
        end_layer: One past the last.
        embedding: Whether token embeddings are looked up here.
        head: Whether final norm and output product are computed here.
        precision: Formats of its weights by name, with their bytes.
        tiers: Where its weights live.
        share: Its part of every layer; None for all of it.
        subgraph: For ONNX models.
        variant: Which of the manifest's variants its weights are of; None for the model itself.
        kv_bytes: KV cache on this stage.
        buffer_bytes: Compute buffers on this stage.
    """

    stage_id: Id
    host_id: Id
    device_id: Id
    first_layer: Count
    end_layer: Count
    embedding: bool
    head: bool
    precision: Annotated[
        dict[Annotated[str, Field(min_length=1, max_length=64)], Bytes], Field(max_length=64)
    ]
    tiers: Tiers
    share: TensorShare | None = None
    subgraph: Subgraph | None = None
    variant: Annotated[int, Field(ge=0, le=63)] | None = None
    kv_bytes: Bytes
    buffer_bytes: Bytes

    @property
    def is_nested(self) -> bool:
        """Whether experts of it are nested: a prefix of one is that one in fewer bits."""
        return any(name.startswith(NESTED_PREFIX) for name in self.precision)


class Run(ManifestModel):
    """Settings that hold for all stages."""

    n_ctx: Annotated[int, Field(ge=1, le=1 << 24)]
    n_batch: Annotated[int, Field(ge=1, le=1 << 16)]
    n_ubatch: Annotated[int, Field(ge=1, le=1 << 16)]
    n_logits_max: Annotated[int, Field(ge=1, le=1 << 16)]
    cache_type_k: CacheType
    cache_type_v: CacheType
    draft: Literal["none", "ngram", "embedded"] = "none"
    draft_max: Annotated[int, Field(ge=1, le=256)] = 16
    tokens_per_pass: Annotated[float, Field(ge=1, le=257)] = 1.0


class Transport(ManifestModel):
    """How activations get from one stage to the next.

    Attributes:
        source_stage: From.
        target_stage: To.
        kind: Inside a host, over a socket of its own, or the way of the service.
        codec: How hidden states are written; all but f32 lose precision.
        bound: Of the codec adaptive, the most error of a token as a share of its length.
        peer_key: Of the target's host.
    """

    source_stage: Id
    target_stage: Id
    kind: Literal["memory", "exchange", "service"]
    codec: Codec
    bound: Annotated[float, Field(ge=1e-3, le=1)] | None = None
    peer_key: Sha256 | None = None


class Fallback(ManifestModel):
    """A manifest of home alone that goes on when another host is gone.

    Attributes:
        path: Of its file, beside this manifest's.
        sha256: Of its canonical form, without a signature.
    """

    path: RelativePath
    sha256: Sha256


class Policies(ManifestModel):
    """What may leave the home host, nothing unless it is named; what is done when others fail."""

    home: Id
    may_leave: Annotated[tuple[Departure, ...], Field(max_length=16)] = ()
    fallback: Fallback | None = None


class Prediction(ManifestModel):
    """A predicted figure and the range that a measurement should fall into."""

    value: Annotated[float, Field(ge=0)]
    low: Annotated[float, Field(ge=0)]
    high: Annotated[float, Field(ge=0)]


class Predicted(ManifestModel):
    """Predictions under the keys that measurements use."""

    load_ms: Prediction
    ttft_ms: Prediction
    tpot_ms: Prediction
    decode_tok_s: Prediction
    peak_memory_bytes: Prediction
    bytes_read_per_token: Prediction
    bytes_sent_per_token: Prediction
    energy_mj_per_token: Prediction | None = None


class Goal(ManifestModel):
    """What was asked for."""

    minimise: Literal["tpot", "ttft", "memory", "energy", "bytes_sent"]
    n_prompt: Annotated[int, Field(ge=1, le=1 << 24)]
    ceilings: dict[Literal["tpot", "ttft", "memory", "energy", "bytes_sent"], float] = {}


class LayerRouting(ManifestModel):
    """What a layer's router chose; both texts are empty for layers without routed experts.

    Attributes:
        shares: The share of tokens that want each expert, Base64 of little-endian f64.
        choices: The experts of each of the latest tokens, Base64 of little-endian u16.
    """

    shares: Packed = ""
    choices: Packed = ""


class Routing(ManifestModel):
    """The routing trace that a plan was made with, for making it anew."""

    n_expert: Annotated[int, Field(ge=1, le=1 << 16)]
    n_used: Annotated[int, Field(ge=1, le=1 << 10)]
    layers: Annotated[tuple[LayerRouting, ...], Field(min_length=1, max_length=1 << 16)]


class Decision(ManifestModel):
    """One choice and why."""

    what: Text
    choice: Text
    reason: Text


class Baseline(ManifestModel):
    """A simple way that the plan was scored against; None where it is not possible."""

    name: Text
    tpot_ms: Annotated[float, Field(ge=0)] | None
    reason: Text


class Signature(ManifestModel):
    """Ed25519 over the canonical form of everything else."""

    algorithm: Literal["ed25519"] = "ed25519"
    public_key: Sha256
    value: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


class Manifest(ManifestModel):
    """A deployment: which model, on which devices, in which precision and tier, and why.

    `variants` are the same model in other precisions, for stages away from home.
    """

    schema_version: Annotated[str, Field(pattern=r"^[0-9]{1,4}\.[0-9]{1,4}$")] = SCHEMA_VERSION
    tool_version: Text
    model: ModelIdentity
    variants: Annotated[tuple[ModelIdentity, ...], Field(max_length=64)] = ()
    goal: Goal
    hosts: Annotated[tuple[Host, ...], Field(min_length=1, max_length=64)]
    stages: Annotated[tuple[Stage, ...], Field(min_length=1, max_length=512)]
    run: Run
    transport: Annotated[tuple[Transport, ...], Field(max_length=4096)] = ()
    policies: Policies
    requires: Annotated[tuple[Ability, ...], Field(max_length=64)]
    predicted: Predicted
    binds: Text
    decisions: Annotated[tuple[Decision, ...], Field(max_length=10_000)] = ()
    baselines: Annotated[tuple[Baseline, ...], Field(max_length=1000)] = ()
    warnings: Annotated[tuple[Text, ...], Field(max_length=1000)] = ()
    routing: Routing | None = None
    signature: Signature | None = None

    def model_of(self, stage: Stage) -> ModelIdentity:
        """Return the model that the weights of one of the stages are of."""
        return self.model if stage.variant is None else self.variants[stage.variant]

    def host_of(self, stage: Stage) -> Host:
        """Return the host of one of the stages; the rules of a manifest see that it is there."""
        return next(host for host in self.hosts if host.host_id == stage.host_id)

    def device_of(self, stage: Stage) -> Device:
        """Return the device of one of the stages."""
        devices = self.host_of(stage).devices
        return next(device for device in devices if device.device_id == stage.device_id)

    def pool_of(self, stage: Stage) -> Pool:
        """Return the memory that one of the stages takes from."""
        pool_id = self.device_of(stage).pool_id
        return next(pool for pool in self.host_of(stage).pools if pool.pool_id == pool_id)
