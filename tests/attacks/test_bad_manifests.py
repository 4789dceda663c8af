"""Manifests edited by hand: every rule is named with its path and value, and nothing crashes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import builders_manifest as build
from edgert.errors import FormatError
from partition.manifest_file import canonical_json, parse_manifest
from partition.manifest_routing import pack_shares, pack_tokens

VALID: dict[str, Callable[[], build.Document]] = {
    "one": build.document,
    "edge": build.edge_cloud,
    "two": build.two_hosts,
    "shared": build.shared,
    "streaming": build.streaming,
    "onnx": build.onnx,
    "traced": build.traced,
}

# (manifest, path of the edit, what is put there, part of the message)
Case = tuple[str, str, object, str]

TYPES: list[Case] = [
    ("one", "stages.0.first_layer", -3, "$.stages[0].first_layer: -3, wanted >= 0"),
    ("one", "stages.0.first_layer", 1 << 60, "$.stages[0].first_layer: 1152921504606846976, wante"),
    ("one", "stages.0.first_layer", 0.5, "$.stages[0].first_layer: 0.5, wanted a whole number"),
    ("one", "stages.0.first_layer", True, "$.stages[0].first_layer: true, wanted a whole number"),
    ("one", "stages.0.head", 1, "$.stages[0].head: 1, wanted true or false"),
    ("one", "stages.0.surprise", 1, "$.stages[0].surprise: 1, but there is no such key"),
    ("one", "stages.0.tiers.layout", "odd", "$.stages[0].tiers.layout: \"odd\", wanted 'file'"),
    ("one", "stages.0.tiers.pinned", ["a", 3], "$.stages[0].tiers.pinned[1]: 3, wanted text"),
    ("one", "stages.0.tiers.pinned", [""], "pinned[0]: \"\", wanted 1 or more characters"),
    ("one", "stages.0.precision", {"q4_0": -1}, "$.stages[0].precision.q4_0: -1, wanted >= 0"),
    ("one", "stages", [], "$.stages: a list of 0, wanted 1 or more"),
    ("one", "stages", {}, "$.stages: an object of 0, wanted a list"),
    ("one", "hosts", lambda hosts: hosts * 65, "$.hosts: a list of 65, wanted 64 at most"),
    ("one", "hosts.0.host_id", "../home", "$.hosts[0].host_id: \"../home\", wanted text that"),
    ("one", "hosts.0.host_id", "home\n", "$.hosts[0].host_id: \"home\\n\", wanted text that"),
    ("one", "hosts.0.fingerprint", "xyz", "$.hosts[0].fingerprint: \"xyz\", wanted text that"),
    ("one", "model.files.0.sha256", "0" * 63, "$.model.files[0].sha256: \"000"),
    ("one", "model.n_layer", 0, "$.model.n_layer: 0, wanted >= 1"),
    ("one", "run.cache_type_k", "f32", "$.run.cache_type_k: \"f32\", wanted 'f16'"),
    ("one", "goal.ceilings", {"a b": 1}, "$.goal.ceilings[\"a b\"]: \"a b\", wanted"),
    ("one", "predicted.tpot_ms.value", "1", "$.predicted.tpot_ms.value: \"1\", wanted a number"),
    ("one", "predicted.tpot_ms.high", 1e999, "$.predicted.tpot_ms.high: "),
    ("one", "requires", ["magic"], "$.requires[0]: \"magic\", wanted 'resident'"),
    ("one", "signature", {"value": "0"}, "$.signature.public_key: missing"),
    ("one", "binds", "x" * 2001, "wanted 2000 characters at most"),
]  # fmt: skip

FILES: list[Case] = [
    ("one", "model.files.0.path", path, f"$.model.files[0].path: {json.dumps(path)}, wanted {rule}")
    for path, rule in (
        ("/etc/passwd", "a relative path"),
        ("c:model.gguf", "a relative path"),
        ("../model.gguf", "no . or .."),
        ("a/../../model.gguf", "no . or .."),
        ("./model.gguf", "no . or .."),
        ("a//model.gguf", "no empty part"),
        ("a/", "no empty part"),
        ("a\\model.gguf", "forward slashes"),
        ("~/model.gguf", "a path that does not start with ~"),
        ("model\0.gguf", "printable characters"),
        ("model\n.gguf", "printable characters"),
        ("model\u202e.gguf", "printable characters"),
        ("x" * 256, "parts of 255 bytes at most"),
    )
    if len(path) < 60
] + [
    ("one", "model.files.0.path", "x" * 256, "wanted parts of 255 bytes at most"),
    ("one", "model.files", lambda f: f * 2, "$.model.files[1].path: \"model.gguf\", wanted a name"),
    ("one", "model.files", lambda f: [*f, build.model_file("model.gguf/a", b"1")],
     "$.model.files[0].path: \"model.gguf\", wanted a file, not the folder of one"),
    ("one", "model.files.0.size_bytes", 0, "$.model.files[0].size_bytes: 0, wanted 1 or more"),
    ("one", "model.weight_bytes", 1 << 40, "$.model.weight_bytes: 1099511627776, wanted 22 at mos"),
]  # fmt: skip

PLACES: list[Case] = [
    ("two", "hosts.1.host_id", "home", "$.hosts[1].host_id: \"home\", wanted a name other than"),
    ("one", "hosts.0.pools", lambda p: p * 2, "$.hosts[0].pools[1].pool_id: \"ram\", wanted a nam"),
    ("one", "hosts.0.devices", lambda d: d * 2, "$.hosts[0].devices[1].device_id: \"cpu0\", wante"),
    ("one", "hosts.0.devices.0.pool_id", "vram", "devices[0].pool_id: \"vram\", wanted one of ram"),
    ("one", "hosts", lambda hosts: [*hosts, build.host("idle")], "\"idle\", wanted a host with a"),
    ("one", "policies.home", "nobody", "$.policies.home: \"nobody\", wanted one of home"),
    ("one", "stages.0.host_id", "nobody", "$.stages[0].host_id: \"nobody\", wanted one of home"),
    ("one", "stages.0.device_id", "gpu0", "$.stages[0].device_id: \"gpu0\", wanted one of cpu0 of"),
    ("two", "stages.1.stage_id", "s0", "$.stages[1].stage_id: \"s0\", wanted a name other than"),
    ("one", "hosts.0.pools.0.limit_bytes", 9999, "limit_bytes: 9999, wanted 12288 or more"),
]  # fmt: skip

LAYERS: list[Case] = [
    ("two", "stages.1.first_layer", 2, "$.stages[1].first_layer: 2, wanted 1: layers follow"),
    ("two", "stages.1.first_layer", 0, "$.stages[1].first_layer: 0, wanted 1: layers follow"),
    ("two", "stages", lambda s: [s[0], s[0] | {"stage_id": "again"}, s[1]],
     "$.stages[1].first_layer: 0, wanted 1: layers follow"),
    ("two", "stages", lambda s: s[::-1], "$.stages[0].first_layer: 1, wanted 0: layers follow"),
    ("one", "stages.0.end_layer", 3, "$.stages[0].end_layer: 3, wanted 4, as model.n_layer says"),
    ("two", "stages.1.end_layer", 1, "$.stages[1].end_layer: 1, wanted more than first_layer"),
    ("one", "stages.0.first_layer", 1, "$.stages[0].first_layer: 1, wanted 0: layers follow"),
    ("one", "stages.0.embedding", False, "$.stages[0].embedding: false, wanted true: no stage"),
    ("one", "stages.0.head", False, "$.stages[0].head: false, wanted true: no stage has the head"),
    ("two", "stages.1.embedding", True, "$.stages[1].embedding: true, wanted false: an earlier"),
    ("two", "stages.1.head", True, "$.stages[1].head: true, wanted false: an earlier stage"),
    ("two", "policies.home", "board", "$.stages[0].head: true, wanted the head on the last stage"),
    ("shared", "stages.1.share.first_group", 2, "$.stages[1].share.first_group: 2, wanted 3: shar"),
    ("shared", "stages.1.share.n_groups", 5, "$.stages[1].share.n_groups: 5, wanted 4, as in"),
    ("shared", "stages.0.share.end_group", 0, "$.stages[0].share.end_group: 0, wanted more than"),
    ("shared", "stages.1.share.end_group", 5, "$.stages[1].share.end_group: 5, wanted 4, as n_gro"),
    ("shared", "stages.1.share", None, "$.stages[1].first_layer: 0, wanted 4: layers follow"),
    ("one", "stages.0.subgraph", {"inputs": [], "outputs": []}, "subgraph: an object of 1, wanted"),
    ("onnx", "stages.0.subgraph", None, "$.stages[0].subgraph: null, wanted a subgraph"),
    ("onnx", "stages.0.share", {"first_group": 0, "end_group": 1, "n_groups": 1},
     "$.stages[0].share: an object of 1, wanted none, as the model is ONNX"),
]  # fmt: skip

TIERS: list[Case] = [
    ("one", "stages.0.tiers.pinned", lambda names: [*names, names[0]],
     "$.stages[0].tiers.pinned[9]: \"blk.0.q.weight\", wanted a name other than that of "
     "$.stages[0].tiers.pinned[0]"),
    ("streaming", "stages.0.tiers.streamed", ["blk.1.q.weight"],
     "$.stages[0].tiers.streamed[0]: \"blk.1.q.weight\", wanted a name other than that of "
     "$.stages[0].tiers.pinned[2]"),
    ("streaming", "stages.0.tiers.window_bytes", 0, "window_bytes: 0, wanted more than 0, as"),
    ("one", "stages.0.tiers.window_bytes", 1, "$.stages[0].tiers.window_bytes: 1, wanted 0, as no"),
    ("streaming", "stages.0.tiers.experts", None, "$.stages[0].tiers.experts: null, wanted a cach"),
    ("one", "stages.0.tiers.experts", {"cache_bytes": 1, "bits": []}, "wanted none, as none are c"),
    ("streaming", "stages.0.tiers.experts.cache_bytes", 0, "cache_bytes: 0, wanted more than 0"),
    ("streaming", "stages.0.tiers.experts.bits", [4, 4], "a list of 2, wanted each width once"),
    ("one", "stages.0.tiers", {"layout": "file"},
     "$.stages[0].tiers.pinned: a list of 0, wanted a tensor in this tier or in another one"),
    ("two", "stages.1.tiers.pinned", lambda names: [*names, "output.weight"],
     "$.stages[1].tiers.pinned[6]: \"output.weight\", wanted no tensor of the head, which stage s"),
    ("shared", "stages.1.tiers.pinned", lambda names: [*names, "output_norm.weight"],
     "$.stages[1].tiers.pinned[8]: \"output_norm.weight\", wanted no tensor of the head"),
    ("two", "stages.0.tiers.pinned", lambda names: [*names, "blk.2.q.weight"],
     "$.stages[0].tiers.pinned[3]: \"blk.2.q.weight\", wanted a tensor of layers [0, 1)"),
]  # fmt: skip

SETTINGS: list[Case] = [
    ("one", "run.n_batch", 8192, "$.run.n_batch: 8192, wanted 4096 at most, as run.n_ctx says"),
    ("one", "run.n_ubatch", 1024, "$.run.n_ubatch: 1024, wanted 512 at most, as run.n_batch says"),
    ("one", "run.n_logits_max", 513, "$.run.n_logits_max: 513, wanted 512 at most, as run.n_batch"),
    ("one", "run.draft", "none", "$.run.tokens_per_pass: 2.0, wanted 1, as run.draft is none"),
    ("one", "run.tokens_per_pass", 17.5, "$.run.tokens_per_pass: 17.5, wanted 17 at most, one mor"),
    ("one", "goal.n_prompt", 5000, "$.goal.n_prompt: 5000, wanted 4096 at most, as run.n_ctx says"),
    ("one", "goal.ceilings.memory", 0.0, "$.goal.ceilings.memory: 0.0, wanted more than 0"),
    ("one", "predicted.ttft_ms.value", 900.0, "$.predicted.ttft_ms.value: 900.0, wanted 155.125 t"),
    ("one", "predicted.ttft_ms.low", 400.0, "$.predicted.ttft_ms.value: 310.25, wanted 400.0 to"),
]  # fmt: skip

LINKS: list[Case] = [
    ("two", "transport.0.target_stage", "s9", "$.transport[0].target_stage: \"s9\", wanted one of"),
    ("two", "transport.0.target_stage", "s0", "$.transport[0].target_stage: \"s0\", wanted a stag"),
    ("two", "transport", lambda t: [*t, t[0]], "$.transport[2].target_stage: \"s1\", wanted one"),
    ("two", "transport.0.kind", "memory", "$.transport[0].kind: \"memory\", wanted exchange or"),
    ("two", "transport", [], "$.transport: a list of 0, wanted one from s0 to s1, on another devi"),
    ("two", "transport", lambda t: t[:1], "$.transport: a list of 1, wanted one from s1 to s0"),
    ("onnx", "transport", lambda t: [*t, build.transport("s1", "s0")], "\"s0\", wanted a stage ri"),
    ("onnx", "transport.0.peer_key", "0" * 64, "$.transport[0].peer_key: \"0000"),
    ("two", "policies.may_leave", [], "wanted hidden_states among them, as stage s1 is not at hom"),
    ("two", "policies.may_leave", ["hidden_states"] * 2, "$.policies.may_leave: a list of 2, want"),
    ("one", "requires", [], "$.requires: a list of 0, wanted resident among them, as stage s0 nei"),
    ("streaming", "requires", lambda r: [*r, "resident"], "$.requires[2]: \"resident\", wanted on"),
    ("one", "requires", lambda r: [*r, "streaming"], "$.requires[1]: \"streaming\", wanted only w"),
    ("one", "requires", lambda r: [*r, "edge_cloud"], "$.requires[1]: \"edge_cloud\", wanted it w"),
    ("one", "requires", ["resident", "resident"], "$.requires[1]: \"resident\", wanted each once"),
    ("streaming", "requires", [], "wanted streaming among them, as stage s0 streams (and 1 more)"),
    ("two", "requires", ["resident", "pipeline"], "wanted accelerator among them, as stage s1 is "),
    ("two", "requires", ["resident", "accelerator"], "wanted pipeline among them, as stages follo"),
    ("shared", "requires", ["resident"], "wanted tensor_parallel among them, as stage s0 has a sh"),
    ("shared", "stages.1.head", True, "wanted logits among them, as stage s1 has the head and is "),
    ("onnx", "requires", ["resident", "pipeline", "accelerator"], "wanted onnx among them, as the"),
]  # fmt: skip

_OTHER_SHARES = [pack_shares(x) for x in ([0.5], [0, 0, 0, 1.5], [0, 0, 0, float("nan")])]
_OTHER_CHOICES = [pack_tokens([x]) for x in ((0, 4), (1, 1), (0,))]

ROUTING: list[Case] = [
    ("traced", "routing.n_used", 5, "$.routing.n_used: 5, wanted 4 at most"),
    ("traced", "routing.n_used", 0, "$.routing.n_used: 0, wanted >= 1"),
    ("traced", "routing.layers", [], "$.routing.layers: a list of 0, wanted 1 or more"),
    ("traced", "routing.layers.0.shares", "", "wanted as many layers as have shares"),
    *(
        ("traced", "routing.layers.2.shares", text, "f64 from 0 to 1, or none")
        for text in ("?", "A", "AAAA", "é", *_OTHER_SHARES)
    ),
    *(
        ("traced", "routing.layers.2.choices", text, "u16 below 4, 2 different a token")
        for text in ("?", "A", "AA==", "é", *_OTHER_CHOICES)
    ),
]

VARIANTS: list[Case] = [
    ("edge", "stages.1.variant", 1, "$.stages[1].variant: 1, wanted less than 1, the variants of"),
    ("edge", "stages.1.variant", -1, "$.stages[1].variant: -1, wanted >= 0"),
    ("edge", "stages.1.variant", None, "$.variants[0]: an object of 1, wanted one that a stage ru"),
    ("edge", "stages.0.variant", 0, "$.stages[0].variant: 0, wanted none, as it is at home, which"),
    ("edge", "stages.0.variant", 0, "(and 2 more)"),
    ("shared", "stages.1.variant", 0, "$.stages[1].variant: 0, wanted less than 0, the variants"),
    ("shared", "stages.1.variant", 0, "(and 1 more)"),
    ("edge", "variants.0.n_layer", 5, "$.variants[0].n_layer: 5, wanted 4, as model.n_layer says"),
    ("edge", "variants.0.architecture", "qwen2", "$.variants[0].architecture: \"qwen2\", wanted l"),
    ("edge", "variants.0.format", "onnx", "$.variants[0].format: \"onnx\", wanted gguf"),
    ("edge", "variants.0.weight_bytes", 99, "$.variants[0].weight_bytes: 99, wanted 29 at most"),
    ("edge", "variants.0.files.0.path", "../f16", "$.variants[0].files[0].path: \"../f16\", want"),
    ("edge", "variants.0.files.0.path", "model.gguf", "a path other than those of $.model"),
    ("edge", "variants.0.files.0.sha256", build.model_file("", build.CONTENT)["sha256"],
     "wanted a file other than $.model has"),
    ("edge", "variants.0.files", [], "$.variants[0].files: a list of 0, wanted 1 or more"),
    ("edge", "variants", lambda v: v * 65, "$.variants: a list of 65, wanted 64 at most"),
    ("edge", "requires", lambda r: r[:2], "wanted edge_cloud among them, as the model has variant"),
]  # fmt: skip

CASES = [*TYPES, *FILES, *PLACES, *LAYERS, *TIERS, *SETTINGS, *LINKS, *ROUTING, *VARIANTS]


def refusal(content: bytes) -> FormatError:
    with pytest.raises(FormatError) as caught:
        parse_manifest(content, "m.json")
    return caught.value


@pytest.mark.parametrize("name", VALID)
def test_unedited_manifests_are_accepted(name: str) -> None:
    made = VALID[name]()
    assert parse_manifest(build.text(made), "m.json") == build.manifest(made)


@pytest.mark.parametrize(("name", "path", "value", "message"), CASES)
def test_hand_edit_is_refused_with_path_value_and_rule(
    name: str, path: str, value: object, message: str
) -> None:
    error = refusal(build.text(build.edited(VALID[name](), path, value)))
    assert message in error.message
    assert error.message.startswith("m.json: $.")
    assert "pydantic" not in error.message
    assert "\n" not in error.message


def test_host_that_gets_the_input_must_be_allowed_to() -> None:
    made = build.edited(build.document(), "policies.home", "home")
    made["hosts"] = [build.host("home"), build.host("board")]
    made["stages"] = [build.stage("s0", "board", (0, build.N_LAYER))]
    error = refusal(build.text(made))
    assert "wanted input among them, as stage s0 is not at home" in error.message
    made["policies"] = {"home": "home", "may_leave": ["input"]}
    error = refusal(build.text(made))
    assert "wanted logits among them, as stage s0 has the head and is not at h" in error.message
    made["policies"] = {"home": "home", "may_leave": ["input", "logits"]}
    error = refusal(build.text(made))
    assert "wanted pipeline among them, as stage s0 is on board" in error.message
    made["requires"] = [*made["requires"], "pipeline"]
    parse_manifest(build.text(made), "m.json")


def test_head_on_another_host_needs_logits_that_may_leave() -> None:
    made = build.two_hosts()
    made["stages"] = [build.stage("s0", "home", (0, 1)), build.stage("s1", "board", (1, 4))]
    made["transport"] = [build.transport("s0", "s1")]
    made["requires"] = ["resident", "pipeline"]
    message = refusal(build.text(made)).message
    assert message.startswith("m.json: $.policies.may_leave: a list of 1, wanted logits among")
    made["policies"] = {"home": "home", "may_leave": ["hidden_states", "logits"]}
    parse_manifest(build.text(made), "m.json")


def test_heads_of_several_stages_need_shards_of_the_vocabulary() -> None:
    made = build.edited(build.shared(), "stages.1.head", True)
    made = build.edited(made, "policies.may_leave", ["hidden_states", "logits"])
    message = refusal(build.text(made)).message
    assert "wanted vocabulary_shards among them, as several stages" in message
    parse_manifest(
        build.text(build.edited(made, "requires", lambda r: [*r, "vocabulary_shards"])), "m.json"
    )


def test_device_has_one_share_of_a_layer() -> None:
    made = build.shared()
    made["hosts"] = [build.host("home", kinds=("cpu", "npu"))]
    made = build.edited(made, "stages.1.host_id", "home")
    message = refusal(build.text(made)).message
    assert (
        '$.stages[1].device_id: "cpu0", wanted a device other than that of $.stages[0]' in message
    )
    made = build.edited(made, "stages.1.device_id", "npu0")
    made = build.edited(made, "requires", lambda r: [*r, "accelerator"])
    parse_manifest(build.text(made), "m.json")


def test_weights_wholly_in_memory_fit_into_it() -> None:
    made = build.edited(build.document(), "stages.0.tiers.looked_up", [])
    # 2 GiB of memory, 4,096 bytes of KV cache and 8,192 of buffers: first they do not fit
    # together, then the weights do not by themselves.
    for more, message in (
        (-4096, f"$.hosts[0].pools[0].limit_bytes: {1 << 31}, wanted {(1 << 31) + 8192} or more"),
        (1, f"$.stages[0].precision: {(1 << 31) + 1}, wanted {1 << 31} bytes at most"),
    ):
        precision = {"q4_0": 1 << 30, "f32": (1 << 30) + more}
        made = build.edited(made, "stages.0.precision", precision)
        assert message in refusal(build.text(made)).message
    # What streams, or is read by rows, is in memory in part only.
    parse_manifest(
        build.text(build.edited(made, "stages.0.tiers.looked_up", ["token_embd.weight"])), "m.json"
    )


def test_predicted_memory_is_that_of_the_largest_host_with_a_stage() -> None:
    made = build.edited(build.two_hosts(), "hosts.0.pools.0.limit_bytes", 1 << 20)
    made = build.edited(made, "predicted.peak_memory_bytes", build.figure(float(1 << 31)))
    parse_manifest(build.text(made), "m.json")
    made = build.edited(made, "hosts.1.pools.0.limit_bytes", (1 << 31) - 1)
    message = refusal(build.text(made)).message
    assert "$.predicted.peak_memory_bytes.value: 2147483648.0, wanted 2147483647 at most" in message


def test_peer_key_of_a_transport_is_that_of_its_target() -> None:
    made = build.edited(build.two_hosts(), "hosts.1.peer_key", "a" * 64)
    made = build.edited(made, "transport.0.peer_key", "b" * 64)
    assert f"wanted {'a' * 64}, as host board has" in refusal(build.text(made)).message
    parse_manifest(build.text(build.edited(made, "transport.0.peer_key", "a" * 64)), "m.json")


def test_tensors_of_no_layer_may_be_on_several_stages() -> None:
    made = build.two_hosts()
    for index in (0, 1):
        made = build.edited(
            made, f"stages.{index}.tiers.pinned", lambda names: [*names, "rope_freqs.weight"]
        )
    parse_manifest(build.text(made), "m.json")


def test_unknown_major_version_is_refused_whatever_else_there_is() -> None:
    error = refusal(b'{"schema_version": "2.0", "layers": []}')
    assert error.message == 'm.json: $.schema_version: "2.0", wanted 1.x'
    assert error.hint is not None
    assert "install" in error.hint


def test_newer_minor_version_is_read_as_long_as_every_key_is_known() -> None:
    made = build.edited(build.document(), "schema_version", "1.9")
    assert parse_manifest(build.text(made), "m.json").schema_version == "1.9"
    error = refusal(build.text(build.edited(made, "novelty", 1)))
    assert "$.novelty: 1, but there is no such key" in error.message
    assert error.hint is not None
    assert "version 1.9" in error.hint


@pytest.mark.parametrize("version", [None, 1.0, "1", "1.0.0", "\uff11.0", "one.two", "99999.0"])
def test_version_that_is_none_is_refused(version: object) -> None:
    made = build.edited(build.document(), "schema_version", version)
    assert "$.schema_version: " in refusal(build.text(made)).message


def test_version_must_be_there() -> None:
    made = build.document()
    del made["schema_version"]
    assert refusal(build.text(made)).message == "m.json: $.schema_version: missing"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "offset 0: line 1, column 1: not JSON"),
        (b'{\n "a": 1,\n', "offset 11: line 3, column 1: not JSON"),
        (b"\xef\xbb\xbf{}", "line 1, column 1: not JSON"),
        (b'{"a":\n"\xff"}', "offset 7: line 2: byte 0xff is not UTF-8"),
        (b"[]", "$: a list of 0, wanted an object"),
        (b"null", "$: null, wanted an object"),
        (b'{"a": {"b": [1, NaN]}}', "$.a.b[1]: NaN, wanted a finite number"),
        (b'{"a": -Infinity}', "$.a: -Infinity, wanted a finite number"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "$.a: 1000"),
        (b'{"a": [{"b": 1, "b": 1}]}', "$.a[0].b: there twice, wanted every key once"),
        (b'{"a": "\\ud800"}', "text with a lone surrogate \\ud800"),
        (b"[" * 1_000_000, "1,000,000 nested levels, wanted 32 at most"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, "40 nested levels, wanted 32 at most"),
        (b"[" + b"[]," * (1 << 20) + b"[]]", "values, wanted 2,097,152 at most"),
        (b"[" + b'"",' * (1 << 21) + b'""]', "strings, wanted 2,097,152 at most"),
        (b" " * (64 << 20) + b"{}", "67,108,866 bytes of JSON, wanted 67,108,864 at most"),
        (b'"' + b'\\"' * (1 << 20), "not JSON: Unterminated string"),
    ],
    ids=range(17),
)
def test_text_that_is_no_manifest_is_refused_where_it_goes_wrong(
    content: bytes, message: str
) -> None:
    assert message in refusal(content).message


def test_truncated_manifest_is_refused_at_every_length() -> None:
    content = canonical_json(build.manifest())
    for length in range(0, len(content) - 2, 7):
        refusal(content[:length])


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(VALID)),
    position=st.floats(0, 1, exclude_max=True),
    length=st.integers(0, 12),
    inserted=st.binary(max_size=8)
    | st.sampled_from([b"-1", b"1e400", b"null", b"{}", b"[]", b'"', b"NaN", b",", b"1" * 400]),
)
def test_mutated_text_raises_format_errors_only(
    name: str, position: float, length: int, inserted: bytes
) -> None:
    content = build.text(VALID[name]())
    place = int(position * len(content))
    mutated = content[:place] + inserted + content[place + length :]
    try:
        manifest = parse_manifest(mutated, "m.json")
    except FormatError:
        return
    assert parse_manifest(canonical_json(manifest), "again") == manifest


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["home", "s0", "cpu0", "blk.0.q.weight", "..", "1.0", -1, 1 << 63]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip


def places(value: object, steps: tuple[str, ...] = ()) -> list[str]:
    found = [".".join(steps)] if steps else []
    if isinstance(value, dict):
        items = [(str(key), item) for key, item in value.items()]
    else:
        items = [(str(i), item) for i, item in enumerate(value)] if isinstance(value, list) else []
    for key, item in items:
        found += places(item, (*steps, key))
    return found


@settings(max_examples=250, deadline=None)
@given(name=st.sampled_from(sorted(VALID)), seed=st.integers(0, 1 << 20), value=VALUES)
def test_any_value_in_any_place_raises_format_errors_only(
    name: str, seed: int, value: object
) -> None:
    made = VALID[name]()
    made = build.edited(made, random.Random(seed).choice(places(made)), value)
    try:
        manifest = parse_manifest(build.text(made), "m.json")
    except FormatError:
        return
    assert parse_manifest(canonical_json(manifest), "again") == manifest


@pytest.mark.parametrize(
    ("name", "path", "value", "message"),
    [
        ("one", "requires", ["resident"] * 200_000,
         "$.requires: a list of 200,000, wanted 64 at most"),
        ("two", "transport", [build.transport("s0", "s1")] * 50_000,
         "$.transport: a list of 50,000, wanted 4096 at most"),
        ("one", "stages.0.tiers.pinned", [1] * 200_000,
         "$.stages[0].tiers.pinned[0]: 1, wanted text"),
        ("one", "stages.0.tiers.pinned", ["blk.0.q.weight"] * 200_000,
         "$.stages[0].tiers.pinned[1]: \"blk.0.q.weight\", wanted a name other than that of"),
        ("one", "stages.0.precision", {f"key {i}": 1 for i in range(200_000)},
         "$.stages[0].precision: an object of 200,000, wanted 64 at most"),
    ],
    ids=range(5),
)  # fmt: skip
def test_huge_counts_are_refused(name: str, path: str, value: object, message: str) -> None:
    assert message in refusal(build.text(build.edited(VALID[name](), path, value))).message
