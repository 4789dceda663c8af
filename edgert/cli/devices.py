"""`edgert devices`: what this host has, how fast it is and how that is known."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from edgert.cli.opening import find_model
from edgert.cli.this_host import Asked, heads_of, this_host, types_of
from edgert.errors import ConfigError
from edgert.units import format_bytes, format_rate
from quant.model_spec import read_model_spec
from quant.tensor_file import open_tensor_file

if TYPE_CHECKING:
    from devices.profile import DeviceProfile, Figure, HostProfile
    from edgert.cli.command import Context
    from edgert.cli.options import DevicesOptions

_MOST_PORT_DIGITS = 5
_UNITS_OF_AGE = ((86400, "days"), (3600, "h"), (60, "min"))


def run(options: DevicesOptions, context: Context) -> int:
    """Print this host's profile, or the known ones.

    Raises:
        ConfigError: options contradict one another, or there is no such model.
    """
    if options.lan:
        from edgert.cli.lan import show_workers

        return show_workers(context, as_json=options.output.json)
    if options.catalog:
        return _show_catalog(options)
    if options.link is not None:
        return _show_link(options.link, as_json=options.output.json)
    if options.measure:
        context.say("measuring for a minute or more; anything else that runs makes figures worse")
    host = this_host(_asked(options, context), context.directories, context.env)
    if options.output.json:
        print(host.model_dump_json(indent=2))
        return 0
    for line in _lines(host, time.time()):
        print(line)
    return 0


def _show_link(peer: str, *, as_json: bool) -> int:
    """Measure a link and print its figures, as a topology file has them."""
    from devices.measure_link import loopback_peer, measure_link

    if peer == "loopback":
        with loopback_peer() as address:
            rates = measure_link(address)
    else:
        host, _, port = peer.rpartition(":")
        is_number = port.isascii() and port.isdecimal() and len(port) <= _MOST_PORT_DIGITS
        if not host or not is_number or not 0 < int(port) < 1 << 16:
            raise ConfigError(f"--link {peer}: wanted HOST:PORT", hint="or --link loopback")
        rates = measure_link((host, int(port)))
    figures = {
        "round_trip_s": rates.round_trip_s, "to_peer_bytes_per_s": rates.to_peer,
        "from_peer_bytes_per_s": rates.from_peer,
    }  # fmt: skip
    if as_json:
        print(json.dumps({name: figure.model_dump() for name, figure in figures.items()}))
        return 0
    print(f"round trip of 8 KiB: {1e6 * rates.round_trip_s.value:.0f} us")
    print(f"to the peer {_rate(rates.to_peer)}, from it {_rate(rates.from_peer)}")
    return 0


def _show_catalog(options: DevicesOptions) -> int:
    """Print the names, or the profile of the one that is named in place of a model."""
    from devices.catalog import known_host, names

    if options.measure:
        raise ConfigError("--measure is for this host, --catalog for others: choose one")
    if options.path is not None:
        chosen = [known_host(options.path)]
    else:
        chosen = [known_host(name) for name in names()]
    if options.output.json:
        profiles = [host.model_dump(mode="json") for host in chosen]
        print(json.dumps(profiles if options.path is None else profiles[0], indent=2))
    elif options.path is not None:
        for line in _lines(chosen[0], 0.0):
            print(line)
    else:
        width = max(len(host.host_id) for host in chosen)
        for host in chosen:
            print(f"{host.host_id:{width}}  {host.name}: {_kinds(host)}")
    return 0


def _kinds(host: HostProfile) -> str:
    return ", ".join(device.name for device in host.devices)


def _asked(options: DevicesOptions, context: Context) -> Asked:
    if options.path is None:
        return Asked(context.directories.cache, (), options.threads, options.measure)
    path = find_model(options.path, context.env)
    file = open_tensor_file(path)
    heads = heads_of(read_model_spec(file))
    return Asked(path, types_of(file), options.threads, options.measure, heads=heads)


def _lines(host: HostProfile, now_s: float) -> Iterator[str]:
    yield f"{host.name} ({host.system}), {_age(host, now_s)}"
    for pool in host.pools:
        yield (
            f"memory {pool.pool_id}: {format_bytes(pool.total_bytes)}, "
            f"{format_bytes(pool.available_bytes)} available, {_rate(pool.bytes_per_s)}"
        )
    for device in host.devices:
        yield from _device_lines(device, host)
    if host.flash is not None:
        yield f"flash: {host.flash.kind}"
        for point in host.flash.points:
            size = f"{point.request_bytes // 1024} KiB"
            yield f"  {size:>9} x {point.n_in_flight}: {_rate(point.bytes_per_s)}"
    for runtime in host.runtimes:
        yield f"{runtime.name} {runtime.version}: {', '.join(runtime.backends)}"
    for absence in host.absences:
        yield f"absent: {absence.what}: {absence.reason}"


def _device_lines(device: DeviceProfile, host: HostProfile) -> Iterator[str]:
    cores = f", {host.n_cores} cores, {host.n_threads} threads" if device.kind == "cpu" else ""
    yield f"{device.device_id}: {device.name}{cores}"
    for kernel in device.kernels:
        yield (
            f"  {kernel.ggml_type:5} {kernel.layout:8} {_rate(kernel.matvec_bytes_per_s)}, "
            f"{kernel.matmat_flops.value / 1e9:.0f} GFLOP/s{_known(kernel.matmat_flops)}"
        )

    for attention in device.attention:
        yield (
            f"  attention over {attention.cache_type}, heads of {attention.head_length}: "
            f"{attention.decode_flops.value / 1e9:.1f} GFLOP/s{_known(attention.decode_flops)}, "
            f"{attention.prefill_tokens} tokens "
            f"{attention.prefill_flops.value / 1e9:.0f} GFLOP/s{_known(attention.prefill_flops)}"
        )


def _rate(rate: Figure) -> str:
    return f"{format_rate(rate.value)}{_known(rate)}"


def _known(figure: Figure) -> str:
    spread = f" ±{100 * figure.spread:.0f} %" if figure.spread is not None else ""
    return spread if figure.origin == "measured" and spread else f" ({figure.origin})"


def _age(host: HostProfile, now_s: float) -> str:
    if host.fingerprint is None:
        return "published figures"
    if host.measured_at_s is None:
        return "never measured (edgert devices --measure)"
    age_s = max(0.0, now_s - host.measured_at_s)
    for size_s, name in _UNITS_OF_AGE:
        if age_s >= size_s:
            return f"measured {age_s / size_s:.0f} {name} ago"
    return "measured just now"
