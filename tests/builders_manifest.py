"""Builders of valid manifests, as models and as documents to edit."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence

from partition.manifest import Manifest
from partition.manifest_routing import pack_shares, pack_tokens

N_LAYER = 4
CONTENT = b"the weights of a model"

Document = dict[str, object]


def figure(value: float) -> Document:
    return {"value": value, "low": value * 0.5, "high": value * 1.5}


def host(host_id: str, *, kinds: Sequence[str] = ("cpu",)) -> Document:
    return {
        "host_id": host_id,
        "name": f"the {host_id}",
        "fingerprint": "0123456789abcdef",
        "pools": [{"pool_id": "ram", "limit_bytes": 2 << 30}],
        "devices": [
            {"device_id": f"{kind}0", "kind": kind, "name": "a device", "pool_id": "ram"}
            for kind in kinds
        ],
    }


def tiers(first: int, end: int, *, embedding: bool, head: bool) -> Document:
    names = [f"blk.{layer}.{name}.weight" for layer in range(first, end) for name in ("q", "ffn")]
    return {
        "layout": "file",
        "pinned": names + (["output.weight"] if head else []),
        "streamed": [],
        "looked_up": ["token_embd.weight"] if embedding else [],
        "cached": [],
        "window_bytes": 0,
        "experts": None,
    }


def stage(name: str, host_id: str, layers: tuple[int, int], **changes: object) -> Document:
    first, end = layers
    document: Document = {
        "stage_id": name,
        "host_id": host_id,
        "device_id": "cpu0",
        "first_layer": first,
        "end_layer": end,
        "embedding": first == 0,
        "head": end == N_LAYER,
        "precision": {"q4_0": 1000, "f32": 16},
        "kv_bytes": 4096,
        "buffer_bytes": 8192,
    }
    document |= changes
    ends = {name: bool(document[name]) for name in ("embedding", "head")}
    return {"tiers": tiers(first, end, **ends)} | document


def document() -> Document:
    """A manifest of one stage on one host."""
    return {
        "schema_version": "1.0",
        "tool_version": "0.1.0",
        "model": {
            "format": "gguf",
            "name": "a model",
            "architecture": "llama",
            "n_layer": N_LAYER,
            "weight_bytes": len(CONTENT),
            "files": [model_file("model.gguf", CONTENT)],
        },
        "goal": {"minimise": "tpot", "n_prompt": 128, "ceilings": {"memory": 1e9}},
        "hosts": [host("home")],
        "stages": [stage("s0", "home", (0, N_LAYER))],
        "run": {
            "n_ctx": 4096, "n_batch": 512, "n_ubatch": 256, "n_logits_max": 33,
            "cache_type_k": "f16", "cache_type_v": "q8_0", "draft": "ngram", "draft_max": 16,
            "tokens_per_pass": 2.0,
        },
        "transport": [],
        "policies": {"home": "home", "may_leave": []},
        "requires": ["resident"],
        "predicted": {
            "load_ms": figure(200.0), "ttft_ms": figure(310.25), "tpot_ms": figure(20.5),
            "decode_tok_s": figure(48.78), "peak_memory_bytes": figure(1.5e9),
            "bytes_read_per_token": figure(0.0), "bytes_sent_per_token": figure(0.0),
            "energy_mj_per_token": None,
        },
        "binds": "memory bandwidth of home/cpu0",
        "decisions": [{"what": "layers", "choice": "all on home", "reason": "they fit"}],
        "baselines": [{"name": "llama.cpp", "tpot_ms": 21.0, "reason": "the same placement"}],
        "warnings": [],
    }  # fmt: skip


def two_hosts() -> Document:
    """A pipeline over two hosts, the head back at home."""
    made = document()
    made["hosts"] = [host("home"), host("board", kinds=("cpu", "gpu"))]
    made["stages"] = [
        stage("s0", "home", (0, 1), head=True),
        stage("s1", "board", (1, N_LAYER), head=False, device_id="gpu0"),
    ]
    made["transport"] = [transport("s0", "s1"), transport("s1", "s0")]
    made["policies"] = {"home": "home", "may_leave": ["hidden_states"]}
    made["requires"] = ["resident", "pipeline", "accelerator"]
    return made


def shared() -> Document:
    """Every layer split between two hosts."""
    made = document()
    made["hosts"] = [host("home"), host("board")]
    shares = [{"first_group": a, "end_group": b, "n_groups": 4} for a, b in ((0, 3), (3, 4))]
    made["stages"] = [
        stage("s0", "home", (0, N_LAYER), share=shares[0]),
        stage("s1", "board", (0, N_LAYER), share=shares[1], embedding=False, head=False),
    ]
    made["transport"] = [
        transport("s0", "s1", kind="exchange", codec="f32"),
        transport("s1", "s0", kind="exchange", codec="f32"),
    ]
    made["policies"] = {"home": "home", "may_leave": ["hidden_states"]}
    made["requires"] = ["resident", "tensor_parallel"]
    return made


def edge_cloud() -> Document:
    """Front layers and both ends at home, back layers of the model in another precision."""
    made = document()
    made["hosts"] = [host("home"), host("cloud")]
    made["variants"] = [made["model"] | {"name": "in f16"}]  # type: ignore[operator]
    made["variants"][0]["files"] = [model_file("f16.gguf", CONTENT + b" in f16")]
    made["stages"] = [
        stage("s0", "home", (0, 2), head=True),
        stage("s1", "cloud", (2, N_LAYER), head=False, variant=0),
    ]
    made["transport"] = [transport("s0", "s1"), transport("s1", "s0")]
    made["policies"] = {"home": "home", "may_leave": ["hidden_states"]}
    made["requires"] = ["resident", "pipeline", "edge_cloud"]
    return made


def streaming() -> Document:
    """One stage that streams, looks up and caches experts."""
    made = document()
    made["requires"] = ["streaming", "expert_cache"]
    tiers = made["stages"][0]["tiers"]  # type: ignore[index]
    tiers |= {
        "streamed": ["blk.0.up.weight"],
        "cached": ["blk.1.ffn_gate_exps.weight"],
        "window_bytes": 1 << 20,
        "experts": {"cache_bytes": 1 << 20, "bits": [4, 8]},
    }
    return made


def traced() -> Document:
    """A plan that was made with a trace of four experts, of which a token uses two."""
    layer = {
        "shares": pack_shares([0.75, 0.5, 0.5, 0.25]),
        "choices": pack_tokens([(0, 1), (0, 2), (3, 0)]),
    }
    layers = [layer, {"shares": "", "choices": ""}, layer, layer]
    return {**document(), "routing": {"n_expert": 4, "n_used": 2, "layers": layers}}


def onnx() -> Document:
    """Two stages of a graph on one host."""
    made = document()
    made["model"]["format"] = "onnx"  # type: ignore[index]
    made["hosts"] = [host("home", kinds=("cpu", "npu"))]
    plain = {"embedding": False, "head": False}
    made["stages"] = [
        stage("s0", "home", (0, 2), **plain, subgraph={"inputs": ["x"], "outputs": ["y"]}),
        stage("s1", "home", (2, N_LAYER), **plain, device_id="npu0",
              subgraph={"inputs": ["y"], "outputs": ["z"]}),
    ]  # fmt: skip
    made["transport"] = [transport("s0", "s1", kind="memory", codec="f32")]
    made["requires"] = ["resident", "onnx", "pipeline", "accelerator"]
    return made


def transport(source: str, target: str, *, kind: str = "service", codec: str = "f16") -> Document:
    return {"source_stage": source, "target_stage": target, "kind": kind, "codec": codec}


def model_file(path: str, content: bytes) -> Document:
    digest = hashlib.sha256(content).hexdigest()
    return {"path": path, "size_bytes": len(content), "sha256": digest}


def edited(made: Document, path: str, value: object) -> Document:
    """Return a copy with the value at a path such as `stages.0.tiers.pinned` replaced.

    A callable value is called with what is there.
    """
    made = copy.deepcopy(made)
    *parents, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    place: object = made
    for step in parents:
        place = place[step]  # type: ignore[index]
    present = place[last] if isinstance(last, int) else place.get(last)  # type: ignore
    place[last] = value(present) if callable(value) else value  # type: ignore[index]
    return made


def text(made: Document) -> bytes:
    return json.dumps(made).encode()


def manifest(made: Document | None = None) -> Manifest:
    return Manifest.model_validate_json(text(made or document()))
