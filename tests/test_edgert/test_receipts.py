"""Each reply says which hosts made it and what went to them, to the byte."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import pytest

import edgert.models
from edgert.engine import Engine, EngineSettings
from edgert.hosts.hidden_states import TAG_BYTES
from edgert.hosts.remote_part import Codecs
from edgert.receipt import HostUse, Receipt, as_row
from edgert.sampling import SamplingParams
from hosts_parts import stages
from quant.activations.settings import CodecSettings
from quant.parts.spec import PartSpec

TINY = Path(edgert.models.__file__).parent / "tiny-chat.gguf"
N_LAYER, N_EMBD, UBATCH = 8, 256, 16
HEADER, STEP, RESULT = 20, 24, 4
F16 = CodecSettings(kind="f16")
CLOUD = HostUse("cloud", "layers 3 to 8", ("q8_0",), "f16", "f16", 5_000_000, 2_000_000)


@pytest.mark.model
def test_the_receipt_of_a_reply_counts_every_byte_of_it_and_no_other(tmp_path: Path) -> None:
    parts = [
        (PartSpec(0, 3, embedding=False, head="none"), True),
        (PartSpec(3, N_LAYER, embedding=False, head="none"), False),
        (PartSpec(N_LAYER, N_LAYER, embedding=False, head="whole"), True),
    ]
    hosts = stages(TINY, parts, tmp_path, Codecs(F16, F16))
    with closing(hosts), Engine(hosts.backend, EngineSettings("tiny")) as engine:
        link = hosts.links[0]
        params = SamplingParams(temperature=0)
        for prompt in ("Hello there, how are you today? What is it that you would like?", "No"):
            sent, received = link.sent_bytes, link.received_bytes
            reply = engine.complete(prompt, max_tokens=7, sampling=params)
            receipt = reply.receipt
            assert receipt.sent_bytes == link.sent_bytes - sent > 0
            assert receipt.received_bytes == link.received_bytes - received > 0
        n_prompt = reply.stats.n_prefilled_tokens
        n_passes = reply.stats.n_passes
        n_steps = -(-n_prompt // UBATCH) + n_passes
        rows = (n_prompt + n_passes) * 2 * N_EMBD + n_steps * (TAG_BYTES + 1)
        # Of a prompt the last row alone comes back; no row is written as f32.
        n_back = 1 + n_passes
        back = n_back * (2 * N_EMBD + 1) + n_steps * TAG_BYTES
        assert receipt.received_bytes == n_steps * (HEADER + RESULT) + back
        truncated = receipt.sent_bytes - n_steps * (HEADER + STEP) - rows
        assert truncated == HEADER + 20  # what the prompt before left was forgotten


def test_a_receipt_of_a_while_is_the_difference() -> None:
    later = CLOUD.plus(100, 20)
    found = Receipt("q8_0/f16", (later,)).since(Receipt("q8_0/f16", (CLOUD,)))
    assert (found.sent_bytes, found.received_bytes) == (100, 20)
    alone = Receipt("f16/f16", (CLOUD,), "cloud: closed the connection")
    assert alone.since(Receipt("f16/f16", (CLOUD,))).hosts == ()
    assert alone.since(None).hosts == (CLOUD,)


def test_a_receipt_in_words_names_the_codec_and_the_host() -> None:
    assert Receipt().describe() is None
    assert Receipt(hosts=(CLOUD,)).describe() == (
        "cloud: layers 3 to 8, sent 5.00 MB, received 2.00 MB (f16)"
    )
    row = as_row(Receipt(hosts=(CLOUD,)))
    assert row["sent_bytes"] == 5_000_000
    assert row["hosts"] == [asdict(CLOUD) | {"precision": ["q8_0"]}]
    assert json.loads(json.dumps(row)) == row
