"""The rows of gpu.py: which there are, what is known of them, and the tables that say it. They take no GPU."""

from __future__ import annotations

import json
import statistics
import sys
from collections import Counter
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import diffusers
import torch

PEAKS = {  # dense bf16 FLOP/s by the beginning of the device's name, the first that fits
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100": 312e12,
}
PHASES = ("forward", "reward", "score network", "regulariser", "backward")  # the last with Adam and the average
COUNTED_BATCH = 4
STANDS_STILL = 1.03  # a batch twice as large that is not so many times as fast is the last one
OUT_OF_MEMORY, RESUME = "out of memory", "resume"


@dataclass(frozen=True)
class Setting:
    """What is measured. `loop`: a key of OBJECTIVES; "plain" is the hand-written loop and ours, taking turns."""

    model: str
    lora: bool = False
    checkpointing: bool = False
    compiled: bool = False
    loop: str = "DI*"

    @property
    def one_batch(self) -> bool:
        return self.compiled or self.loop != "DI*"

    @property
    def cells(self) -> list[str]:
        switches = ("yes" if on else "no" for on in (self.checkpointing, self.compiled))
        return [self.model, "LoRA" if self.lora else "full", *switches]

    def __str__(self) -> str:
        switches = ["LoRA"] * self.lora + ["checkpointing"] * self.checkpointing + ["compiled"] * self.compiled
        return " ".join([self.model, *switches, self.loop])

    @property
    def counted(self) -> Setting:
        """The setting whose memory and work are its own, too."""
        return replace(self, compiled=False, loop="KL" if self.loop == "KL" else "DI*")


PLAN = (  # one of each family first; what may take the rest of the time last
    Setting("SD1.5"),
    Setting("SDXL", lora=True, checkpointing=True),
    Setting("PixArt"),
    Setting("SD3", lora=True, checkpointing=True),
    RESUME,
    Setting("SD1.5", loop="plain"),
    Setting("SD1.5", loop="KL"),
    Setting("SD1.5", lora=True),
    Setting("SD1.5", checkpointing=True),
    Setting("SD1.5", lora=True, checkpointing=True),
    Setting("SD1.5", compiled=True),
    Setting("SD1.5", lora=True, compiled=True),
)
SETTINGS = [each for each in PLAN if isinstance(each, Setting)]
COUNTED = [
    *dict.fromkeys(each for setting in SETTINGS for each in (setting.counted, replace(setting.counted, checkpointing=False)))
]
"""Those whose memory is counted, and those whose work is."""


class Results:
    """What is known, on disk: `rows` that were measured, and what was `counted`, by the setting and batch."""

    def __init__(self, path: Path, machine: str) -> None:
        self.path = path
        content = json.loads(path.read_text()) if path.exists() else {}
        self.rows: dict[str, Any] = content.get("rows", {})
        self.counted: dict[str, Any] = content.get("counted", {})
        self.machine: str = machine or content.get("machine", "")
        if content.get("rows") and self.machine != content["machine"]:
            sys.exit(f"--results: {path} is of {content['machine']}, this is {machine}; name another file")

    def add(self, part: dict[str, Any], key: str, value: Any) -> None:
        part[key] = value
        text = json.dumps({"machine": self.machine, "rows": self.rows, "counted": self.counted}, indent=1)
        whole = self.path.with_suffix(".tmp")  # time may be up at any moment
        whole.write_text(text + "\n")
        whole.replace(self.path)

    def of(self, setting: Setting) -> list[Row]:
        """Its rows, smaller batches first."""
        rows = [Row(setting, values, self) for key, values in self.rows.items() if key.startswith(f"{setting}, ")]
        return sorted(rows, key=lambda row: (row.values["batch"], row.values["loop"]))

    def next_batch(self, setting: Setting) -> int | None:
        """The batch that is still to be measured, if there is one."""
        rows = self.of(setting)
        if setting.one_batch:
            tried = self.of(Setting(setting.model, setting.lora))
            return None if rows else max(tried, key=lambda row: row.rate).values["batch"] if tried else 1
        rates = [0.0, *(row.rate for row in rows)]
        return 2 ** len(rows) if not rows or rates[-1] > STANDS_STILL * rates[-2] else None


@dataclass(frozen=True)
class Row:
    """A line of the table. `values`: what `measured` says, or why there is nothing."""

    setting: Setting
    values: dict[str, Any]
    results: Results

    @property
    def rounds(self) -> list[float]:
        return [sum(phases.values()) for phases in self.values.get("taken", [])]

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.values["batch"] / statistics.median(self.rounds) if self.rounds else 0.0

    @property
    def flop_per_second(self) -> float:
        work = self.results.counted.get(str(replace(self.setting.counted, checkpointing=False)), {})
        return work.get("flops", 0.0) * self.rate

    def line(self, peak: float | None) -> str:
        values, cells = self.values, [*self.setting.cells, self.values["loop"], str(self.values["batch"])]
        if not self.rounds:
            return f"| {' | '.join([*cells, values['said'], *[''] * (len(FIGURES) - 2)])} |"
        work, round_ = self.flop_per_second, statistics.median(self.rounds)
        check = self.results.counted.get(str(self.setting.counted), {}).get("memory", 0)
        figures = [
            (self.rate, f"{self.rate:.3g}"),
            (work, f"{work / 1e12:.3g}"),
            (work and peak, f"{work / (peak or 1):.1%}"),
            (values["memory"], f"{values['memory'] / 1e9:.1f}"),
            (check and values["batch"] == COUNTED_BATCH, f"{check / 1e9:.1f}"),
            (values.get("busy"), f"{1 - values.get('busy', 0) / round_:.0%}"),
            ("waits" in values, str(sum(values.get("waits", {}).values()))),
        ]
        shares = (sum(phases[phase] for phases in values["taken"]) / sum(self.rounds) for phase in PHASES)
        cells += [*(text if there else "-" for there, text in figures), *(f"{share:.1%}" for share in shares)]
        return f"| {' | '.join(cells)} |"


TEXTS = ("model", "trained", "checkpointing", "compile", "loop")
FIGURES = ("batch", "images/s", "TFLOP/s", "MFU", "peak GB", "check GB", "idle", "waits", *PHASES)
HEADING = f"| {' | '.join([*TEXTS, *FIGURES])} |\n|{'---|' * len(TEXTS)}{'--:|' * len(FIGURES)}"


def verdicts(results: Results, peak: float | None, on_gpu: bool) -> tuple[str, bool]:
    """The aims as a table; whether every floor is kept that can be judged here."""
    product = [row for setting in SETTINGS if setting.loop == "DI*" for row in results.of(setting)]
    sd15 = [row for row in product if row.setting.model == "SD1.5"]
    sdxl = [row for row in product if row.setting.model == "SDXL" and row.values.get("memory", 0) <= 80e9]
    lines, good = ["| what | seen | floor | aim |", "|---|--:|--:|--:|"], True
    for name, of, floor, aim in (("SD1.5 at 512 px", sd15, 0.20, 0.40), ("SDXL LoRA at 1024 px, in 80 GB", sdxl, None, 0.25)):
        mfu = max((row.flop_per_second for row in of), default=0.0) / (peak or 1)
        seen, verdict = "not judged here", ["", ""]
        if peak and mfu:
            good &= floor is None or mfu >= floor
            seen, verdict = f"{mfu:.1%}", [" ok" if mfu >= (bound or 0) else " missed" for bound in (floor, aim)]
        bounds = [f"{bound:.0%}{said}" if bound else "" for bound, said in zip((floor, aim), verdict, strict=True)]
        lines.append(f"| {name}: MFU | {seen} | {' | '.join(bounds)} |")
    rate = max((row.rate for row in sdxl), default=0.0)
    if judged := on_gpu and bool(sdxl):
        good &= rate >= 0.23
    seen = f"{rate:.3g} | 0.23 {'ok' if rate >= 0.23 else 'missed'}" if judged else "not judged here | 0.23"
    return "\n".join([*lines, f"| SDXL LoRA at 1024 px, in 80 GB: images/s | {seen} | |"]), good


def report(results: Results, on_gpu: bool) -> bool:
    """Print all tables; returns whether all is well."""
    peak = next((peak for start, peak in PEAKS.items() if results.machine.startswith(start)), None)
    stated = f"{peak / 1e12:.0f} TFLOP/s dense bf16" if peak else "no peak known, no MFU"
    print(f"### {results.machine} ({stated}), torch {torch.__version__}, diffusers {diffusers.__version__}, {date.today()}\n")
    print(HEADING)
    placed, places = dict[str, dict[str, int]](), Counter[str]()
    for setting in SETTINGS:
        rows = results.of(setting)
        for row in rows:
            placed.setdefault(setting.model, row.values.get("devices", {}))
            places |= Counter(row.values.get("waits", {}))
            print(row.line(peak))
        if (batch := results.next_batch(setting)) is not None:
            print(Row(setting, {"loop": setting.loop, "batch": batch, "said": "not reached"}, results).line(peak))
        turns = {row.values["loop"]: row.rounds for row in rows if setting.loop == "plain"}
        if all(turns.values()) and turns:
            pairs = [a / b for a, b in zip(turns["ours"], turns["plain"], strict=True)]
            print(f"ours / plain, {len(pairs)} pairs: {statistics.median(pairs):.3f} [{min(pairs):.3f}, {max(pairs):.3f}]")
    for model, devices in placed.items():
        print(f"\ntensors of {model}: {', '.join(f'{count} on {device}' for device, count in sorted(devices.items()))}", end="")
    if places:
        print(f"\nwaits: {', '.join(f'{count} in {place}' for place, count in places.most_common())}", end="")
    same = results.rows.get(RESUME, {"tensors": 0, "equal": 0, "metrics": True})
    print(f"\nresumed: {same['equal']} of {same['tensors']} tensors equal; metrics equal: {same['metrics']}\n")
    said, good = verdicts(results, peak, on_gpu)
    print(said, flush=True)
    return good and same["equal"] == same["tensors"] and same["metrics"]
