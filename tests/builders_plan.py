"""What plans are made from: shapes of models, and known devices with less memory."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from devices.catalog import known_host
from devices.profile import HostProfile
from devices.topology import Topology
from make_model import Request, make_model
from partition.language_workload import LanguageWorkload, describe_language
from partition.manifest import ModelFile, ModelIdentity
from quant.model_spec import read_model_spec
from quant.tensor_file import open_tensor_file

PI = "raspberry-pi-5-8gb"
BOARD = "orange-pi-5-plus-16gb"
MB = 10**6


@cache
def workload(shape: str, weight_type: str = "Q4_0") -> LanguageWorkload:
    """Read the header of a shape; the file is a hole and gone afterwards."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "model.gguf"
        path = make_model(Request(shape, out, weight_type, header_only=True))[0]
        file = open_tensor_file(path)
        return describe_language(file, read_model_spec(file))


def identity(model: LanguageWorkload) -> ModelIdentity:
    file = ModelFile(path="model.gguf", size_bytes=model.weight_bytes, sha256="0" * 64)
    return ModelIdentity(
        format="gguf", name="model", architecture=model.spec.architecture,
        n_layer=len(model.run_layers), weight_bytes=model.weight_bytes, files=(file,),
    )  # fmt: skip


def limited(name: str, limit_bytes: int, host_id: str | None = None) -> HostProfile:
    host = known_host(name, host_id)
    pools = tuple(
        pool.model_copy(update={"available_bytes": min(limit_bytes, pool.total_bytes)})
        for pool in host.pools
    )
    return host.model_copy(update={"pools": pools})


def alone(host: HostProfile) -> Topology:
    return Topology(home=host.host_id, hosts=(host,))
