"""One host's stage of a split in which every layer is shared: its tensors, tiers and forecast.

Equal hosts with equally wide shares are cut once, whatever they are called.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

from devices.profile import HostProfile
from edgert.errors import CapacityError
from partition.build_problem import Overheads, Place
from partition.forecast import StageForecast, forecast_stage
from partition.language_workload import LanguageWorkload
from partition.manifest import TensorShare, Tiers
from partition.residency import Residency
from partition.settings import Setting
from partition.stage_plan import StagePlan
from partition.stage_tiers import (
    StageWeights,
    choose_tiers,
    resident_tiers,
    stage_weights,
    staging_bytes,
)
from partition.tensor_problem import (
    Ask,
    fixed_bytes_of,
    flash_rate,
    head_part,
    host_bytes_of,
    n_threads_of,
    overheads_at,
    pool_bytes,
)
from partition.tensor_split import Part, part_widths, split_workload
from partition.units import Unit


@dataclass(frozen=True, slots=True)
class _Thin:
    """The model as one host has it; equal keys are equal parts."""

    key: Hashable
    workload: LanguageWorkload
    weights: StageWeights


class StageCuts:
    """Stages that were cut, for one model, topology and goal."""

    def __init__(self) -> None:
        """Start with none."""
        self._kinds: list[HostProfile] = []
        self._kind_of: dict[str, int] = {}
        self._thin: dict[Hashable, _Thin] = {}
        self._units: dict[tuple[Hashable, Setting], tuple[Unit, ...]] = {}
        self._overheads: dict[tuple[Hashable, Setting, int], Overheads] = {}
        self._tiers: dict[tuple[Hashable, int], tuple[Tiers, Residency]] = {}
        self._stages: dict[Hashable, StagePlan] = {}
        self._named: dict[Hashable, StageForecast] = {}

    def kind_of(self, host: HostProfile) -> int:
        """Number a host's profile; hosts that differ in nothing but their id have the same."""
        if host.host_id not in self._kind_of:
            nameless = host.model_copy(update={"host_id": ""})
            if nameless not in self._kinds:
                self._kinds.append(nameless)
            self._kind_of[host.host_id] = self._kinds.index(nameless)
        return self._kind_of[host.host_id]

    def stage(self, ask: Ask, place: Place, share: TensorShare) -> StagePlan:
        """Cut the tensors of one host and decide which of them stay in memory.

        Raises:
            CapacityError: it does not hold its tensors as they are cut.
        """
        thin = self._part(ask, place, share)
        kind = self.kind_of(place.host)
        key = (thin.key, ask.setting, kind, place.device.device_id)
        if key not in self._stages:
            self._stages[key] = self._cut(ask, place, thin)
        found = self._stages[key]
        if found.place.host.host_id == place.host.host_id:
            return replace(found, share=share)
        named = (key, place.name)
        if named not in self._named:
            self._named[named] = _at(place, found.forecast)
        return replace(found, place=place, share=share, forecast=self._named[named])

    def _part(self, ask: Ask, place: Place, share: TensorShare) -> _Thin:
        part = Part(share, entrance=place.at_home, head=head_part(ask, place.at_home))
        key = (part.entrance, part.head, part_widths(ask.workload, part))
        if key not in self._thin:
            thin = split_workload(ask.workload, part)
            weights = stage_weights(thin, 0, len(thin.run_layers), head=True)
            weights = replace(weights, apart=True)
            self._thin[key] = _Thin(key, thin, weights)
        return self._thin[key]

    def _cut(self, ask: Ask, place: Place, thin: _Thin) -> StagePlan:
        of_setting = (thin.key, ask.setting)
        if of_setting not in self._units:
            self._units[of_setting] = ask.chain(thin.workload).units
        units = self._units[of_setting]
        of_threads = (thin.key, ask.setting, n_threads_of(place))
        if of_threads not in self._overheads:
            self._overheads[of_threads] = overheads_at(ask, place, thin.workload)
        overheads = self._overheads[of_threads]
        fixed_bytes, host_bytes = fixed_bytes_of(place, overheads), host_bytes_of(place, overheads)
        kv_bytes = sum(unit.kept_bytes for unit in units)
        left_bytes = pool_bytes(place) - fixed_bytes + host_bytes - kv_bytes
        tiers = self._choose_tiers(ask, place, thin, left_bytes)
        return StagePlan(
            place=place,
            first_layer=0,
            end_layer=len(thin.workload.run_layers),
            head=head_part(ask, place.at_home) != "none",
            weights=thin.weights,
            tiers=tiers,
            kv_bytes=kv_bytes,
            fixed_bytes=fixed_bytes,
            buffer_bytes=overheads.buffer_bytes,
            forecast=forecast_stage(place, units, thin.weights, tiers),
            host_bytes=host_bytes,
        )

    def _choose_tiers(self, ask: Ask, place: Place, thin: _Thin, available_bytes: int) -> Tiers:
        weights, repacked = thin.weights, place.device.kind == "cpu"
        staging = staging_bytes(weights) if repacked else 0
        if weights.every_bytes + staging <= available_bytes:
            return resident_tiers(weights, repacked=repacked)
        key = (thin.key, available_bytes)
        if key not in self._tiers:
            self._tiers[key] = choose_tiers(weights, available_bytes)
        tiers, residency = self._tiers[key]
        if tiers.streamed and flash_rate(ask, place) is None:
            raise CapacityError(
                f"{place.name}: its share takes {weights.whole_bytes:,} bytes, "
                f"{max(0, available_bytes):,} are left for it, and it cannot stream",
                needed_bytes=weights.whole_bytes,
                available_bytes=residency.pinned_bytes,
            )
        return tiers


def _at(place: Place, forecast: StageForecast) -> StageForecast:
    """Return the forecast of an equal host under the name of this one."""
    spans = tuple(replace(span, place=place.name) for span in forecast.decode.spans)
    return replace(forecast, decode=replace(forecast.decode, spans=spans))
