"""Where models and work are, and how a case plans."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from edgert.model_files import FileHashes
from hosts_bench.plans import Wanted, known_profile, split_manifest
from partition.manifest import Manifest

MB = 1_000_000
ROOMY = 1_000 * MB  # of a host, beside the model


@dataclass
class Bench:
    """Where things are.

    Attributes:
        folder: Where 1b.gguf, 3b.gguf and 7b.gguf are.
        work: For homes, parts and logs.
        models: That cases with models of real shapes use; None is what each is for.
        turns: Of each side.
        flash_bps: To which capped hosts are held.
    """

    folder: Path
    work: Path
    models: tuple[str, ...] | None = None
    turns: int = 5
    flash_bps: int = 800 * MB
    hashes: FileHashes = field(default_factory=FileHashes)

    @property
    def profile_home(self) -> Path:
        """EDGERT_HOME with measured figures of this machine."""
        return self.work / "profile"

    def chosen(self, *usual: str) -> list[str]:
        """Return the names of the models of a case."""
        return list(self.models or usual)

    def model(self, name: str) -> Path:
        """Return a model of a real shape; the thin one is made where it is missing."""
        path = self.folder / f"{name}.gguf"
        if path.is_file():
            return path
        if name != "thin":
            raise SystemExit(f"no {name}.gguf in {self.folder}: make_model.py makes it")
        from make_model import Request, make_model

        path = self.work / "thin.gguf"
        if not path.is_file():
            make_model(Request("thin", path))
        return path

    def manifest(self, wanted: Wanted) -> Manifest:
        """Plan a split with the figures that are known of this machine."""
        profile = known_profile(wanted.model, self.profile_home)
        return split_manifest(wanted, profile, self.hashes)
