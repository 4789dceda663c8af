"""Which policy suits a model, kept between runs: a small file for each model that was replayed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgert.atomic_file import write_error, write_file
from edgert.errors import ConfigError, FormatError
from edgert.experts.scores import POLICIES, Policy
from edgert.strict_json import explain, read_json
from edgert.weights.packed import model_key
from quant.tensor_file import TensorFile

_MOST_BYTES = 1 << 16
_KEY_DIGITS = 32


class KeptPolicy(BaseModel):
    """What the file holds.

    Attributes:
        model: Key of the model that was replayed.
        policy: The winner.
        n_tokens: Tokens that were replayed.
        n_experts: Experts that the cache held, for each replay.
        misses_per_token: By policy, for each replay.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    model: str
    policy: Policy
    n_tokens: int = Field(ge=1)
    n_experts: tuple[int, ...] = Field(min_length=1)
    misses_per_token: dict[Policy, tuple[float, ...]]

    def reason(self) -> str:
        """Say why it was chosen."""
        worse = [policy for policy in POLICIES if policy != self.policy]
        return (
            f"it missed least of {len(worse) + 1} policies in a replay of {self.n_tokens:,} tokens"
        )


@dataclass(frozen=True, slots=True)
class PolicyStore:
    """Reads and writes what is kept.

    Attributes:
        folder: Where the files lie.
    """

    folder: Path

    def path(self, file: TensorFile) -> Path:
        """Return the place of a model's file."""
        return self.folder / f"{model_key(file)[:_KEY_DIGITS]}.json"

    def load(self, file: TensorFile) -> KeptPolicy | None:
        """Return what is kept for a model, None where nothing is.

        Raises:
            FormatError: the file is damaged, or of another model.
        """
        path = self.path(file)
        try:
            with path.open("rb") as stream:
                content = stream.read(_MOST_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise FormatError(f"cannot be read: {error.strerror}", path=path) from error
        if len(content) > _MOST_BYTES:
            raise FormatError(f"longer than {_MOST_BYTES:,} bytes", path=path)
        try:
            kept = KeptPolicy.model_validate(read_json(content, str(path)))
        except ValidationError as error:
            raise FormatError(explain(error.errors()), path=path) from error
        if kept.model != model_key(file):
            raise FormatError("$.model: is of another model", path=path)
        return kept

    def save(self, file: TensorFile, kept: KeptPolicy) -> Path:
        """Keep a policy for a model; return where.

        Raises:
            ConfigError: it is of another model, or the folder cannot be written to.
            CapacityError: the disk is full.
        """
        if kept.model != model_key(file):
            raise ConfigError("this policy is of another model")
        path = self.path(file)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(self.folder, error) from error
        write_file(path, kept.model_dump_json(indent=1).encode() + b"\n", replace=True)
        return path
