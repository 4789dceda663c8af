"""Every flag, declared once: spelling as in llama.cpp, help, kind, range and default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from edgert.cli.flags import choice_flag, count_flag, real_flag, switch_flag, text_flag
from edgert.config import Flag

_CACHE_TYPES = ("f16", "q8_0", "q4_0")


@dataclass(frozen=True, slots=True)
class OutputFlags:
    """What every command says about itself."""

    json: Annotated[bool, switch_flag("--json", text="Write the result as JSON on stdout.")] = False
    verbose: Annotated[
        bool,
        switch_flag(
            "-v", "--verbose", text="Log what happens to stderr; EDGERT_LOG=info logs less."
        ),
    ] = False
    log_file: Annotated[
        str | None, text_flag("--log-file", metavar="FILE", text="Log to this file instead.")
    ] = None


@dataclass(frozen=True, slots=True)
class ModelFlags:
    """Which model, in how much memory."""

    path: Annotated[
        str | None,
        Flag(
            (),
            "A GGUF file (the first of a split one), or tiny-moe, an embedded mixture of experts; "
            "the embedded model if absent.",
            "MODEL",
        ),
    ] = None
    model: Annotated[
        str | None, text_flag("-m", "--model", metavar="FILE", text="The model, instead of MODEL.")
    ] = None
    memory: Annotated[
        str | None,
        text_flag(
            "--memory", metavar="SIZE",
            text="Most memory of the whole process, such as 2000M or 1.5GiB "
            "(default: what is free, minus a margin).",
        ),
    ] = None  # fmt: skip
    ctx_size: Annotated[
        int | None,
        count_flag(
            "-c", "--ctx-size", text="Tokens of context (default: the model's, at most 4096)."
        ),
    ] = None
    batch_size: Annotated[
        int | None,
        count_flag("-b", "--batch-size", most=1 << 16, text="Most tokens of one decode call."),
    ] = None
    ubatch_size: Annotated[
        int | None,
        count_flag("-ub", "--ubatch-size", most=1 << 16, text="Tokens computed at once."),
    ] = None
    threads: Annotated[
        int | None,
        count_flag("-t", "--threads", most=512, text="Threads (default: every core it may use)."),
    ] = None
    threads_batch: Annotated[
        int | None, count_flag("-tb", "--threads-batch", most=512, text="Threads for prefill.")
    ] = None
    cache_type_k: Annotated[
        str,
        choice_flag("-ctk", "--cache-type-k", choices=_CACHE_TYPES, text="Type of cached keys."),
    ] = "f16"
    cache_type_v: Annotated[
        str,
        choice_flag("-ctv", "--cache-type-v", choices=_CACHE_TYPES, text="Type of cached values."),
    ] = "f16"
    packed: Annotated[
        str,
        choice_flag(
            "--packed", choices=("off", "auto", "only"),
            text="Packed copy of the weights: auto writes it once and uses it.",
        ),
    ] = "off"  # fmt: skip
    expert_bits: Annotated[
        str | None,
        text_flag(
            "--expert-bits", metavar="BITS",
            text="Bits of a nested model's experts: 4, or 4,8@0.25 for 8 where little routing "
            "weight stands before an expert (default: the widest).",
        ),
    ] = None  # fmt: skip
    quality: Annotated[
        float | None,
        real_flag(
            "--quality", most=1,
            text="The fewest expert bits that keep this share of the quality, as measured by "
            "edgert eval --calibrate-bits.",
        ),
    ] = None  # fmt: skip
    load_anyway: Annotated[
        bool, switch_flag("--load-anyway", text="Try although the estimate says it cannot fit.")
    ] = False


@dataclass(frozen=True, slots=True)
class DraftFlags:
    """Speculative decoding."""

    draft: Annotated[
        str | None,
        text_flag(
            "-md", "--draft", metavar="none|ngram|embedded|FILE",
            text="Guess tokens ahead and verify them together; the output stays the same.",
        ),
    ] = None  # fmt: skip
    draft_max: Annotated[
        int, count_flag("--draft-max", most=256, text="Most tokens guessed at once.")
    ] = 16


@dataclass(frozen=True, slots=True)
class SamplingFlags:
    """How the next token is chosen."""

    temp: Annotated[
        float, real_flag("--temp", text="Temperature; 0 takes the likeliest token.")
    ] = 0.8
    top_k: Annotated[
        int, count_flag("--top-k", least=0, text="Only the k likeliest; 0 is all.")
    ] = 40
    top_p: Annotated[
        float, real_flag("--top-p", most=1, text="Only the likeliest of this mass.")
    ] = 0.95
    min_p: Annotated[
        float, real_flag("--min-p", most=1, text="Only tokens at least this part of the likeliest.")
    ] = 0.05
    repeat_penalty: Annotated[
        float, real_flag("--repeat-penalty", least=0.01, text="Penalty for repeating; 1 is none.")
    ] = 1.0
    repeat_last_n: Annotated[
        int, count_flag("--repeat-last-n", least=0, text="Tokens looked back on for repeats.")
    ] = 64
    seed: Annotated[
        int | None,
        count_flag(
            "-s", "--seed", least=0, most=2**32 - 1, text="Seed of the choices (default: random)."
        ),
    ] = None
    reverse_prompt: Annotated[
        tuple[str, ...],
        text_flag("-r", "--reverse-prompt", text="Stop at this text; may be repeated."),
    ] = ()
    grammar: Annotated[str | None, text_flag("--grammar", text="GBNF grammar of the reply.")] = None
    grammar_file: Annotated[
        str | None, text_flag("--grammar-file", metavar="FILE", text="File with a GBNF grammar.")
    ] = None
    json_schema: Annotated[
        str | None,
        text_flag("-j", "--json-schema", metavar="JSON", text="JSON schema of the reply."),
    ] = None


@dataclass(frozen=True, slots=True)
class PromptFlags:
    """What is said to the model."""

    prompt: Annotated[
        str | None, text_flag("-p", "--prompt", text="Answer this once and leave; - reads stdin.")
    ] = None
    file: Annotated[
        str | None,
        text_flag("-f", "--file", metavar="FILE", text="Answer the text of this file once."),
    ] = None
    system_prompt: Annotated[
        str | None, text_flag("-sys", "--system-prompt", text="System prompt.")
    ] = None
    system_prompt_file: Annotated[
        str | None,
        text_flag(
            "-sysf", "--system-prompt-file", metavar="FILE", text="File with a system prompt."
        ),
    ] = None
    n_predict: Annotated[
        int | None,
        count_flag("-n", "--n-predict", "--max-tokens", text="Most tokens of a reply."),
    ] = None
    overflow: Annotated[
        str,
        choice_flag(
            "--overflow", choices=("error", "shift"),
            text="When the context is full: stop with an error, or forget the oldest.",
        ),
    ] = "error"  # fmt: skip
    raw: Annotated[
        bool, switch_flag("--raw", text="Continue the prompt as it is, without a chat template.")
    ] = False


@dataclass(frozen=True, slots=True)
class TraceFlags:
    """What is written down about a run."""

    trace: Annotated[
        str | None,
        text_flag(
            "--trace", metavar="FILE.json",
            text="Write what was read, computed and waited for, and the memory held, as a trace "
            "that Perfetto and chrome://tracing show.",
        ),
    ] = None  # fmt: skip


@dataclass(frozen=True, slots=True)
class TrustFlags:
    """Whose manifests are accepted."""

    trusted_keys: Annotated[
        tuple[str, ...],
        text_flag(
            "--trusted-key", metavar="HEX|FILE",
            text="Accept only manifests signed by this public key; may be repeated.",
        ),
    ] = ()  # fmt: skip


@dataclass(frozen=True, slots=True)
class ManifestFlags:
    """A manifest to execute, in place of options that would contradict it."""

    manifest: Annotated[
        str | None,
        text_flag(
            "--manifest", metavar="FILE",
            text="Execute this manifest, exactly or not at all (edgert plan makes one).",
        ),
    ] = None  # fmt: skip
    replan: Annotated[
        bool,
        switch_flag("--replan", text="Where the manifest does not match any more, make it anew."),
    ] = False
    hosts: Annotated[
        tuple[str, ...],
        text_flag(
            "--host", metavar="NAME=ADDRESS:PORT",
            text="Where edgert worker of another host listens; may be repeated.",
        ),
    ] = ()  # fmt: skip
    host_deadline: Annotated[
        float,
        real_flag(
            "--host-deadline", least=0.1, most=86400,
            text="Seconds in which another host must get on before it counts as gone.",
        ),
    ] = 30.0  # fmt: skip
    trust: TrustFlags = TrustFlags()


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """`edgert chat` and `edgert run`."""

    model: ModelFlags
    prompt: PromptFlags
    sampling: SamplingFlags
    draft: DraftFlags
    output: OutputFlags
    trace: TraceFlags = TraceFlags()
    deployment: ManifestFlags = ManifestFlags()


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    """`edgert eval`."""

    model: ModelFlags
    text: Annotated[str | None, Flag((), "The text, a UTF-8 file.", "TEXT")] = None
    chunks: Annotated[
        int | None,
        count_flag("--chunks", text="Only the first windows of the text (default: all)."),
    ] = None
    calibrate_bits: Annotated[
        bool,
        switch_flag(
            "--calibrate-bits",
            text="Measure a nested model in many widths and keep what each costs, for --quality.",
        ),
    ] = False
    calibrate_codec: Annotated[
        bool,
        switch_flag(
            "--calibrate-codec",
            text="Find how much error hidden states may have where --cut divides the model, for "
            "--quality (default 0.995), and keep it.",
        ),
    ] = False
    cut: Annotated[
        int | None,
        count_flag("--cut", most=1 << 10, text="Layers before the cut."),
    ] = None
    eval_output: Annotated[
        str, choice_flag("-o", "--output", choices=("text", "json"), text="Form of the result.")
    ] = "text"
    output: OutputFlags


@dataclass(frozen=True, slots=True, kw_only=True)
class ShowOptions:
    """`edgert show`, `edgert doctor`."""

    model: ModelFlags
    output: OutputFlags


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicesOptions:
    """`edgert devices`."""

    path: Annotated[
        str | None,
        Flag((), "A GGUF file: its types and its disk are what is measured.", "MODEL"),
    ] = None
    measure: Annotated[
        bool,
        switch_flag("--measure", text="Measure now, for a minute or so, and remember the figures."),
    ] = False
    link: Annotated[
        str | None,
        text_flag(
            "--link", metavar="HOST:PORT|loopback",
            text="Measure the link to a peer, or the one of this host to itself.",
        ),
    ] = None  # fmt: skip
    catalog: Annotated[
        bool, switch_flag("--catalog", text="Show the known devices instead of this host.")
    ] = False
    lan: Annotated[
        bool, switch_flag("--lan", text="Show workers that announce themselves on this network.")
    ] = False
    threads: Annotated[
        int | None,
        count_flag("-t", "--threads", most=512, text="Threads (default: every core it may use)."),
    ] = None
    output: OutputFlags


@dataclass(frozen=True, slots=True, kw_only=True)
class PackOptions:
    """`edgert pack`."""

    path: Annotated[
        str | None,
        Flag(
            (), "A manifest (.json), or a GGUF file (the first of a split one).", "MANIFEST|MODEL"
        ),
    ] = None
    out_folder: Annotated[
        str | None, Flag((), "Folder for what the manifest's hosts need.", "OUT")
    ] = None
    source: Annotated[
        str | None,
        text_flag(
            "-m", "--model", metavar="FILE", text="The manifest's model, if it lies elsewhere."
        ),
    ] = None
    trust: TrustFlags
    layout: Annotated[
        str, choice_flag("--layout", choices=("packed",), text="Which layout of a model to write.")
    ] = "packed"
    out: Annotated[
        str | None,
        text_flag("--out", metavar="FILE", text="Where to write the layout (default: the cache)."),
    ] = None
    output: OutputFlags


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions:
    """`edgert quantize`."""

    model: ModelFlags
    nested: Annotated[
        str | None,
        text_flag(
            "--nested", metavar="BASE..TOP",
            text="Widths of the experts' code, such as 2..8; the top is 4, 5 or 8 bits.",
        ),
    ] = None  # fmt: skip
    calib: Annotated[
        str | None,
        text_flag(
            "--calib", metavar="FILE",
            text="Choose the codes for what the experts see in this text (UTF-8).",
        ),
    ] = None  # fmt: skip
    evaluated: Annotated[
        str | None,
        text_flag(
            "--eval", metavar="FILE",
            text="Report perplexity and divergence at each width on this text.",
        ),
    ] = None  # fmt: skip
    chunks: Annotated[
        int | None,
        count_flag("--chunks", text="Only the first windows of the text of --eval."),
    ] = None
    out: Annotated[
        str | None, text_flag("-o", "--out", metavar="FILE", text="The file to write.")
    ] = None
    output: OutputFlags


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsOptions:
    """`edgert experts`."""

    model: ModelFlags
    routing_trace: Annotated[
        str | None,
        Flag((), "What routers chose, as edgert bench --routing-trace writes it.", "TRACE"),
    ] = None
    experts: Annotated[
        int | None,
        count_flag(
            "--experts", text="Experts that the cache holds (default: 25, 50 and 75 % of all)."
        ),
    ] = None
    expert_cache: Annotated[
        str | None,
        text_flag("--cache", metavar="SIZE", text="The size of the cache, instead of --experts."),
    ] = None
    keep: Annotated[
        bool, switch_flag("--keep", text="Drop experts of this model so from now on.")
    ] = False
    output: OutputFlags


@dataclass(frozen=True, slots=True, kw_only=True)
class KeysOptions:
    """`edgert keys`."""

    action: Annotated[
        str | None,
        Flag(
            (),
            "new makes a key that signs manifests, host makes or shows this host's identity, trust "
            "and forget say which hosts may connect, list shows them.",
            "new|host|trust|forget|list",
        ),
    ] = None
    subject: Annotated[
        str | None,
        Flag((), "The file of a new key, which must not exist, or a host's name.", "FILE|NAME"),
    ] = None
    certificate: Annotated[
        str | None, Flag((), "For trust: the certificate of that host.", "CERTIFICATE")
    ] = None
    output: OutputFlags


@dataclass(frozen=True, slots=True, kw_only=True)
class SignOptions:
    """`edgert sign`."""

    manifest: Annotated[str | None, Flag((), "The manifest to sign.", "MANIFEST")] = None
    key: Annotated[
        str | None,
        text_flag("--key", metavar="FILE", text="Private key that edgert keys new made."),
    ] = None
    output: OutputFlags


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaOptions:
    """`edgert schema`."""

    format_name: Annotated[
        str | None, Flag((), "The file format.", "manifest|profile|topology")
    ] = None
    output: OutputFlags
