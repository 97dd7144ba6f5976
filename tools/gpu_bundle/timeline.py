#!/usr/bin/env python3
"""Reads a timeline of a decode step: where it waits, kernel by kernel.

    cargo build --release --features timeline
    LOCKSTEP_TIMELINE=t.csv lockstep bench --only decode --batch 1 --runs 2 --tokens 32
    tools/gpu_bundle/timeline.py t.csv [--launches N]

A launch is the blocks of one kernel that ended together. For each kernel, medians in microseconds: `period`, from the end of
the launch before to its own; `woken`, from there until its blocks' wait for it ended; `works`, from then until its first and
its last block ended; `early`, how long before the wait its last block had started. `--launches` lists some launches in the
middle instead. `--self-test` checks this script.
"""

import argparse
import collections
import csv
import statistics
import sys

# Blocks of one launch end within this many nanoseconds of each other.
APART = 6000


def launches(rows):
    """Groups blocks, which come in the order of their ends, by launch."""
    found, current = [], {}
    for row in rows:
        name, block = row["kernel"], (row["x"], row["y"], row["z"])
        start, waited, end = (int(row[key]) for key in ("start_ns", "waited_ns", "end_ns"))
        launch = current.get(name)
        if launch is None or block in launch["blocks"] or end - launch["end"] > APART:
            launch = {"kernel": name, "blocks": set(), "starts": [], "waits": [], "first_end": end, "end": end}
            current[name] = launch
            found.append(launch)
        launch["blocks"].add(block)
        launch["starts"].append(start)
        launch["waits"].append(waited)
        launch["end"] = end
    return sorted(found, key=lambda launch: launch["end"])


def table(found):
    by = collections.OrderedDict()
    for before, launch in zip(found, found[1:]):
        by.setdefault(launch["kernel"], []).append((
            launch["end"] - before["end"],
            min(launch["waits"]) - before["end"],
            launch["first_end"] - min(launch["waits"]),
            launch["end"] - max(launch["waits"]),
            min(launch["waits"]) - max(launch["starts"]),
            len(launch["blocks"]),
        ))
    lines = ["| kernel | launches | blocks | period | woken | works, first | last block | early |",
             "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for name, seen in by.items():
        *times, blocks = (statistics.median(column) for column in zip(*seen))
        cells = " | ".join(f"{time / 1000:.2f}" for time in times)
        lines.append(f"| `{name}` | {len(seen)} | {blocks:.0f} | {cells} |")
    return "\n".join(lines)


def listing(found, count):
    middle = max(len(found) // 2 - count // 2, 0)
    chosen = found[middle:middle + count]
    zero = chosen[0]["end"]
    lines = []
    for launch in chosen:
        at = [(time - zero) / 1000 for time in (
            min(launch["starts"]), max(launch["starts"]), min(launch["waits"]), launch["first_end"], launch["end"])]
        lines.append("{:<28} {:4d} blocks  start {:8.2f} .. {:8.2f}  waited {:8.2f}  end {:8.2f} .. {:8.2f}".format(
            launch["kernel"], len(launch["blocks"]), *at))
    return "\n".join(lines)


def self_test():
    def rows(times):
        return [dict(kernel=k, x=str(x), y="0", z="0", start_ns=str(s), waited_ns=str(w), end_ns=str(e)) for k, x, s, w, e in times]

    found = launches(rows([
        ("a", 0, 0, 0, 900), ("a", 1, 50, 50, 1000), ("b", 0, 100, 1500, 3000), ("b", 1, 300, 1500, 4000),
        ("a", 0, 3500, 4500, 5000),
    ]))
    assert [(launch["kernel"], len(launch["blocks"])) for launch in found] == [("a", 2), ("b", 2), ("a", 1)]
    text = table(found)
    assert "| `b` | 1 | 2 | 3.00 | 0.50 | 1.50 | 2.50 | 1.20 |" in text, text
    # Planted: a block that ends twice is another launch.
    assert len(launches(rows([("a", 0, 0, 0, 10), ("a", 0, 0, 0, 20)]))) == 2
    assert "b" in listing(found, 2)
    print("timeline.py: the self-test holds")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?")
    parser.add_argument("--launches", type=int, metavar="N")
    parser.add_argument("--self-test", action="store_true")
    arguments = parser.parse_args()
    if arguments.self_test:
        return self_test()
    if arguments.file is None:
        sys.exit("error: name the file that LOCKSTEP_TIMELINE named")
    with open(arguments.file, newline="") as file:
        found = launches(csv.DictReader(file))
    if len(found) < 2:
        sys.exit(f"error: {arguments.file} has no launches")
    print(listing(found, arguments.launches) if arguments.launches else table(found))


if __name__ == "__main__":
    main()
