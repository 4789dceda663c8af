"""Every flag, declared once: spelling as in llama.cpp, help, kind, range and default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from edgert.config import Flag

_CACHE_TYPES = ("f16", "q8_0", "q4_0")
_LARGEST_N = 1 << 24


def _count(*spellings: str, text: str, least: int = 1, most: int = _LARGEST_N) -> Flag:
    return Flag(spellings, text, "N", minimum=least, maximum=most)


def _real(*spellings: str, text: str, least: float = 0.0, most: float = 1e6) -> Flag:
    return Flag(spellings, text, "X", minimum=least, maximum=most)


def _text(*spellings: str, text: str, metavar: str = "TEXT") -> Flag:
    return Flag(spellings, text, metavar)


def _choice(*spellings: str, text: str, choices: tuple[str, ...]) -> Flag:
    return Flag(spellings, text, "|".join(choices), choices=choices)


def _switch(*spellings: str, text: str) -> Flag:
    return Flag(spellings, text, "")


@dataclass(frozen=True, slots=True)
class OutputFlags:
    """What every command says about itself."""

    json: Annotated[bool, _switch("--json", text="Write the result as JSON on stdout.")] = False
    verbose: Annotated[
        bool,
        _switch("-v", "--verbose", text="Log what happens to stderr; EDGERT_LOG=info logs less."),
    ] = False
    log_file: Annotated[
        str | None, _text("--log-file", metavar="FILE", text="Log to this file instead.")
    ] = None


@dataclass(frozen=True, slots=True)
class ModelFlags:
    """Which model, in how much memory."""

    path: Annotated[
        str | None,
        Flag((), "A GGUF file (the first of a split one); the embedded model if absent.", "MODEL"),
    ] = None
    model: Annotated[
        str | None, _text("-m", "--model", metavar="FILE", text="The model, instead of MODEL.")
    ] = None
    memory: Annotated[
        str | None,
        _text(
            "--memory", metavar="SIZE",
            text="Most memory of the whole process, such as 2000M or 1.5GiB "
            "(default: what is free, minus a margin).",
        ),
    ] = None  # fmt: skip
    ctx_size: Annotated[
        int | None,
        _count("-c", "--ctx-size", text="Tokens of context (default: the model's, at most 4096)."),
    ] = None
    batch_size: Annotated[
        int | None,
        _count("-b", "--batch-size", most=1 << 16, text="Most tokens of one decode call."),
    ] = None
    ubatch_size: Annotated[
        int | None, _count("-ub", "--ubatch-size", most=1 << 16, text="Tokens computed at once.")
    ] = None
    threads: Annotated[
        int | None,
        _count("-t", "--threads", most=512, text="Threads (default: every core it may use)."),
    ] = None
    threads_batch: Annotated[
        int | None, _count("-tb", "--threads-batch", most=512, text="Threads for prefill.")
    ] = None
    cache_type_k: Annotated[
        str, _choice("-ctk", "--cache-type-k", choices=_CACHE_TYPES, text="Type of cached keys.")
    ] = "f16"
    cache_type_v: Annotated[
        str, _choice("-ctv", "--cache-type-v", choices=_CACHE_TYPES, text="Type of cached values.")
    ] = "f16"
    packed: Annotated[
        str,
        _choice(
            "--packed", choices=("off", "auto", "only"),
            text="Packed copy of the weights: auto writes it once and uses it.",
        ),
    ] = "off"  # fmt: skip
    load_anyway: Annotated[
        bool, _switch("--load-anyway", text="Try although the estimate says it cannot fit.")
    ] = False


@dataclass(frozen=True, slots=True)
class DraftFlags:
    """Speculative decoding."""

    draft: Annotated[
        str | None,
        _text(
            "-md", "--draft", metavar="none|ngram|embedded|FILE",
            text="Guess tokens ahead and verify them together; the output stays the same.",
        ),
    ] = None  # fmt: skip
    draft_max: Annotated[
        int, _count("--draft-max", most=256, text="Most tokens guessed at once.")
    ] = 16


@dataclass(frozen=True, slots=True)
class SamplingFlags:
    """How the next token is chosen."""

    temp: Annotated[float, _real("--temp", text="Temperature; 0 takes the likeliest token.")] = 0.8
    top_k: Annotated[int, _count("--top-k", least=0, text="Only the k likeliest; 0 is all.")] = 40
    top_p: Annotated[float, _real("--top-p", most=1, text="Only the likeliest of this mass.")] = (
        0.95
    )
    min_p: Annotated[
        float, _real("--min-p", most=1, text="Only tokens at least this part of the likeliest.")
    ] = 0.05
    repeat_penalty: Annotated[
        float, _real("--repeat-penalty", least=0.01, text="Penalty for repeating; 1 is none.")
    ] = 1.0
    repeat_last_n: Annotated[
        int, _count("--repeat-last-n", least=0, text="Tokens looked back on for repeats.")
    ] = 64
    seed: Annotated[
        int | None,
        _count(
            "-s", "--seed", least=0, most=2**32 - 1, text="Seed of the choices (default: random)."
        ),
    ] = None
    reverse_prompt: Annotated[
        tuple[str, ...], _text("-r", "--reverse-prompt", text="Stop at this text; may be repeated.")
    ] = ()
    grammar: Annotated[str | None, _text("--grammar", text="GBNF grammar of the reply.")] = None
    grammar_file: Annotated[
        str | None, _text("--grammar-file", metavar="FILE", text="File with a GBNF grammar.")
    ] = None
    json_schema: Annotated[
        str | None, _text("-j", "--json-schema", metavar="JSON", text="JSON schema of the reply.")
    ] = None


@dataclass(frozen=True, slots=True)
class PromptFlags:
    """What is said to the model."""

    prompt: Annotated[
        str | None, _text("-p", "--prompt", text="Answer this once and leave; - reads stdin.")
    ] = None
    file: Annotated[
        str | None, _text("-f", "--file", metavar="FILE", text="Answer the text of this file once.")
    ] = None
    system_prompt: Annotated[
        str | None, _text("-sys", "--system-prompt", text="System prompt.")
    ] = None
    system_prompt_file: Annotated[
        str | None,
        _text("-sysf", "--system-prompt-file", metavar="FILE", text="File with a system prompt."),
    ] = None
    n_predict: Annotated[
        int | None,
        _count("-n", "--n-predict", "--max-tokens", text="Most tokens of a reply."),
    ] = None
    overflow: Annotated[
        str,
        _choice(
            "--overflow", choices=("error", "shift"),
            text="When the context is full: stop with an error, or forget the oldest.",
        ),
    ] = "error"  # fmt: skip
    raw: Annotated[
        bool, _switch("--raw", text="Continue the prompt as it is, without a chat template.")
    ] = False


@dataclass(frozen=True, slots=True)
class TraceFlags:
    """What is written down about a run."""

    trace: Annotated[
        str | None,
        _text(
            "--trace", metavar="FILE.json",
            text="Write what was read, computed and waited for, and the memory held, as a trace "
            "that Perfetto and chrome://tracing show.",
        ),
    ] = None  # fmt: skip


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """`edgert chat` and `edgert run`."""

    model: ModelFlags
    prompt: PromptFlags
    sampling: SamplingFlags
    draft: DraftFlags
    output: OutputFlags
    trace: TraceFlags = TraceFlags()


@dataclass(frozen=True, slots=True)
class BenchFlags:
    """What `edgert bench` measures."""

    n_prompt: Annotated[
        int, _count("-p", "--n-prompt", least=0, text="Tokens of the prefill test; 0 skips it.")
    ] = 512
    n_gen: Annotated[
        int, _count("-n", "--n-gen", least=0, text="Tokens of the decode test; 0 skips it.")
    ] = 128
    repetitions: Annotated[
        int, _count("-r", "--repetitions", most=1000, text="Runs of each test.")
    ] = 5
    output: Annotated[
        str,
        _choice(
            "-o", "--output", choices=("md", "json", "jsonl", "csv"), text="Form of the result."
        ),
    ] = "md"
    bench_seed: Annotated[int, _count("-s", "--seed", least=0, text="Seed of the tokens.")] = 1


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """`edgert bench`."""

    model: ModelFlags
    bench: BenchFlags
    output: OutputFlags
    trace: TraceFlags = TraceFlags()


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    """`edgert eval`."""

    model: ModelFlags
    text: Annotated[str | None, Flag((), "The text, a UTF-8 file.", "TEXT")] = None
    chunks: Annotated[
        int | None, _count("--chunks", text="Only the first windows of the text (default: all).")
    ] = None
    eval_output: Annotated[
        str, _choice("-o", "--output", choices=("text", "json"), text="Form of the result.")
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
        bool, _switch("--measure", text="Measure now, for some seconds, and remember the figures.")
    ] = False
    catalog: Annotated[
        bool, _switch("--catalog", text="Show the known devices instead of this host.")
    ] = False
    threads: Annotated[
        int | None,
        _count("-t", "--threads", most=512, text="Threads (default: every core it may use)."),
    ] = None
    output: OutputFlags


@dataclass(frozen=True, slots=True)
class TrustFlags:
    """Whose manifests are accepted."""

    trusted_keys: Annotated[
        tuple[str, ...],
        _text(
            "--trusted-key", metavar="HEX|FILE",
            text="Accept only manifests signed by this public key; may be repeated.",
        ),
    ] = ()  # fmt: skip


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
        _text("-m", "--model", metavar="FILE", text="The manifest's model, if it lies elsewhere."),
    ] = None
    trust: TrustFlags
    layout: Annotated[
        str, _choice("--layout", choices=("packed",), text="Which layout of a model to write.")
    ] = "packed"
    out: Annotated[
        str | None,
        _text("--out", metavar="FILE", text="Where to write the layout (default: the cache)."),
    ] = None
    output: OutputFlags


@dataclass(frozen=True, slots=True, kw_only=True)
class KeysOptions:
    """`edgert keys`."""

    action: Annotated[str | None, Flag((), "new makes a key.", "new")] = None
    key_file: Annotated[
        str | None, Flag((), "Where to write the private key; must not exist.", "FILE")
    ] = None
    output: OutputFlags


@dataclass(frozen=True, slots=True, kw_only=True)
class SignOptions:
    """`edgert sign`."""

    manifest: Annotated[str | None, Flag((), "The manifest to sign.", "MANIFEST")] = None
    key: Annotated[
        str | None, _text("--key", metavar="FILE", text="Private key that edgert keys new made.")
    ] = None
    output: OutputFlags


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaOptions:
    """`edgert schema`."""

    format_name: Annotated[
        str | None, Flag((), "The file format.", "manifest|profile|topology")
    ] = None
    output: OutputFlags
