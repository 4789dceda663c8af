#!/usr/bin/env python3
"""A plan for every known device: a 7B dense shape and a 30B-A3B expert shape, or what forbids it.

Then whole plans for networks of devices are timed.

The models are headers with a hole in place of the weights. Every manifest is checked by its own
rules; what cannot be planned must name the limit that binds. Ends with a JSON line.

usage: plan_catalog.py FOLDER
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

from devices.catalog import known_host, names, usual_link
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
NETWORKS = (
    ("80 layers x 8 devices", "70b", ("raspberry-pi-5-8gb",) * 4 + ("n100-mini-pc-16gb",) * 4),
    ("80 layers x 8 devices, shared memories", "70b", ("ryzen-7840u-laptop-32gb",) * 4),
    ("48 layers x 128 experts x 4 devices", "30b-a3b", ("raspberry-pi-5-8gb",) * 4),
)
# Of many hosts some sets share every layer: where speed alone does not decide, several are tried.
_SHARES = ("orange-pi-5-plus-16gb",) * 8
_SHARE_BYTES = 6 * 10**9
_SHARE_GOAL = Goal(
    n_prompt=128, n_ctx=4096, abilities=ALL_ABILITIES,
    may_leave=("input", "hidden_states", "logits"),
)  # fmt: skip
SHARED = (
    ("80 layers x 8 processors, ttft", replace(_SHARE_GOAL, minimise="ttft_s")),
    ("80 layers x 8 processors, memory", replace(_SHARE_GOAL, minimise="memory_bytes")),
    (
        "80 layers x 8 processors, at most 46 GB",
        replace(_SHARE_GOAL, ceilings={"memory_bytes": 46e9}),
    ),
)
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


def network(names_of_hosts: list[str]) -> Topology:
    """Join known devices by wired links, the first of them home."""
    hosts = tuple(known_host(name, f"host{i}") for i, name in enumerate(names_of_hosts))
    ids = [host.host_id for host in hosts]
    links = tuple(usual_link("ethernet_1g", a, b) for a in ids for b in ids if a != b)
    return Topology(home=ids[0], hosts=hosts, links=links)


def plan_networks(workloads: dict[str, LanguageWorkload]) -> list[dict[str, object]]:
    """Time whole plans: every setting, both kinds of split, the baselines, forecasts."""
    found: list[dict[str, object]] = []
    for what, shape, hosts in NETWORKS:
        topology = network(list(hosts))
        goal = Goal(n_prompt=256, n_ctx=2048, abilities=ALL_ABILITIES, may_leave=("hidden_states",))
        found.append(time_plan(what, workloads[shape], topology, goal))
    topology = processors(network(list(_SHARES)), _SHARE_BYTES)
    found += [time_plan(what, workloads["70b"], topology, goal) for what, goal in SHARED]
    return found


def processors(topology: Topology, limit_bytes: int) -> Topology:
    """Leave every host its processors and so much of each memory."""
    hosts = tuple(
        host.model_copy(
            update={
                "devices": tuple(device for device in host.devices if device.kind == "cpu"),
                "pools": tuple(
                    pool.model_copy(
                        update={"available_bytes": min(limit_bytes, pool.available_bytes)}
                    )
                    for pool in host.pools
                ),
            }
        )
        for host in topology.hosts
    )
    return topology.model_copy(update={"hosts": hosts})


def time_plan(
    what: str, workload: LanguageWorkload, topology: Topology, goal: Goal
) -> dict[str, object]:
    """Plan five times and print the median, of the clock and of the processor."""
    seconds, cpu_seconds = [], []
    chosen = ""
    for _ in range(5):
        started_s, started_cpu_s = time.perf_counter(), time.process_time()
        chosen = make_plan(workload, topology, goal).chosen.name
        seconds.append(time.perf_counter() - started_s)
        cpu_seconds.append(time.process_time() - started_cpu_s)
    outcome: dict[str, object] = {
        "what": what,
        "seconds": statistics.median(seconds),
        "cpu_seconds": statistics.median(cpu_seconds),
        "plan": chosen,
    }
    print(json.dumps(outcome))
    return outcome


def main() -> None:
    """Plan for every device and print a line each."""
    parser = argparse.ArgumentParser(description="a plan for every known device")
    parser.add_argument("folder", type=Path, help="where the headers are written")
    folder = parser.parse_args().folder
    outcomes = []
    workloads = {}
    for shape in (*SHAPES, "70b"):
        path = make_model(Request(shape, folder / f"{shape}-header.gguf", header_only=True))[0]
        workloads[shape], model = workload, _ = workload_of(path)
        path.unlink()
        for name in names() if shape in SHAPES else ():
            outcome = {"model": shape, **plan_one(workload, model, name)}
            outcomes.append(outcome)
            print(json.dumps(outcome))
    n_planned = sum("plan" in outcome for outcome in outcomes)
    n_refused = sum("no_plan" in outcome for outcome in outcomes)
    result = {"n_planned": n_planned, "n_refused": n_refused, "outcomes": outcomes}
    print(json.dumps(result | {"networks": plan_networks(workloads)}))


if __name__ == "__main__":
    main()
