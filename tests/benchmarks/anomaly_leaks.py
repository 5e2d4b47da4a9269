"""The leak detector on simulated memory: false alarms, and how soon a leak of 1 GiB/h is found.

Flat pools are what a serving engine holds (70 GiB, noise of 20 MiB, a step of a quarter to half a GiB
about once a day), noisy pods load and drop models of many GiB all day. A verdict that begins without a
leak is a false alarm. The peer, in the same run, is one window of an hour: the slope of its 5-minute
floors above the same bound with nine of ten pairs rising.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
from numpy.typing import NDArray

from anomaly_sidecar.detectors.leak import Leaks, slope
from anomaly_sidecar.interface import FloatArray
from tests.anomaly_sidecar.scripted import DAY, GIB, HOUR, START, flat_pools, leaking, swapping_pods
from tests.support import bench

STEP = 60.0
MINIMUM = 0.2 * GIB
TARGETS = {
    "flat_false_alarms_per_day": "<= 0.03",
    "flat_found_minutes_p95": "<= 40",
    "noisy_false_alarms_per_day": "<= 0.05",
    "noisy_found_minutes_p95": "<= 360",
    "share_found": ">= 0.99",
}


def alarms(used: FloatArray) -> NDArray[np.bool_]:
    """(rows, samples) where a verdict begins."""
    leaks = Leaks.empty(len(used), MINIMUM)
    begins = np.zeros(used.shape, np.bool_)
    before = np.zeros(len(used), np.bool_)
    for sample in range(used.shape[1]):
        leaks.observe(START + sample * STEP, used[:, sample])
        begins[:, sample] = leaks.leaking & ~before
        before = leaks.leaking
    return begins


def peer_alarms(used: FloatArray) -> NDArray[np.bool_]:
    """The same of the single window."""
    per_bin, window = 5, 12
    bins = used.shape[1] // per_bin
    floors = used[:, : bins * per_bin].reshape(len(used), bins, per_bin).min(axis=2)
    later, earlier = np.triu_indices(window, 1)[::-1]
    begins = np.zeros(used.shape, np.bool_)
    before = np.zeros(len(used), np.bool_)
    for end in range(window, bins + 1):
        part = floors[:, end - window : end]
        rising = (part[:, later] > part[:, earlier]).mean(axis=1)
        now = (slope(part) * 12 > MINIMUM) & (rising > 0.9)
        begins[:, min(end * per_bin, used.shape[1] - 1)] = now & ~before
        before = now
    return begins


def delays(begins: NDArray[np.bool_], begin: int) -> FloatArray:
    """(rows,) minutes from the leak's begin to the first verdict after it; infinite without one."""
    after = begins[:, begin:]
    return np.where(after.any(axis=1), after.argmax(axis=1) * STEP / 60, np.inf)


def main() -> int:
    """Measure, report on standard error, print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one day instead of four")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    figures: dict[str, float] = {}
    found = []
    spent, samples = 0.0, 0
    for name, make in (("flat", flat_pools), ("noisy", swapping_pods)):
        rng = np.random.default_rng(arguments.seed)
        days = 1 if arguments.quick else 4
        healthy = make(rng, 400, days * DAY, STEP)
        start = time.process_time()
        begins = alarms(healthy)
        spent += time.process_time() - start
        samples += healthy.size
        figures[f"{name}_false_alarms_per_day"] = round(float(begins.sum()) / 400 / days, 4)
        figures[f"peer_{name}_false_alarms_per_day"] = round(
            float(peer_alarms(healthy).sum()) / 400 / days, 4
        )
        begin = int(10 * HOUR / STEP) + int(rng.integers(0, 60))
        ill = leaking(make(rng, 400, 20 * HOUR, STEP), STEP, begin, GIB)
        for who, judge in (("", alarms), ("peer_", peer_alarms)):
            minutes = delays(judge(ill), begin)
            figures[f"{who}{name}_found_minutes_p50"] = float(np.median(minutes))
            p95 = float(np.quantile(minutes, 0.95, method="higher"))
            figures[f"{who}{name}_found_minutes_p95"] = min(p95, 1e6)
            if not who:
                found.append(float(np.isfinite(minutes).mean()))
                within = 40 if name == "flat" else 360
                figures[f"{name}_share_found_in_time"] = round(float((minutes <= within).mean()), 4)
        print(f"{name}: done", file=sys.stderr)
    figures["share_found"] = round(min(found), 4)
    figures["us_per_sample"] = round(1e6 * spent / samples, 3)
    return bench.finish("anomaly_leaks", figures, TARGETS)


if __name__ == "__main__":
    raise SystemExit(main())
