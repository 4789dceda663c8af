#!/usr/bin/env python3
"""A plan for every known device: a 7B dense shape and a 30B-A3B expert shape, or what forbids it.

The models are headers with a hole in place of the weights. Every manifest is checked by its own
rules; what cannot be planned must name the limit that binds. Ends with a JSON line.

usage: plan_catalog.py FOLDER [--topology]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from devices.catalog import known_host, names
from devices.topology import Topology
from edgert.errors import PlanError
from edgert.units import format_bytes
from make_model import Request, make_model
from partition.bind import bind
from partition.goal import ALL_ABILITIES, Goal
from partition.language_workload import LanguageWorkload, describe_language
from partition.manifest import ModelFile, ModelIdentity
from partition.manifest_file import canonical_json, parse_manifest
from partition.plan import make_plan
from quant.model_spec import read_model_spec
from quant.tensor_file import open_tensor_file

SHAPES = ("7b", "30b-a3b")
_NO_HASH = "0" * 64  # of a file that is a hole


def workload_of(path: Path) -> tuple[LanguageWorkload, ModelIdentity]:
    """Return what the planner needs of a header."""
    file = open_tensor_file(path)
    spec = read_model_spec(file)
    workload = describe_language(file, spec)
    model = ModelIdentity(
        format="gguf", name=spec.name, architecture=spec.architecture,
        n_layer=len(workload.run_layers), weight_bytes=spec.weight_bytes,
        files=(ModelFile(path=path.name, size_bytes=file.shards[0].size_bytes, sha256=_NO_HASH),),
    )  # fmt: skip
    return workload, model


def plan_one(workload: LanguageWorkload, model: ModelIdentity, name: str) -> dict[str, object]:
    """Plan for one device; the outcome in words and numbers."""
    host = known_host(name)
    goal = Goal(n_prompt=512, n_ctx=4096, abilities=ALL_ABILITIES)
    started_s = time.perf_counter()
    try:
        plan = make_plan(workload, Topology(home=host.host_id, hosts=(host,)), goal)
    except PlanError as error:
        took_s = time.perf_counter() - started_s
        return {"device": name, "seconds": took_s, "no_plan": error.message}
    took_s = time.perf_counter() - started_s
    text = canonical_json(bind(plan, model, "catalog"))
    manifest = parse_manifest(text, name)
    return {
        "device": name,
        "seconds": took_s,
        "plan": plan.chosen.name,
        "tok_s": manifest.predicted.decode_tok_s.value,
        "ttft_s": manifest.predicted.ttft_ms.value / 1e3,
        "peak": format_bytes(manifest.predicted.peak_memory_bytes.value),
        "binds": plan.binds,
        "requires": list(manifest.requires),
    }


def main() -> None:
    """Plan for every device and print a line each."""
    parser = argparse.ArgumentParser(description="a plan for every known device")
    parser.add_argument("folder", type=Path, help="where the headers are written")
    folder = parser.parse_args().folder
    outcomes = []
    for shape in SHAPES:
        path = make_model(Request(shape, folder / f"{shape}-header.gguf", header_only=True))[0]
        workload, model = workload_of(path)
        path.unlink()
        for name in names():
            outcome = {"model": shape, **plan_one(workload, model, name)}
            outcomes.append(outcome)
            print(json.dumps(outcome))
    n_planned = sum("plan" in outcome for outcome in outcomes)
    n_refused = sum("no_plan" in outcome for outcome in outcomes)
    print(json.dumps({"n_planned": n_planned, "n_refused": n_refused, "outcomes": outcomes}))


if __name__ == "__main__":
    main()
