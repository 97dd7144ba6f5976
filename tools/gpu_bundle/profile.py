#!/usr/bin/env python3
"""Makes a table of a decode step from what ncu measured of its kernels (`tools/gpu_bundle/profile.sh` runs both).

    tools/gpu_bundle/profile.py NCU.csv [--bench BENCH.json --batch N] [--copy GB/S] [--step-us US]

NCU.csv is the output of `ncu --csv` with the kernels of several steps, in order; a step starts with `embedding`. The share
is of the copy bandwidth. Kernels under ncu run alone, one after the other, without overlap: their sum may be more than the
step's own time. `--self-test` checks this script.
"""

import argparse
import collections
import csv
import json
import sys

TIME = "gpu__time_duration.sum"
READ, WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
L2 = "lts__throughput.avg.pct_of_peak_sustained_elapsed"
TENSOR = "sm__inst_executed_pipe_tensor_op_hmma.sum"
LOCAL = ("l1tex__t_bytes_pipe_lsu_mem_local_op_ld.sum", "l1tex__t_bytes_pipe_lsu_mem_local_op_st.sum")
LOCAL_INSTRUCTIONS = ("smsp__inst_executed_op_local_ld.sum", "smsp__inst_executed_op_local_st.sum")
WARPS = "sm__warps_active.avg.pct_of_peak_sustained_active"
REGISTERS = "launch__registers_per_thread"
SHARED = ("launch__shared_mem_per_block_static", "launch__shared_mem_per_block_dynamic")

# To nanoseconds and bytes.
UNITS = {"ns": 1, "us": 1e3, "usecond": 1e3, "ms": 1e6, "msecond": 1e6, "second": 1e9, "s": 1e9, "nsecond": 1}
UNITS |= {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
UNITS |= {f"{unit}/block": factor for unit, factor in UNITS.items() if "byte" in unit}


class Launch:
    def __init__(self, name, block, grid):
        self.name, self.block, self.grid, self.metrics = name, block, grid, {}


def launches(lines):
    """The launches in the order they ran. Lines that are not CSV are what ncu and the program said between."""
    rows = csv.reader(line for line in lines if line.startswith('"'))
    try:
        columns = {name: index for index, name in enumerate(next(rows))}
        at = [columns[name] for name in
              ("ID", "Kernel Name", "Block Size", "Grid Size", "Metric Name", "Metric Unit", "Metric Value")]
    except (StopIteration, KeyError) as missing:
        sys.exit(f"this is not what `ncu --csv` writes: {missing!r}")
    found = collections.OrderedDict()
    for row in rows:
        number, name, block, grid, metric, unit, value = (row[index] for index in at)
        launch = found.setdefault(number, Launch(name, block, grid))
        try:
            launch.metrics[metric] = float(value.replace(",", "")) * UNITS.get(unit, 1)
        except ValueError:
            pass  # "n/a": this GPU does not count it
    return list(found.values())


def whole_steps(all_launches, first):
    """The launches of the steps that are like most, how many steps that is, and of how many whole ones: parts of prompts
    among them, and steps of another bucket, have other kernels."""
    starts = [index for index, launch in enumerate(all_launches) if launch.name == first]
    if len(starts) < 2:
        sys.exit(f"there is no whole step between two `{first}` in {len(all_launches)} launches: profile more")
    whole = [all_launches[start:end] for start, end in zip(starts, starts[1:])]
    kinds = collections.defaultdict(list)
    for step in whole:
        kinds[tuple((launch.name, launch.grid) for launch in step)].append(step)
    alike = max(kinds.values(), key=lambda steps: (len(steps), -len(steps[0])))
    return [launch for step in alike for launch in step], len(alike), len(whole)


def groups(of_steps, steps):
    """Launches by kernel and grid; one that stands in several places of a layer, by the kernel before it too."""
    alike = collections.OrderedDict()
    before = of_steps[-1].name
    for launch in of_steps:
        places = alike.setdefault((launch.name, launch.block, launch.grid), collections.OrderedDict())
        places.setdefault(before, []).append(launch)
        before = launch.name
    found = []
    for (name, _, _), places in alike.items():
        # The first layer has another kernel before it than the others have.
        usual = {before: list(members) for before, members in places.items() if len(members) > steps}
        if not usual:
            usual = {"": []}
        largest = max(usual, key=lambda before: len(usual[before]))
        for before, members in places.items():
            if before not in usual:
                usual[largest] += members
        for before, members in usual.items():
            found.append((f"{name}, after {before}" if len(usual) > 1 else name, members))
    return found


def total(launch, metrics):
    """The sum of what was measured of these; None where nothing was."""
    values = [launch.metrics[metric] for metric in metrics if metric in launch.metrics]
    return sum(values) if values else None


def mean(members, metrics):
    values = [value for value in (total(member, metrics) for member in members) if value is not None]
    return sum(values) / len(values) if values else None


def number(value, digits=0):
    return "" if value is None else f"{value:,.{digits}f}"


def table(all_launches, copy=None, step_us=None, first="embedding"):
    of_steps, steps, whole = whole_steps(all_launches, first)
    lines = [
        "| kernel | a step | us each | us a step | MB each | share of copy | L2 (%) | registers | shared B | warps (%) "
        "| tensor | local B | us over copy speed |",
        "| --- |" + " ---: |" * 12,
    ]
    sum_us = sum_bytes = sum_over = sum_local = sum_tensor = 0
    measured = {metric for launch in of_steps for metric in launch.metrics}
    for name, members in sorted(groups(of_steps, steps), key=lambda group: -sum(m.metrics[TIME] for m in group[1])):
        us = mean(members, [TIME]) / 1e3
        a_step = len(members) / steps
        moved = mean(members, [READ, WRITTEN])
        share = over = None
        if moved is not None and copy:
            # GB/s is 1e3 bytes per microsecond.
            share, over = moved / us / (copy * 1e3), (us - moved / (copy * 1e3)) * a_step
            sum_over += over
        sum_us += us * a_step
        sum_bytes += (moved or 0) * a_step
        tensor, local = mean(members, [TENSOR]), mean(members, LOCAL)
        if local is None:
            local = mean(members, LOCAL_INSTRUCTIONS)
        sum_local += (local or 0) * a_step
        sum_tensor += (tensor or 0) * a_step
        cells = [number(a_step, 0 if a_step == round(a_step) else 2), number(us, 2), number(us * a_step, 1)]
        cells += [number(None if moved is None else moved / 1e6, 2), number(share, 2), number(mean(members, [L2]), 1)]
        cells += [number(mean(members, [REGISTERS])), number(mean(members, SHARED)), number(mean(members, [WARPS]), 1)]
        cells += [number(tensor), number(local), number(over, 1)]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    has_bytes = READ in measured
    cells = [number(len(of_steps) / steps, 0), "", number(sum_us, 1)]
    cells += [number(sum_bytes / 1e6, 1) if has_bytes else "", "", "", "", "", ""]
    cells += [number(sum_tensor) if TENSOR in measured else "", number(sum_local) if measured & {*LOCAL, *LOCAL_INSTRUCTIONS} else ""]
    cells += [number(sum_over, 1) if has_bytes and copy else ""]
    lines.append("| all | " + " | ".join(cells) + " |")
    kernels = len(of_steps) // steps
    lines += ["", f"{steps} equal steps of {kernels} kernels, of {whole} profiled; means, each kernel alone.", ""]
    if has_bytes and copy:
        at_copy = sum_bytes / (copy * 1e3)
        lines.append(f"- at copy speed ({copy:,.0f} GB/s): {at_copy:,.1f} us for {sum_bytes / 1e6:,.1f} MB")
        lines.append(f"- kernels over copy speed: {sum_over:,.1f} us (the last column says whose)")
    lines.append(f"- sum of the kernels alone: {sum_us:,.1f} us")
    if step_us:
        lines.append(f"- the step's own time: {step_us:,.1f} us")
        lines.append(
            f"- difference: {step_us - sum_us:+,.1f} us (launches and the host; negative where kernels overlap or the caches "
            "hold what ncu's runs find cold)"
        )
    return "\n".join(lines) + "\n"


def from_bench(path, batch):
    """Copy bandwidth (GB/s) and the step's time (us) in the output of `lockstep bench --json`."""
    with open(path, encoding="utf-8") as file:
        figures = json.load(file)["figures"]
    copy = [figure["value"] for figure in figures if figure["what"] == "ceiling: device copy"]
    step = [figure["value"] for figure in figures if figure["what"] == "decode step" and figure["batch"] == batch]
    return copy[0] if copy else None, step[0] * 1e3 if step else None


def self_test():
    head = ["ID", "Process ID", "Kernel Name", "Block Size", "Grid Size", "Metric Name", "Metric Unit", "Metric Value"]
    # A launch that is cut off, two whole steps of two layers, one with a prompt, and the start of a third.
    step = ["embedding", "a", "b", "c", "b", "a", "b", "c", "b"]
    order = ["b", *step, "embedding", "prompt", *step, "embedding", "a"]
    lines = ["==PROF== Connected\n", "device   x\n", ",".join(f'"{name}"' for name in head) + "\n"]
    us = {"embedding": 1, "a": 2, "b": 3, "c": 4, "prompt": 9}
    for index, name in enumerate(order):
        # b is slower behind c than behind a.
        time = us[name] * 1000 + (500 if name == "b" and order[index - 1] == "c" else 0)
        for metric, unit, value in [
            (TIME, "ns", f"{time:,}"),
            (READ, "Mbyte", "1.5"),
            (WRITTEN, "byte", "500,000"),
            (REGISTERS, "register/thread", "92"),
            (L2, "%", "n/a"),
        ]:
            row = [str(index), "7", name, "(32, 1, 1)", "(9, 1, 1)", metric, unit, value]
            lines.append(",".join(f'"{cell}"' for cell in row) + "\n")
    said = table(launches(lines), copy=1000, step_us=20)
    for expected in [
        "| `b, after c` | 2 | 3.50 | 7.0 | 2.00 | 0.57 |  | 92 |",
        "| `b, after a` | 2 | 3.00 | 6.0 | 2.00 | 0.67 |",
        "| `embedding` | 1 | 1.00 | 1.0 | 2.00 | 2.00 |",
        "| `a` | 2 | 2.00 | 4.0 |",
        "| all | 9 |  | 26.0 | 18.0 |",
        "2 equal steps of 9 kernels, of 3 profiled",
        "- at copy speed (1,000 GB/s): 18.0 us for 18.0 MB",
        "- kernels over copy speed: 8.0 us",
        "- difference: -6.0 us",
    ]:
        assert expected in said, f"{expected}\n{said}"
    for text in (["no csv\n"], lines[:30]):
        try:
            table(launches(text))
        except SystemExit:
            continue
        raise AssertionError("a profile without a whole step went unnoticed")
    print("self-test passed")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", nargs="?")
    parser.add_argument("--bench", help="output of `lockstep bench --json` without ncu")
    parser.add_argument("--batch", type=int, help="which decode step of it")
    parser.add_argument("--copy", type=float, help="copy bandwidth in GB/s")
    parser.add_argument("--step-us", type=float, help="the step's own time")
    parser.add_argument("--first", default="embedding", help="the kernel that starts a step")
    parser.add_argument("--self-test", action="store_true")
    options = parser.parse_args()
    if options.self_test:
        return self_test()
    if not options.csv:
        parser.error("name the output of ncu")
    copy, step_us = from_bench(options.bench, options.batch) if options.bench else (None, None)
    with open(options.csv, encoding="utf-8") as file:
        print(table(launches(file), options.copy or copy, options.step_us or step_us, options.first), end="")


if __name__ == "__main__":
    main()
