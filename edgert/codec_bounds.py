"""How much error hidden states may have at a cut: calibrated for a model on a text, and kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgert.atomic_file import write_file
from edgert.errors import ConfigError, FormatError
from edgert.strict_json import explain, read_json
from quant.activations.basis import Basis
from quant.activations.settings import LEAST_BOUND, MOST_BOUND, CodecSettings

_MOST_BYTES = 1 << 16
_MOST_BASIS_BYTES = 1 << 23
_KEY_DIGITS = 32

Figure = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class CodecBound(BaseModel):
    """What was measured at a cut.

    Attributes:
        model: Key of the model.
        cut: Layers before the cut.
        bound: The loosest that kept the quality.
        quality: Share of it that was to be kept: perplexity without a codec over that with it.
        basis: SHA-256 of the basis that hidden states are coded in, None for none.
        text_bytes: Of the calibration text.
        reference_perplexity: Without a codec.
        perplexity: With the bound.
        bytes_per_token: Of tokens sent one by one, their messages' heads included.
        bytes_per_batched_token: Of tokens sent as the text was computed.
        f16_bytes: Of a token as plain halves.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    model: str
    cut: Annotated[int, Field(ge=1)]
    bound: Annotated[float, Field(ge=LEAST_BOUND, le=MOST_BOUND)]
    quality: Annotated[float, Field(gt=0, le=1)]
    basis: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None
    text_bytes: Annotated[int, Field(ge=1)]
    reference_perplexity: Figure
    perplexity: Figure
    bytes_per_token: Figure
    bytes_per_batched_token: Figure
    f16_bytes: Annotated[int, Field(ge=2)]

    @property
    def ratio(self) -> float:
        """Bytes of a token over those of plain halves."""
        return self.bytes_per_token / self.f16_bytes

    @property
    def rise(self) -> float:
        """Change of perplexity, as a share."""
        return self.perplexity / self.reference_perplexity - 1


def bound_path(folder: Path, model_key: str, cut: int) -> Path:
    """Return where the bound of a cut is kept; its basis is beside it."""
    return folder / f"{model_key[:_KEY_DIGITS]}-cut-{cut}.json"


def keep_bound(folder: Path, found: CodecBound, basis: Basis | None) -> Path:
    """Write a bound and its basis, replacing older ones.

    Raises:
        ConfigError: they cannot be written.
    """
    path = bound_path(folder, found.model, found.cut)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the folder {path.parent}: {error.strerror}") from error
    if basis is not None:
        write_file(path.with_suffix(".basis"), basis.to_bytes(), replace=True)
    write_file(path, found.model_dump_json(indent=1).encode(), replace=True)
    return path


def read_bound(folder: Path, model_key: str, cut: int) -> tuple[CodecBound, CodecSettings]:
    """Return what was measured at a cut, and the codec that keeps it.

    Raises:
        ConfigError: nothing was.
        FormatError: a file is damaged, or of another model or cut.
    """
    path = bound_path(folder, model_key, cut)
    hint = f"edgert eval MODEL TEXT --calibrate-codec --cut {cut}"
    try:
        found = CodecBound.model_validate(read_json(_read(path, _MOST_BYTES, hint), str(path)))
    except ValidationError as error:
        raise FormatError(explain(error.errors()), path=path, hint=hint) from error
    if (found.model, found.cut) != (model_key, cut):
        raise FormatError("the codec's bound is of another model or cut", path=path, hint=hint)
    if found.basis is None:
        return found, CodecSettings(bound=found.bound)
    basis = Basis.from_bytes(_read(path.with_suffix(".basis"), _MOST_BASIS_BYTES, hint))
    if basis.digest.hex() != found.basis:
        raise FormatError("the basis is not the one that was measured", path=path, hint=hint)
    return found, CodecSettings(bound=found.bound, basis=basis)


def _read(path: Path, most_bytes: int, hint: str) -> bytes:
    try:
        if path.stat().st_size > most_bytes:
            raise FormatError("too long for what was calibrated", path=path, hint=hint)
        return path.read_bytes()
    except OSError as error:
        raise ConfigError("no codec was calibrated for this model and cut", hint=hint) from error
