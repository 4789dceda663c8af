"""Which widths are enough for a quality: measured for one model on a text, kept, looked up."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypedDict

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgert.atomic_file import write_file
from edgert.errors import ConfigError, FormatError
from edgert.weights.packed import model_key
from quant.nested.file import read_nested
from quant.tensor_file import open_tensor_file

_MOST_BYTES = 1 << 20
_HINT = "edgert eval MODEL TEXT --calibrate-bits"

Width = Annotated[int, Field(ge=2, le=8)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Measured(_Strict):
    """One policy on the text.

    Attributes:
        widths: Bits, ascending.
        cuts: As in `WidthPolicy`.
        perplexity: Of the text.
        bits_per_weight: Mean of the weights that were used, scales included.
    """

    widths: Annotated[tuple[Width, ...], Field(min_length=1, max_length=7)]
    cuts: Annotated[tuple[Share, ...], Field(max_length=6)]
    perplexity: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    bits_per_weight: Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Qualities(_Strict):
    """Every policy measured for a model; the first is the widest width for all."""

    version: Literal[1] = 1
    model: str
    text_bytes: Annotated[int, Field(ge=1)]
    policies: Annotated[tuple[Measured, ...], Field(min_length=1, max_length=256)]

    def quality(self, policy: Measured) -> float:
        """Return the widest width's perplexity over that of a policy; 1 is no loss."""
        return self.policies[0].perplexity / policy.perplexity

    def worth_having(self) -> tuple[Measured, ...]:
        """Return the policies that are better than every one of fewer bits, fewest bits first."""
        found: list[Measured] = []
        for policy in sorted(self.policies, key=lambda p: (p.bits_per_weight, p.perplexity)):
            if not found or policy.perplexity < found[-1].perplexity:
                found.append(policy)
        return tuple(found)

    def cheapest(self, quality: float) -> Measured:
        """Return the policy of the fewest bits that reaches a quality.

        Raises:
            ConfigError: none does; the widest width has 1.
        """
        good = [p for p in self.policies if self.quality(p) >= quality]
        if not good:
            raise ConfigError(
                f"--quality {quality:g}: no widths reach it, the widest has 1",
                hint="--quality 0.99",
            )
        return min(good, key=lambda policy: policy.bits_per_weight)


def qualities_path(folder: Path, model_key: str) -> Path:
    """Return where a model's qualities are kept."""
    return folder / f"{model_key[:32]}.qualities.json"


def keep_qualities(folder: Path, qualities: Qualities) -> Path:
    """Write a model's qualities, replacing older ones.

    Raises:
        ConfigError: they cannot be written.
    """
    path = qualities_path(folder, qualities.model)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the folder {path.parent}: {error.strerror}") from error
    write_file(path, qualities.model_dump_json(indent=1).encode(), replace=True)
    return path


def read_qualities(folder: Path, model_key: str) -> Qualities:
    """Return what was measured for a model.

    Raises:
        ConfigError: nothing was.
        FormatError: the file is damaged or of another model.
    """
    path = qualities_path(folder, model_key)
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise FormatError("too long for qualities", path=path, hint=_HINT)
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError("no qualities were measured for this model", hint=_HINT) from error
    try:
        found = Qualities.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise FormatError(f"$.{where}: {first['msg']}", path=path, hint=_HINT) from error
    if found.model != model_key:
        raise FormatError("the qualities are of another model", path=path, hint=_HINT)
    return found


class AskedBits(TypedDict):
    """Options of a backend that say how many bits experts have."""

    expert_bits: tuple[int, ...]
    expert_cuts: tuple[float, ...]
    quality: float | None


def asked_bits(model: Path, bits: str | None, quality: float | None, cache: Path) -> AskedBits:
    """Turn what a person asked for into widths and cuts.

    Args:
        model: The model's file.
        bits: As `parse_expert_bits` reads it; None for the widest.
        quality: Or the fewest bits that keep this share of the quality.
        cache: The folder of things that can be made again.

    Raises:
        ConfigError: both are given, or one is wrong, or no quality was measured.
        FormatError: the kept qualities are damaged, or the model is.
    """
    if bits is not None and quality is not None:
        raise ConfigError("--expert-bits and --quality both choose widths", hint="give one of them")
    if quality is None:
        widths, cuts = parse_expert_bits(bits) if bits is not None else ((), ())
        return AskedBits(expert_bits=widths, expert_cuts=cuts, quality=None)
    file = open_tensor_file(model)
    if read_nested(file) is None:
        raise ConfigError(
            f"{model} is not nested, its experts have one precision",
            hint=f"edgert quantize {model} --nested 2..8 -o NESTED.gguf",
        )
    key = model_key(file)
    chosen = read_qualities(cache / "experts", key).cheapest(quality)
    return AskedBits(expert_bits=chosen.widths, expert_cuts=chosen.cuts, quality=quality)


def parse_expert_bits(text: str) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Read widths and cuts, such as "4", "4,8" or "3,5,8@0.25,0.6".

    Raises:
        ConfigError: it is none of these.
    """
    widths_text, _, cuts_text = text.partition("@")
    try:
        widths = tuple(int(part) for part in widths_text.split(","))
        cuts = tuple(float(part) for part in cuts_text.split(",")) if "@" in text else ()
    except ValueError as error:
        raise ConfigError(
            f"--expert-bits {text!r}: {error}",
            hint="widths from narrow to wide, then the shares of routing weight between them: "
            "--expert-bits 4,8@0.25",
        ) from error
    return widths, cuts
