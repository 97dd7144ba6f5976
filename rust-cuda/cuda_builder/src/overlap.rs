//! Proves from the PTX that kernels which overlap with their predecessors wait in time.
//!
//! A kernel with `griddepcontrol.wait` in it is launched while the kernels ahead still run. What is proved of its text, over
//! every path from its start to the first wait, whatever the branches decide:
//! - nothing stores to global memory, no `atom` or `red` changes it;
//! - what is read from global memory comes from parameters that the kernels' table of early reads names for it, by the
//!   parameters that the address is computed from; an address that comes from no parameter is a fault;
//! - no path ends before a wait, unless the table says so (a trap may: it stops the device).
//!
//! A kernel that lets its successor start has to wait itself. What is not proved: that no kernel which may still run writes
//! what the table names. That is a fact about the order of launches, and stands with reasons in the table.

use std::collections::{BTreeMap, BTreeSet};

use crate::flow::{Flow, WAIT, names};

/// What the table says of one kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EarlyUse {
    /// Parameters, by name, that it may read before it waits.
    pub reads: BTreeSet<String>,
    /// Whether some of its threads may end without a wait.
    pub ends: bool,
}

/// What a kernel's PTX does before it has waited.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overlap {
    /// Its name.
    pub kernel: String,
    /// Whether it waits anywhere: it is launched while its predecessors run.
    pub waits: bool,
    /// Whether it lets its successor start while it runs.
    pub allows: bool,
    /// Its PTX parameters, by index, that memory is read through before a wait.
    pub reads: BTreeSet<usize>,
    /// Whether a thread may end before a wait.
    pub ends: bool,
    /// What no table can allow.
    pub faults: Vec<String>,
}

/// What an instruction does to global memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    Nothing,
    /// Through the brackets of this number, from 0.
    Read(usize),
    Write,
}

fn access(op: &str, operands: &str) -> Access {
    let mut parts = op.split('.');
    let base = parts.next().unwrap_or_default();
    let spaces: Vec<&str> =
        parts.filter(|part| ["global", "shared", "local", "param", "const"].contains(&before_colon(part))).collect();
    // Without a space the address is generic, and may be global.
    let elsewhere = spaces.first().is_some_and(|space| *space != "global");
    match base {
        "cp" if !operands.contains('[') => Access::Nothing,
        "cp" if op.contains(".prefetch") => Access::Read(0),
        // The target's space comes first.
        "cp" if elsewhere && spaces.contains(&"global") => Access::Read(1),
        "cp" if elsewhere => Access::Nothing,
        "ld" | "ldu" | "st" | "atom" | "red" | "ldmatrix" | "stmatrix" | "mbarrier" if elsewhere => Access::Nothing,
        "ld" | "ldu" | "prefetch" | "prefetchu" => Access::Read(0),
        "st" | "atom" | "red" | "cp" | "multimem" | "discard" | "sust" | "sured" => Access::Write,
        // What is not known counts for the worst.
        _ if operands.contains('[') => Access::Write,
        _ => Access::Nothing,
    }
}

/// `shared` of `shared::cta`.
fn before_colon(part: &str) -> &str {
    part.split(':').next().unwrap_or(part)
}

/// What every kernel of a PTX module does before it waits, by name. Kernels that neither wait nor let their successor start
/// are left out.
///
/// # Errors
/// The text does not read.
pub fn overlaps(ptx: &str) -> Result<Vec<Overlap>, String> {
    let text: String = ptx.lines().flat_map(|line| [line.split("//").next().unwrap_or(""), "\n"]).collect();
    let functions = crate::ptx::functions(&text);
    // What a call ends in that does not return: a panic, which traps. One that touched memory would be followed by nobody.
    let none = BTreeSet::new();
    let mut noreturn = BTreeSet::new();
    for function in functions.iter().filter(|f| !f.is_entry && text[f.header.clone()].contains(".noreturn")) {
        let Some(body) = function.body.clone() else { continue };
        let flow = Flow::new(&text[body], &none).map_err(|reason| format!("function {}: {reason}", function.name))?;
        if flow.instructions.iter().all(|one| access(one.op, one.operands) == Access::Nothing) {
            noreturn.insert(function.name);
        }
    }
    let mut found = Vec::new();
    for function in functions.iter().filter(|f| f.is_entry) {
        let Some(body) = function.body.clone() else { continue };
        let pointers = pointers(&text[function.header.clone()]);
        let overlap = overlap(function.name, &text[body], &pointers, &noreturn);
        found.extend(overlap.map_err(|reason| format!("kernel {}: {reason}", function.name))?);
    }
    found.sort_by(|a, b| a.kernel.cmp(&b.kernel));
    Ok(found)
}

/// The parameters that are pointers, by name, with their index among all parameters.
fn pointers(header: &str) -> BTreeMap<&str, usize> {
    let parameters = header.split_once('(').map_or("", |(_, rest)| rest.split(')').next().unwrap_or(rest));
    let pointers = parameters.split(',').enumerate().filter(|(_, declared)| declared.contains(".ptr"));
    pointers.filter_map(|(index, declared)| Some((names(declared).last()?, index))).collect()
}

fn overlap(
    kernel: &str,
    body: &str,
    pointers: &BTreeMap<&str, usize>,
    noreturn: &BTreeSet<&str>,
) -> Result<Option<Overlap>, String> {
    let flow = Flow::new(body, noreturn)?;
    let has = |op: &str| flow.instructions.iter().any(|instruction| instruction.op == op);
    let (waits, allows) = (has(WAIT), has("griddepcontrol.launch_dependents"));
    if !waits && !allows {
        return Ok(None);
    }
    let mut found = Overlap { kernel: kernel.to_owned(), waits, allows, ..Overlap::default() };
    if !waits {
        found.faults.push("it lets its successor start and never waits".to_owned());
        return Ok(Some(found));
    }
    let unwaited = flow.unwaited()?;
    found.ends = unwaited.ends;
    let origins = flow.origins(|name| pointers.get(name).copied());
    for at in unwaited.reached {
        let instruction = &flow.instructions[at];
        let (op, operands) = (instruction.op, instruction.operands);
        let said = || format!("`{op} {}`", operands.split_whitespace().collect::<Vec<_>>().join(" "));
        match access(op, operands) {
            Access::Nothing if op.starts_with("call") && !names(operands).any(|name| noreturn.contains(name)) => {
                found.faults.push(format!("{} may run before it waits, and is not followed", said()));
            }
            Access::Nothing => {}
            Access::Write => found.faults.push(format!("{} may run before it waits", said())),
            Access::Read(number) => {
                let address = operands.split('[').nth(number + 1).and_then(|rest| rest.split(']').next());
                let from: BTreeSet<usize> = names(address.unwrap_or_default())
                    .filter_map(|name| origins.get(name))
                    .flatten()
                    .copied()
                    .collect();
                if from.is_empty() {
                    found.faults.push(format!("{} may run before it waits, and reads through no parameter", said()));
                }
                found.reads.extend(from);
            }
        }
    }
    Ok(Some(found))
}

/// Reads the table: lines `kernel kernel: parameter parameter`, with `; ends` behind where threads may end before a wait.
/// `#` starts a comment.
///
/// # Errors
/// A line has no colon, or a kernel has two.
pub fn parse_early_uses(text: &str) -> Result<BTreeMap<String, EarlyUse>, String> {
    let mut table = BTreeMap::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or("").trim();
        if line.is_empty() {
            continue;
        }
        let wrong = |reason: &str| format!("line {}: {reason}", index + 1);
        let (kernels, rest) = line.split_once(':').ok_or_else(|| wrong("there is no colon behind the kernels"))?;
        let (reads, end) = rest.split_once(';').unwrap_or((rest, ""));
        let ends = match end.trim() {
            "" => false,
            "ends" => true,
            other => return Err(wrong(&format!("`{other}` is not `ends`"))),
        };
        let early = EarlyUse { reads: reads.split_whitespace().map(str::to_owned).collect(), ends };
        for kernel in kernels.split_whitespace() {
            if table.insert(kernel.to_owned(), early.clone()).is_some() {
                return Err(wrong(&format!("{kernel} has a line already")));
            }
        }
    }
    Ok(table)
}

/// How a module's kernels differ from what the table allows. `parameters` has each kernel's, by name, with how many PTX
/// parameters each one is. The table may say of no kernel what is not so: it is read by people too.
#[must_use]
pub fn overlap_faults(
    found: &[Overlap],
    table: &BTreeMap<String, EarlyUse>,
    parameters: &BTreeMap<String, Vec<(String, usize)>>,
) -> Vec<String> {
    let mut faults = Vec::new();
    for overlap in found {
        let kernel = &overlap.kernel;
        faults.extend(overlap.faults.iter().map(|fault| format!("kernel {kernel}: {fault}")));
        let nothing = EarlyUse::default();
        let allowed = table.get(kernel).unwrap_or(&nothing);
        let of_kernel = parameters.get(kernel).map(Vec::as_slice).unwrap_or_default();
        let names: Vec<&String> =
            of_kernel.iter().flat_map(|(name, words)| std::iter::repeat_n(name, *words)).collect();
        let mut reads = BTreeSet::new();
        for index in &overlap.reads {
            match names.get(*index) {
                Some(name) => drop(reads.insert((*name).clone())),
                None => faults.push(format!("kernel {kernel}: its source has no parameter {index} of its PTX")),
            }
        }
        faults.extend(reads.difference(&allowed.reads).map(|name| {
            format!("kernel {kernel}: `{name}` may be read before it waits, and its line in the table does not say so")
        }));
        faults.extend(allowed.reads.difference(&reads).map(|name| {
            format!("kernel {kernel}: the table says that `{name}` is read before it waits, and it is not")
        }));
        if overlap.ends && !allowed.ends {
            faults.push(format!(
                "kernel {kernel}: a path ends before it waits, and its line in the table does not say so"
            ));
        }
        if allowed.ends && !overlap.ends {
            faults.push(format!("kernel {kernel}: the table says that a path ends before it waits, and none does"));
        }
    }
    let unknown = table.keys().filter(|kernel| !found.iter().any(|overlap| overlap.kernel == **kernel));
    faults.extend(unknown.map(|kernel| format!("kernel {kernel} is in the table and does not overlap")));
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A kernel that reads a weight early, waits on both of its paths, and stores; `weight` and `out` are two parameters
    /// each, the pointer and a length.
    const KERNEL: &str = "\
.version 8.0
.func panics()
.noreturn
{
\ttrap; exit;
}
.visible .entry scale(
\t.param .u64 .ptr .align 1 scale_param_0,
\t.param .u64 scale_param_1,
\t.param .u64 .ptr .align 1 scale_param_2,
\t.param .u64 scale_param_3
)
.maxntid 32, 1, 1
{
\t.reg .b64 \t%rd<9>;
\tld.param.b64 \t%rd1, [scale_param_0];
\tcvta.to.global.u64 \t%rd2, %rd1;
\tld.param.b64 \t%rd3, [scale_param_2];
\tld.param.b64 \t%rd4, [scale_param_3];
\t// begin inline asm
\tgriddepcontrol.launch_dependents;
\t// end inline asm
\t{ .reg .pred p; setp.ne.u32 p, %r2, 0; vote.sync.ballot.b32 %r3, p, 0xffffffff; }
\tadd.s64 \t%rd5, %rd2, %rd4;
\tld.global.v2.b32 \t{%r1, %r2}, [%rd5+16];
\tst.shared.b32 \t[%r9], %r1;
\t@%p1 bra \t$L__A;
\tbra.uni \t$L__B;
$L__A:
\tgriddepcontrol.wait;
\tbra.uni \t$L__C;
$L__B:
\t@%p2 bra \t$L__PANIC;
\tgriddepcontrol.wait;
$L__C:
\tadd.s64 \t%rd6, %rd3, 4;
\tld.global.b32 \t%r4, [%rd6];
\tst.global.b32 \t[%rd6], %r1;
\tret;
$L__PANIC:
\tcall.uni panics, ();
\ttrap; exit;
}
";

    fn table() -> BTreeMap<String, EarlyUse> {
        parse_early_uses("# kernels\nscale: weight  # read only\n").unwrap()
    }

    fn faults_with(ptx: &str, table: &BTreeMap<String, EarlyUse>) -> Vec<String> {
        let parameters = BTreeMap::from([("scale".to_owned(), vec![("weight".to_owned(), 2), ("out".to_owned(), 2)])]);
        overlap_faults(&overlaps(ptx).unwrap(), table, &parameters)
    }

    /// The faults after one replacement, without the kernel's name.
    fn planted(from: &str, to: &str) -> Vec<String> {
        assert!(KERNEL.contains(from), "{from}");
        let faults = faults_with(&KERNEL.replacen(from, to, 1), &table());
        faults.into_iter().map(|fault| fault.replacen("kernel scale: ", "", 1)).collect()
    }

    #[test]
    fn a_kernel_that_waits_in_time_passes() {
        assert_eq!(faults_with(KERNEL, &table()), Vec::<String>::new());
        let reads = BTreeSet::from([0]);
        let expected = Overlap { kernel: "scale".into(), waits: true, allows: true, reads, ..Overlap::default() };
        assert_eq!(overlaps(KERNEL).unwrap(), [expected]);
        let apart = KERNEL.replace("griddepcontrol.wait;", "").replace("griddepcontrol.launch_dependents;", "");
        assert_eq!(overlaps(&apart).unwrap(), []);
    }

    #[test]
    fn a_kernel_without_the_wait_is_caught() {
        let never = faults_with(&KERNEL.replace("griddepcontrol.wait;", ""), &table());
        assert_eq!(never[0], "kernel scale: it lets its successor start and never waits");
        // On one of two paths: what follows is early now.
        let one = planted("$L__A:\n\tgriddepcontrol.wait;", "$L__A:");
        assert!(one[0].starts_with("`st.global.b32 [%rd6], %r1` may run before"), "{one:?}");
        assert!(one.iter().any(|fault| fault.starts_with("`out` may be read before")), "{one:?}");
        assert!(one.iter().any(|fault| fault.starts_with("a path ends before it waits")), "{one:?}");
        // A wait under a predicate is none on the other side.
        assert_eq!(planted("$L__A:\n\tgriddep", "$L__A:\n\t@%p3 griddep"), one);
        assert_eq!(planted("$L__A:\n\tgriddepcontrol.wait;", "$L__A:\n\t// griddepcontrol.wait;"), one);
    }

    #[test]
    fn a_write_before_the_wait_is_caught_in_every_form() {
        for write in [
            "st.global.v4.b32 [%rd5], {%r1, %r1, %r1, %r1};",
            "st.b32 [%rd5], %r1;",
            "red.relaxed.gpu.global.add.u32 [%rd5], 1;",
            "atom.acq_rel.gpu.global.inc.u32 %r7, [%rd5], %r1;",
            "cp.async.bulk.global.shared::cta.bulk_group [%rd5], [%r9], 64;",
            "unheard.of [%rd5];",
        ] {
            let faults = planted("st.shared.b32", &format!("{write}\n\tst.shared.b32"));
            assert_eq!(faults.len(), 1, "{write}: {faults:?}");
            assert!(faults[0].contains("may run before it waits") && faults[0].contains(&write[..6]), "{faults:?}");
        }
        for harmless in ["atom.relaxed.cta.shared.add.u32 %r7, [%r9], 1;", "cp.async.commit_group;", "bar.sync 0;"] {
            assert_eq!(planted("st.shared.b32", &format!("{harmless}\n\tst.shared.b32")), [""; 0], "{harmless}");
        }
    }

    #[test]
    fn a_path_that_ends_early_is_caught_and_can_be_allowed() {
        let ends = "a path ends before it waits, and its line in the table does not say so";
        for end in ["@%p4 ret;", "@%p4 exit;", "@%p4 bra $L__END;"] {
            let text = KERNEL.replacen("st.shared.b32", &format!("{end}\n\tst.shared.b32"), 1);
            let text = text.replacen("\tret;", "$L__END:\n\tret;", 1);
            assert_eq!(faults_with(&text, &table()), [format!("kernel scale: {ends}")], "{end}");
            let allowed = parse_early_uses("scale: weight; ends\n").unwrap();
            assert_eq!(faults_with(&text, &allowed), [""; 0]);
        }
        assert_eq!(planted("st.shared.b32", "@%p4 trap;\n\tst.shared.b32"), [""; 0]);
    }

    #[test]
    fn reads_before_the_wait_are_known_by_their_parameter() {
        let of_out = "`out` may be read before it waits, and its line in the table does not say so";
        for read in [
            "ld.global.b32 %r8, [%rd3];",
            "ld.b32 %r8, [%rd3+4];",
            "selp.b64 %rd7, %rd3, %rd2, %p3; ld.global.nc.b32 %r8, [%rd7];",
            "cp.async.cg.shared.global [%r9], [%rd3], 16;",
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r9], [%rd3], 64, [%r8];",
            "mov.b64 {%r5, %r6}, %rd3; mov.b64 %rd7, {%r5, %r6}; ld.global.b32 %r8, [%rd7];",
        ] {
            assert_eq!(planted("st.shared.b32", &format!("{read}\n\tst.shared.b32")), [of_out], "{read}");
        }
        // An index that was loaded is no pointer; an address that was is of nobody.
        let index = "cvt.u64.u32 %rd7, %r1; add.s64 %rd8, %rd2, %rd7; ld.global.b32 %r8, [%rd8];";
        assert_eq!(planted("st.shared.b32", &format!("{index}\n\tst.shared.b32")), [""; 0]);
        let loaded = "ld.global.b64 %rd7, [%rd5]; ld.global.b32 %r8, [%rd7];";
        let faults = planted("st.shared.b32", &format!("{loaded}\n\tst.shared.b32"));
        assert_eq!(faults, ["`ld.global.b32 %r8, [%rd7]` may run before it waits, and reads through no parameter"]);
        let called = planted("st.shared.b32", "call.uni other, ();\n\tst.shared.b32");
        assert_eq!(called, ["`call.uni other, ()` may run before it waits, and is not followed"]);
        let storing = planted("\ttrap; exit;\n}", "\tst.global.b32 [%rd1], %r1;\n\ttrap; exit;\n}");
        assert_eq!(storing[0], "`call.uni panics, ()` may run before it waits, and is not followed");
    }

    #[test]
    fn loops_jump_tables_and_repeated_labels_are_followed() {
        // A loop before the wait, in scopes that repeat its label; and a jump table one of whose targets does not wait.
        let scopes = "{ AGAIN: @%p5 bra AGAIN; }\n\t{ AGAIN: @%p5 bra AGAIN; }\n\tst.shared.b32";
        assert_eq!(planted("st.shared.b32", scopes), [""; 0]);
        let jump = "$L_brx_0: .branchtargets\n\t\t$L__A,\n\t\t$L__C;\n\tbrx.idx %r1, $L_brx_0;";
        let faults = planted("bra.uni \t$L__B;", jump);
        assert!(faults.iter().any(|fault| fault.starts_with("`st.global.b32")), "{faults:?}");
        assert!(overlaps(&KERNEL.replace("$L__B:", "$L__D:")).unwrap_err().contains("there is no label $L__B"));
        assert!(overlaps(&KERNEL.replace("$L__B:", "$L__A:")).unwrap_err().contains("$L__A stands in two places"));
    }

    #[test]
    fn the_table_says_no_more_than_is_so() {
        let table = parse_early_uses("scale other: weight out; ends\n").unwrap();
        assert_eq!(
            faults_with(KERNEL, &table),
            [
                "kernel scale: the table says that `out` is read before it waits, and it is not",
                "kernel scale: the table says that a path ends before it waits, and none does",
                "kernel other is in the table and does not overlap",
            ]
        );
        for (text, reason) in [
            ("scale\n", "line 1: there is no colon"),
            ("scale: a\nscale: b\n", "line 2: scale has a line already"),
            ("scale: a; end\n", "line 1: `end` is not `ends`"),
        ] {
            assert!(parse_early_uses(text).unwrap_err().starts_with(reason), "{text}");
        }
        let unknown = overlap_faults(&overlaps(KERNEL).unwrap(), &self::table(), &BTreeMap::new());
        assert_eq!(unknown[0], "kernel scale: its source has no parameter 0 of its PTX");
    }
}
