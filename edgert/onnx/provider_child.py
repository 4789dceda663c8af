"""Child process that lists execution providers: `python -m edgert.onnx.provider_child`.

Its last line is a `Runtime` as JSON, or `error: ` and a reason.
"""

from __future__ import annotations

import sys
from types import ModuleType

from devices.profile import Runtime

EXIT_FAILED = 5


def runtime(onnxruntime: ModuleType) -> Runtime:
    """List the providers of the build, and the devices that plugged-in ones found."""
    names = list(onnxruntime.get_available_providers())
    found = [
        f"{device.ep_name} on {str(device.device.type).rpartition('.')[2].lower()}"
        for device in onnxruntime.get_ep_devices()
    ]
    return Runtime(
        name="ONNX Runtime",
        version=str(onnxruntime.__version__),
        backends=tuple(dict.fromkeys([*names, *found])),
    )


def main() -> int:
    """Print the runtime; the exit code says whether there is one."""
    try:
        import onnxruntime
    except (ImportError, OSError) as error:
        sys.stdout.write(f"error: onnxruntime cannot be loaded: {str(error).splitlines()[0]}\n")
        return EXIT_FAILED
    sys.stdout.write(runtime(onnxruntime).model_dump_json() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
