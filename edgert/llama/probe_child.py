"""Child process that measures the processor: `python -m edgert.llama.probe_child JSON`.

Its last line is a `ProcessorReport` as JSON, or `error: ` and a reason.
"""

from __future__ import annotations

import sys
import time

from pydantic import Field, ValidationError

from devices.profile import Figure, FileModel, ProcessorReport, WeightLayout
from edgert.errors import EdgertError
from edgert.llama.attention_probe import AttentionShape
from edgert.llama.kernel_probe import DEFAULT_TYPES, LAYOUTS, KernelProbe, KernelRequest
from edgert.llama.lib import load_library
from edgert.weights.memory import resident_bytes

EXIT_FAILED = 5


class ChildRequest(FileModel):
    """What the parent asks for; see `KernelRequest`."""

    types: tuple[str, ...] = DEFAULT_TYPES
    n_threads: int = Field(ge=1, le=4096)
    layouts: tuple[WeightLayout, ...] = LAYOUTS
    weight_bytes: int = Field(default=KernelRequest().weight_bytes, ge=1 << 20, le=1 << 34)
    n_head: int = Field(default=32, ge=1, le=1024)
    n_head_kv: int = Field(default=8, ge=1, le=1024)
    head_length: int = Field(default=128, ge=8, le=1024)

    def request(self) -> KernelRequest:
        """Return the probe's request."""
        heads = AttentionShape(self.n_head, self.n_head_kv, self.head_length)
        return KernelRequest(
            self.types, self.n_threads, self.layouts, self.weight_bytes, attention=heads
        )


def report(asked: ChildRequest) -> ProcessorReport:
    """Load the library and measure what is asked for."""
    library = load_library()
    process_bytes = resident_bytes()
    probe = KernelProbe(library, asked.request(), time.perf_counter, time.process_time)
    kernels = tuple(probe.rates())
    node_s, graph_s = probe.node_s()
    return ProcessorReport(
        kernels=kernels,
        node_s=node_s,
        graph_s=graph_s,
        process_bytes=Figure(value=float(process_bytes), origin="measured"),
        attention=(probe.attention(),),
        skipped=tuple(probe.skipped),
    )


def main(arguments: list[str]) -> int:
    """Print the report; the exit code says whether there is one."""
    try:
        asked = ChildRequest.model_validate_json(arguments[0])
        line = report(asked).model_dump_json()
    except (EdgertError, ValidationError) as error:
        sys.stdout.write(f"error: {str(error).splitlines()[0]}\n")
        return EXIT_FAILED
    sys.stdout.write(line + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
