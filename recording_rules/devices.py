"""Device records: the first layer, from the pack's agent or from dcgm-exporter, whichever knows a GPU.

In: families of the GPU exporter, fields of dcgm-exporter (units converted, both spellings of its labels).
Out: one series per GPU and signal with the labels of `DEVICE`, and what nodes, cards and the fleet add up to.
`job` and `instance` are aggregated away before anything else, so one endpoint or two give the same values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gpuglass.families import gpu
from gpuglass.family import Family
from gpuglass.promql import (
    aggregate,
    divide,
    duration,
    first_of,
    labelled,
    over_time,
    quote,
    rate,
    select,
    times,
)
from recording_rules import foreign
from recording_rules import records as r
from recording_rules.foreign import Foreign
from recording_rules.model import Group, Record, Rule
from recording_rules.options import Options
from recording_rules.settings import Settings

GPU = ("cluster", "gpu_uuid")
"""What a GPU is joined by: its UUID is unique, `cluster` is only carried along."""
_MIB = 1 << 20


def first_label(expression: str, label: str, sources: Sequence[str], port: bool = False) -> str:
    """Set `label` to the first of the source labels that is not empty; `port` cuts a port off."""
    names = ", ".join(quote(source) for source in sources)
    joined = f'label_join({expression}, "{label}", ";", {names})'
    pattern = ";*([^;]+?)(?::[0-9]+)?(?:;.*)?" if port else ";*([^;]*)(?:;.*)?"
    return f'label_replace({joined}, "{label}", "$1", "{label}", {quote(pattern)})'


def renamed(expression: str, **labels: str) -> str:
    """Copy labels under other names: `renamed(x, gpu_uuid="UUID")`."""
    for new, old in labels.items():
        expression = f'label_join({expression}, "{new}", "", "{old}")'
    return expression


def on_gpu(expression: str, labels: Iterable[str] = ("node", "device", "model")) -> str:
    """Join the identity of the GPU to an expression that has its labels `GPU`."""
    return times(expression, select(r.DEVICE_INFO), GPU, f"group_left ({', '.join(labels)})")


def newest(ours: str, theirs: str, options: Options) -> str:
    """Identity of each GPU, by the newest scrape that lists it: after a move or a restart of an agent both
    the old and the new target are there for a while, and a join bears only one."""

    def one(expression: str) -> str:
        return aggregate("group", r.DEVICE, f"topk by (cluster, gpu_uuid) (1, {expression})")

    return first_of(*options.chosen([one(ours)], [one(theirs)]), on=GPU)


def _dcgm(metric: Foreign, window: float | None = None, factor: str = "", extra: Sequence[str] = ()) -> str:
    """A field of dcgm-exporter by `GPU`: its mean over a window, or its value now."""
    value = over_time("avg", metric, window) if window else select(metric)
    # A GPU that several pods share, or its MIG instances, have a row each.
    return aggregate("max", (*GPU, *extra), renamed(value, gpu_uuid="UUID")) + factor


class _Devices:
    """Makes the rules of one signal after the other."""

    def __init__(self, settings: Settings, options: Options) -> None:
        self.options = options
        self.average = float(settings.windows.average)
        self.rate = float(settings.windows.rate)
        self.rules: list[Rule] = []

    def add(
        self, record: Record, ours: Sequence[str] = (), theirs: Sequence[str] = (), extra: Sequence[str] = ()
    ) -> None:
        """A record from the first source that has the GPU; expressions have the labels `GPU` and `extra`."""
        chosen = self.options.chosen(ours, theirs)
        if chosen:
            self.rules.append(Rule(record, on_gpu(first_of(*chosen, on=(*GPU, *extra)))))

    def mean(self, family: Family, mig: Family | None = None, **matchers: str) -> list[str]:
        """Mean of a gauge over the window. In MIG mode only instances have it: the mean of the instances."""
        found = [aggregate("max", GPU, over_time("avg", family, self.average, **matchers))]
        if mig is not None:
            found.append(aggregate("avg", GPU, over_time("avg", mig, self.average, **matchers)))
        return found

    def now(self, family: Family, *extra: str) -> list[str]:
        """Value of a gauge now."""
        return [aggregate("max", (*GPU, *extra), select(family))]

    def growth(self, family: Family, *extra: str) -> list[str]:
        """Growth of a counter per second; a restarted agent may go on under another instance."""
        return [aggregate("sum", (*GPU, *extra), rate(family, self.rate))]


def groups(settings: Settings, options: Options) -> list[Group]:
    """The groups of devices, nodes, cards and the fleet's GPUs."""
    interval = float(settings.windows.interval)
    return [
        Group("gpuglass-devices.rules", interval, tuple(_devices(settings, options))),
        Group("gpuglass-fleet.rules", interval, tuple(_sums())),
    ]


def _devices(settings: Settings, options: Options) -> list[Rule]:
    d = _Devices(settings, options)
    average = d.average
    dcgm_identity = renamed(
        f"timestamp({select(foreign.DCGM_MEMORY_USED)})", gpu_uuid="UUID", model="modelName"
    )
    identity = newest(
        first_label(f"timestamp({select(gpu.INFO)})", "node", ("node", "instance"), port=True),
        first_label(dcgm_identity, "node", ("Hostname", "hostname", "node", "instance"), port=True),
        options,
    )
    d.rules.append(Rule(r.DEVICE_INFO, identity))
    d.add(r.DEVICE_UP, [aggregate("min", GPU, select(gpu.UP))])
    # Activity
    d.add(r.DEVICE_BUSY, d.mean(gpu.BUSY, gpu.MIG_BUSY), [_dcgm(foreign.DCGM_BUSY, average, " / 100")])
    d.add(
        r.DEVICE_GRAPHICS_ACTIVE, d.mean(gpu.GRAPHICS_ACTIVE), [_dcgm(foreign.DCGM_GRAPHICS_ACTIVE, average)]
    )
    d.add(
        r.DEVICE_SM_ACTIVE, d.mean(gpu.SM_ACTIVE, gpu.MIG_SM_ACTIVE), [_dcgm(foreign.DCGM_SM_ACTIVE, average)]
    )
    d.add(
        r.DEVICE_SM_OCCUPANCY,
        d.mean(gpu.SM_OCCUPANCY, gpu.MIG_SM_OCCUPANCY),
        [_dcgm(foreign.DCGM_SM_OCCUPANCY, average)],
    )
    d.add(
        r.DEVICE_TENSOR_ACTIVE,
        d.mean(gpu.PIPE_ACTIVE, gpu.MIG_PIPE_ACTIVE, pipe="tensor"),
        [_dcgm(foreign.DCGM_TENSOR_ACTIVE, average)],
    )
    d.add(
        r.DEVICE_DRAM_ACTIVE,
        d.mean(gpu.DRAM_ACTIVE, gpu.MIG_DRAM_ACTIVE),
        [_dcgm(foreign.DCGM_DRAM_ACTIVE, average)],
    )
    # Profiling counters can stay at 0 on a busy card: then the next signal is the better witness.
    active = first_of(
        f"{select(r.DEVICE_SM_ACTIVE)} > 0", f"{select(r.DEVICE_GRAPHICS_ACTIVE)} > 0", select(r.DEVICE_BUSY)
    )
    d.rules.append(
        Rule(r.DEVICE_ACTIVE, first_of(active, select(r.DEVICE_SM_ACTIVE), select(r.DEVICE_GRAPHICS_ACTIVE)))
    )
    # Memory, power, heat
    used, free = _dcgm(foreign.DCGM_MEMORY_USED), _dcgm(foreign.DCGM_MEMORY_FREE)
    total = first_of(f"{used} + {free} + {_dcgm(foreign.DCGM_MEMORY_RESERVED)}", f"{used} + {free}")
    d.add(r.DEVICE_MEMORY_USED_BYTES, d.now(gpu.MEMORY_USED), [f"{used} * {_MIB}"])
    d.add(r.DEVICE_MEMORY_TOTAL_BYTES, d.now(gpu.MEMORY_TOTAL), [f"({total}) * {_MIB}"])
    d.rules.append(
        Rule(
            r.DEVICE_MEMORY_USED,
            divide(select(r.DEVICE_MEMORY_USED_BYTES), select(r.DEVICE_MEMORY_TOTAL_BYTES)),
        )
    )
    d.add(r.DEVICE_POWER, d.mean(gpu.POWER), [_dcgm(foreign.DCGM_POWER, average)])
    d.add(r.DEVICE_POWER_LIMIT, d.now(gpu.POWER_LIMIT))
    d.add(
        r.DEVICE_TEMPERATURE,
        d.now(gpu.TEMPERATURE, "sensor"),
        [
            labelled(_dcgm(foreign.DCGM_TEMPERATURE), "sensor", "gpu"),
            labelled(f"{_dcgm(foreign.DCGM_MEMORY_TEMPERATURE)} > 0", "sensor", "memory"),
        ],
        ("sensor",),
    )
    d.add(r.DEVICE_THROTTLED, d.growth(gpu.THROTTLE, "reason"))
    # Links
    d.add(r.DEVICE_PCIE_RECEIVE, d.growth(gpu.PCIE_RX), [_dcgm(foreign.DCGM_PCIE_RECEIVE, average)])
    d.add(r.DEVICE_PCIE_TRANSMIT, d.growth(gpu.PCIE_TX), [_dcgm(foreign.DCGM_PCIE_TRANSMIT, average)])
    d.add(r.DEVICE_NVLINK_RECEIVE, d.growth(gpu.NVLINK_RX))
    d.add(r.DEVICE_NVLINK_TRANSMIT, d.growth(gpu.NVLINK_TX))
    replays = rate(foreign.DCGM_PCIE_REPLAYS, d.rate)
    d.add(
        r.DEVICE_PCIE_REPLAYS,
        d.growth(gpu.PCIE_REPLAYS),
        [aggregate("max", GPU, renamed(replays, gpu_uuid="UUID"))],
    )
    links = aggregate("max", (*GPU, "link"), select(gpu.NVLINK_UP))
    d.add(r.DEVICE_NVLINKS_UP, [aggregate("sum", GPU, links)])
    d.add(r.DEVICE_NVLINK_ERRORS, d.growth(gpu.NVLINK_ERRORS, "type"))
    _errors(d)
    return d.rules


def _errors(d: _Devices) -> None:
    window = d.rate
    xid = ("xid", "class")
    # A code's counter begins with its first error, which `increase` cannot see. What is there now and was not
    # a window ago is new, if the GPU was watched then.
    before = f"{select(gpu.XID_ERRORS)} offset {duration(window)}"
    watched = f"{select(r.DEVICE_INFO)} offset {duration(window)}"
    grown = aggregate("sum", (*GPU, *xid), f"increase({select(gpu.XID_ERRORS, window)})") + " > 0"
    fresh = aggregate("sum", (*GPU, *xid), f"{select(gpu.XID_ERRORS)} unless {before}")
    appeared = f"{fresh} and on (cluster, gpu_uuid) {watched}"
    # dcgm-exporter keeps the last code for ever: only a change tells of an error.
    codes = renamed(select(foreign.DCGM_XID), gpu_uuid="UUID") + " > 0"
    changed = aggregate("max", GPU, renamed(f"changes({select(foreign.DCGM_XID, window)})", gpu_uuid="UUID"))
    by_code = f'count_values by (cluster, gpu_uuid) ("xid", {codes})'
    # With the agent there, its series say whose error it was; two codes for one error would alert twice.
    by_code += f" unless on (cluster, gpu_uuid) {select(gpu.INFO)}"
    counted = f"({by_code}) * 0\n+ on (cluster, gpu_uuid) group_left ()\n({changed} > 0)"
    d.add(r.DEVICE_XID, [grown, appeared], [labelled(counted, "class", "unknown")], xid)
    d.add(
        r.DEVICE_ECC,
        [aggregate("sum", (*GPU, "type"), f"increase({select(gpu.ECC_ERRORS, window)})")],
        (),
        ("type",),
    )
    d.add(
        r.DEVICE_REMAPPED_ROWS,
        d.now(gpu.REMAPPED_ROWS, "cause"),
        [
            labelled(_dcgm(foreign.DCGM_REMAPPED_CORRECTED), "cause", "corrected"),
            labelled(_dcgm(foreign.DCGM_REMAPPED_UNCORRECTED), "cause", "uncorrected"),
        ],
        ("cause",),
    )
    d.add(r.DEVICE_REMAP_PENDING, d.now(gpu.ROW_REMAP_PENDING))
    d.add(r.DEVICE_REMAP_FAILED, d.now(gpu.ROW_REMAP_FAILED), [_dcgm(foreign.DCGM_REMAP_FAILED)])


def _sums() -> Iterable[Rule]:
    for labels, gpus, active, memory, power in (
        (r.NODE, r.NODE_GPUS, r.NODE_ACTIVE, r.NODE_MEMORY_USED, r.NODE_POWER),
        (r.CARD, r.CARD_GPUS, r.CARD_ACTIVE, None, None),
        (r.FLEET, r.FLEET_GPUS, r.FLEET_ACTIVE, r.FLEET_MEMORY_USED, r.FLEET_POWER),
    ):
        yield Rule(gpus, aggregate("count", labels, select(r.DEVICE_INFO)))
        yield Rule(active, aggregate("avg", labels, select(r.DEVICE_ACTIVE)))
        if memory is not None and power is not None:
            used = aggregate("sum", labels, select(r.DEVICE_MEMORY_USED_BYTES))
            total = aggregate("sum", labels, select(r.DEVICE_MEMORY_TOTAL_BYTES))
            yield Rule(memory, divide(used, total))
            yield Rule(power, aggregate("sum", labels, select(r.DEVICE_POWER)))
