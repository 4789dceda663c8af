"""What figures can be: wide enough for real hardware, narrow enough to catch a wrong unit.

People who write figures into files confuse units, so these are held against usual products of each
kind. Our own probes do not: what they measured may be a throttled volume of a cloud that calls
itself nvme, or an array of disks behind one name, and only has to make sense.

Storage: slowest and fastest products of each kind. Links: payload, so below the line rate, which is
an eighth of the bits a second that they are named for.
"""

from __future__ import annotations

from dataclasses import dataclass

from devices.profile import DeviceKind, FlashKind
from devices.topology import LinkKind

SMALL_REQUEST_BYTES = 16 << 10
LARGE_REQUEST_BYTES = 512 << 10
_FACTORS = (
    (8.0, "a factor of 8 suggests bits"),
    (1e3, "a factor of 1000 suggests another prefix"),
    (1e6, "a factor of 1,000,000 suggests another prefix"),
    (1e9, "a factor of 1,000,000,000 suggests another prefix"),
)


@dataclass(frozen=True, slots=True)
class Bound:
    """A closed range, and what it is for."""

    least: float
    most: float
    what: str

    def problem(self, value: float) -> str | None:
        """Say what is wrong with a value, None if it is within."""
        if self.least <= value <= self.most:
            return None
        wanted = f"wanted {self.least:.3g}..{self.most:.3g} for {self.what}"
        for factor, suggestion in _FACTORS:
            scaled = value / factor if value > self.most else value * factor
            if self.least <= scaled <= self.most:
                return f"{wanted} ({suggestion})"
        return wanted


# Bytes a second of large requests.
FLASH: dict[FlashKind, Bound] = {
    "sd": Bound(12e6, 3e8, "sd"),
    "emmc": Bound(4e7, 5e8, "emmc"),
    "sata": Bound(7e7, 6.2e8, "sata"),
    "ufs": Bound(5.5e8, 6e9, "ufs"),
    "nvme": Bound(3e8, 1.6e10, "nvme"),
    "virtual": Bound(1e7, 8e9, "virtual"),
}

# Seconds of one small request with nothing else in flight: what a flash chip takes to answer.
FLASH_LATENCY: dict[FlashKind, Bound] = {
    "sd": Bound(1e-4, 5e-3, "sd"),
    "emmc": Bound(6e-5, 2e-3, "emmc"),
    "sata": Bound(4e-5, 3e-2, "sata"),
    "ufs": Bound(3e-5, 1e-3, "ufs"),
    "nvme": Bound(2e-5, 5e-4, "nvme"),
    "virtual": Bound(2e-6, 5e-2, "virtual"),
}

# The same of what was measured here: from throttled network volumes to arrays of disks.
MEASURED_FLASH: dict[FlashKind, Bound] = {
    "sd": Bound(2e6, 1e9, "sd"),
    "emmc": Bound(4e6, 2e9, "emmc"),
    "sata": Bound(4e6, 1.2e10, "sata, usb, scsi"),
    "ufs": Bound(2e7, 1e10, "ufs"),
    "nvme": Bound(5e6, 3e10, "nvme"),
    "virtual": Bound(1e6, 3e10, "virtual"),
}
MEASURED_FLASH_LATENCY: dict[FlashKind, Bound] = {
    "sd": Bound(4e-5, 5e-2, "sd"),
    "emmc": Bound(2e-5, 3e-2, "emmc"),
    "sata": Bound(5e-6, 8e-2, "sata, usb, scsi"),
    "ufs": Bound(1e-5, 2e-2, "ufs"),
    "nvme": Bound(4e-6, 5e-2, "nvme"),
    "virtual": Bound(5e-7, 3e-1, "virtual"),
}

LINK: dict[LinkKind, Bound] = {
    "loopback": Bound(1e8, 3e10, "loopback"),
    "ethernet_100m": Bound(2.5e6, 1.25e7, "ethernet_100m"),
    "ethernet_1g": Bound(2.5e7, 1.25e8, "ethernet_1g"),
    "ethernet_2g5": Bound(6e7, 3.125e8, "ethernet_2g5"),
    "ethernet_10g": Bound(2.5e8, 1.25e9, "ethernet_10g"),
    "wifi": Bound(1e6, 3e8, "wifi"),
    "usb": Bound(2e7, 1.2e9, "usb"),
    "cellular": Bound(5e4, 1.25e8, "cellular"),
    "internet": Bound(1e5, 1.25e9, "internet"),
    "thunderbolt": Bound(6e8, 5e9, "thunderbolt"),
}

ROUND_TRIP: dict[LinkKind, Bound] = {
    "loopback": Bound(3e-6, 2e-2, "loopback"),
    "ethernet_100m": Bound(5e-5, 3e-2, "ethernet_100m"),
    "ethernet_1g": Bound(3e-5, 3e-2, "ethernet_1g"),
    "ethernet_2g5": Bound(3e-5, 3e-2, "ethernet_2g5"),
    "ethernet_10g": Bound(1e-5, 1e-2, "ethernet_10g"),
    "wifi": Bound(3e-4, 3e-1, "wifi"),
    "usb": Bound(5e-5, 3e-2, "usb"),
    "cellular": Bound(4e-3, 2.0, "cellular"),
    "internet": Bound(5e-4, 2.0, "internet"),
    "thunderbolt": Bound(2e-5, 1e-2, "thunderbolt"),
}

MEMORY_SIZE = Bound(64e6, 8e12, "memory")
MEMORY_RATE = Bound(1e9, 1e13, "memory")
PROCESS_SIZE = Bound(4e6, 2e10, "the runtime's own memory")
NODE_TIME = Bound(1e-8, 1e-2, "a graph node")
HAND_OVER_TIME = Bound(1e-7, 1e-1, "handing over activations")
POWER = Bound(0.2, 3000.0, "a device's power")

# A matrix times a vector reads its weights once: never much faster than the memory, and far below
# it only where decoding a type costs more than reading it.
MATVEC_SHARE: dict[DeviceKind, Bound] = {
    "cpu": Bound(0.12, 1.3, "cpu kernels relative to the memory"),
    "gpu": Bound(0.12, 1.1, "gpu kernels relative to the memory"),
    "npu": Bound(0.12, 1.1, "npu kernels relative to the memory"),
}
SLOW_MATVEC_SHARE = Bound(0.01, 1.3, "kernels of a type that is costly to decode, to the memory")
# Every name in `quant.formats`, which devices may not import.
GGML_TYPES = frozenset(
    (
        "bf16", "f16", "f32", "f64", "i16", "i32", "i64", "i8", "iq1_m", "iq1_s", "iq2_s",
        "iq2_xs", "iq2_xxs", "iq3_s", "iq3_xxs", "iq4_nl", "iq4_xs", "mxfp4", "nvfp4", "q1_0",
        "q2_0", "q2_K", "q3_K", "q4_0", "q4_1", "q4_K", "q5_0", "q5_1", "q5_K", "q6_K", "q8_0",
        "q8_1", "q8_K", "tq1_0", "tq2_0",
    )
)  # fmt: skip
USUAL_TYPES = frozenset(("q4_0", "q4_1", "q8_0", "q4_K", "q5_K", "q6_K", "f16", "f32"))

# Operations for each weight byte of the same kernel one token at a time. Processors that were
# measured are at 7 to 50, those with matrix units at up to 100: eight times 15 or more is refused.
MATMAT_SHARE: dict[DeviceKind, Bound] = {
    "cpu": Bound(2.0, 120.0, "cpu matmat_flops relative to matvec_bytes_per_s"),
    "gpu": Bound(4.0, 3000.0, "gpu matmat_flops relative to matvec_bytes_per_s"),
    "npu": Bound(4.0, 6000.0, "npu matmat_flops relative to matvec_bytes_per_s"),
}
# Few bytes hold many weights that are costly to decode: a batch decodes them once.
SLOW_MATMAT_SHARE = Bound(2.0, 6000.0, "matmat_flops relative to matvec_bytes_per_s")
# Attention over a cache: heads that share one multiply what its bytes give, short heads cost. What
# was measured is at 0.08 to 1, and batches at 0.16 to 0.6 of the best product.
ATTENTION_DECODE_SHARE = Bound(2e-3, 64.0, "attention relative to the memory")
ATTENTION_PREFILL_SHARE = Bound(1e-3, 4.0, "attention relative to the best matmat_flops")
# Repetitions further apart than their median say nothing; handing over is always uneven.
MOST_SPREAD = 1.0
DEVICE_SHARE = Bound(0.05, 1.05, "one device relative to its memory")
FLASH_SHARE = Bound(0.0, 1.0, "flash relative to the memory it is read into")
# A larger request at the same depth may be a little slower, not several times.
LARGER_REQUEST_SHARE = Bound(0.15, float("inf"), "a larger request relative to a smaller one")
