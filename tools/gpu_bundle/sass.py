#!/usr/bin/env python3
"""Counts the instructions that matter in each kernel's machine code, and fails where a kernel lacks what it is meant to have.

    tools/gpu_bundle/sass.py [--ptx kernels-gpu/ptx/sm_90a.ptx] [--arch sm_90a] [--markdown FILE]

Needs ptxas and cuobjdump: in PATH, or named by LOCKSTEP_PTXAS and LOCKSTEP_CUOBJDUMP. `--self-test` checks this script.
"""

import argparse
import collections
import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tempfile

# What is counted: a column, and the instructions in it (a prefix, and modifiers that must all be there).
COLUMNS = {
    "HMMA": ("HMMA", ()),  # tensor cores
    "HGMMA": ("HGMMA", ()),  # tensor cores, by warpgroups
    "LDSM": ("LDSM", ()),  # ldmatrix
    "LDGSTS.128": ("LDGSTS", ("BYPASS", "128")),  # 16-byte cp.async that leaves L1 out
    "LDGSTS": ("LDGSTS", ()),
    "UBLKCP": ("UBLKCP", ()),  # bulk copies
    "UTMALDG": ("UTMALDG", ()),  # copies of boxes
    "LDG.128": ("LDG", ("128",)),
    "LDG.64": ("LDG", ("64",)),
    "LDG": ("LDG", ()),
    "STG.128": ("STG", ("128",)),
    "STG": ("STG", ()),
    "LDL": ("LDL", ()),  # local memory: spills and arrays that are indexed
    "STL": ("STL", ()),
    "ACQBULK": ("ACQBULK", ()),  # griddepcontrol.wait
    "PREEXIT": ("PREEXIT", ()),  # griddepcontrol.launch_dependents
}

# What kernels are meant to have: patterns of names, and columns that may not be 0.
PRODUCTS = ("HMMA", "LDSM", "LDGSTS.128", "ACQBULK")
MEANT = {
    "few_qkv*": PRODUCTS,
    "few_gate_up*": PRODUCTS,
    "few_residual_*": PRODUCTS,
    "few_logits": PRODUCTS,
    "tile_*": PRODUCTS,
    "attention_decode_*": PRODUCTS,
    "attention_prefill_*": PRODUCTS,
    "attention_groups_*": ("HGMMA", "UTMALDG", "ACQBULK"),
    # The chain that the contract is defined by; cuBLASLt or the others above serve.
    "linear_bf16": ("HMMA", "ACQBULK"),
    "linear_f32": ("HMMA", "ACQBULK"),
    "residual_norm*": ("LDG.128", "STG.128", "ACQBULK"),
    "rms_norm": ("LDG.128", "STG.128", "ACQBULK"),
    "rotary_kv_write": ("LDG.128", "STG.128", "ACQBULK"),
    "silu_mul": ("LDG.64", "ACQBULK"),
    "argmax": ("LDG.128", "ACQBULK"),
    "sample_candidates": ("LDG.128", "ACQBULK"),
    "sample_masses": ("LDG.128", "ACQBULK"),
    "log_probs": ("ACQBULK",),
    "few_argmax": ("ACQBULK",),
    "wgmma_*": ("HGMMA", "UTMALDG", "ACQBULK"),
    "decode_step_*": ("HMMA", "LDSM", "UBLKCP", "ACQBULK"),
}
# Copies of these kernels to shared memory all have 16 bytes and leave L1 out.
ONLY_WIDE = ("few_*", "tile_*", "attention_*")
NEVER = ("LDL", "STL")

# Stores ahead of the first wait in the order of the text; `ptx check` proves it over all paths of the PTX.
EARLY = ("STG", "RED", "REDG", "ATOM", "ATOMG")

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)((?:\.[A-Z0-9_]+)*)")


def count(sass):
    """The columns' counts of each kernel in the output of `cuobjdump -sass`."""
    kernels, counts = {}, None
    for line in sass.splitlines():
        if "Function : " in line:
            counts = kernels.setdefault(line.split("Function : ")[1].strip(), collections.Counter())
        found = INSTRUCTION.match(line)
        if not found or counts is None:
            continue
        name, modifiers = found[1], found[2].split(".")
        for column, (prefix, needed) in COLUMNS.items():
            counts[column] += name == prefix and all(modifier in modifiers for modifier in needed)
        counts["all"] += name != "NOP"
        if not counts["ACQBULK"]:
            counts["early loads"] += name in ("LDG", "LDGSTS", "UBLKCP")
            counts["early stores"] += name in EARLY
    return kernels


def usage(said):
    """(registers, bytes of static shared memory, bytes of spills) of each kernel, from the output of `ptxas -v`."""
    kernels, name = {}, None
    for line in said.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            name = found[1]
            kernels[name] = [0, 0, 0]
        if name and (found := re.search(r"Used (\d+) registers", line)):
            kernels[name][0] = int(found[1])
        if name and (found := re.search(r"(\d+) bytes smem", line)):
            kernels[name][1] = int(found[1])
        if name and "bytes spill" in line:
            kernels[name][2] += sum(map(int, re.findall(r"(\d+) bytes spill", line)))
    return kernels


def faults(kernels, used):
    found = []
    for pattern, columns in MEANT.items():
        names = fnmatch.filter(kernels, pattern)
        if not names:
            found.append(f"no kernel is named {pattern}")
        found += [f"{name} has no {column}" for name in sorted(names) for column in columns if not kernels[name][column]]
    for name, counts in sorted(kernels.items()):
        found += [f"{name} has {counts[column]} {column}" for column in NEVER if counts[column]]
        if any(fnmatch.fnmatch(name, pattern) for pattern in ONLY_WIDE) and counts["LDGSTS"] != counts["LDGSTS.128"]:
            found.append(f"{name} has {counts['LDGSTS'] - counts['LDGSTS.128']} narrower LDGSTS")
        if counts["ACQBULK"] and counts["early stores"]:
            found.append(f"{name} has {counts['early stores']} stores ahead of its wait")
        if name not in used:
            found.append(f"{name} has no registers in what ptxas says")
        elif used[name][2]:
            found.append(f"{name} spills {used[name][2]} bytes")
    return found


def table(kernels, used):
    lines = ["| kernel | instructions | registers | shared B | " + " | ".join(COLUMNS) + " | loads ahead of ACQBULK |"]
    lines.append("| --- |" + " ---: |" * (len(COLUMNS) + 4))
    for name, counts in sorted(kernels.items()):
        registers, shared, _ = used.get(name, [0, 0, 0])
        cells = [counts["all"], registers, shared, *(counts[column] for column in COLUMNS)]
        cells.append(counts["early loads"] if counts["ACQBULK"] else "")
        lines.append(f"| `{name}` | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def program(name, variable):
    found = os.environ.get(variable) or shutil.which(name)
    if not found:
        sys.exit(f"there is no {name}: put it into PATH, or set {variable} to it")
    return found


def self_test():
    def line(text):
        return f"        /*00a0*/                   {text} ;     /* 0x000000000000782e */\n"

    sass = "\t\tFunction : few_logits\n" + "".join(
        line(text)
        for text in [
            "@!P0 LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64]",
            "LDSM.16.M88.4 R4, [R2]",
            "HMMA.16816.F32.BF16 R4, R8, R12, R4",
            "HFMA2.MMA R1, RZ, RZ, 0, 0",
            "ACQBULK",
            "@UP0 LDG.E.128 R4, desc[UR4][R2.64]",
            "LDGDEPBAR",
            "NOP",
        ]
    )
    kernels = count(sass)
    expected = {"HMMA": 1, "LDSM": 1, "LDGSTS.128": 1, "LDGSTS": 1, "LDG.128": 1, "LDG": 1, "ACQBULK": 1, "all": 7, "early loads": 1}
    assert {key: value for key, value in kernels["few_logits"].items() if value} == expected, kernels
    said = "Compiling entry function 'few_logits' for 'sm_90a'\n 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
    used = usage(said + "Used 80 registers, used 1 barriers, 256 bytes smem\n")
    assert used == {"few_logits": [80, 256, 0]}, used

    def of_this(kernels, used):
        return [fault for fault in faults(kernels, used) if fault.startswith("few_logits ")]

    assert of_this(kernels, used) == []
    early = sass.replace("HMMA.16816", "STG.E [R2], R4 ;\n        /*00b0*/  HMMA.16816")
    assert of_this(count(early), used) == ["few_logits has 1 stores ahead of its wait"]
    # Planted: each of what is meant taken away, local memory, a narrow copy, a spill.
    for column in ("HMMA", "LDSM", "ACQBULK"):
        without = "".join(text for text in sass.splitlines(True) if f" {column}" not in text)
        assert of_this(count(without), used) == [f"few_logits has no {column}"], column
    assert of_this(count(sass + line("@P1 STL [R1], R2")), used) == ["few_logits has 1 STL"]
    assert of_this(count(sass + line("LDL.64 R2, [R1+0x8]")), used) == ["few_logits has 1 LDL"]
    assert of_this(count(sass + line("LDGSTS.E [R2], desc[UR4][R4.64]")), used) == ["few_logits has 1 narrower LDGSTS"]
    assert of_this(kernels, usage(said.replace("0 bytes spill s", "8 bytes spill s"))) == ["few_logits spills 8 bytes"]
    assert "no kernel is named argmax" in faults(kernels, used)
    print("self-test passed")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ptx", default="kernels-gpu/ptx/sm_90a.ptx")
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("--markdown", help="write the table there too")
    parser.add_argument("--self-test", action="store_true")
    options = parser.parse_args()
    if options.self_test:
        return self_test()
    ptxas, cuobjdump = program("ptxas", "LOCKSTEP_PTXAS"), program("cuobjdump", "LOCKSTEP_CUOBJDUMP")
    with tempfile.TemporaryDirectory() as folder:
        cubin = os.path.join(folder, "kernels.cubin")
        assembled = subprocess.run(
            [ptxas, "-v", f"-arch={options.arch}", "-o", cubin, options.ptx], capture_output=True, text=True
        )
        if assembled.returncode:
            sys.exit(f"ptxas refuses {options.ptx}:\n{assembled.stderr}")
        sass = subprocess.run([cuobjdump, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    kernels, used = count(sass), usage(assembled.stderr)
    found = faults(kernels, used)
    print(table(kernels, used), end="")
    if options.markdown:
        with open(options.markdown, "w", encoding="utf-8") as out:
            out.write(table(kernels, used))
    for fault in found:
        print(f"FAULT: {fault}", file=sys.stderr)
    print(f"{len(kernels)} kernels, {len(found)} faults")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
