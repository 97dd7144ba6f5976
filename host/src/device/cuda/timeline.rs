//! Timelines (cargo feature `timeline`): when each block of a kernel started, when its wait for the kernels ahead ended, and
//! when it ended itself, on the GPU's clock. Kernels of a step overlap, so their times alone do not say what a step waits for.
//!
//! The PTX is changed when it is loaded: a block's first thread reads `%globaltimer` (steps of 32 ns on an H100) and stores
//! one record as the block ends. Nothing waits for that store; a step takes 1 % longer. Records are 32 bytes in a ring that
//! is addressed by the time and the multiprocessor, so a few are lost where two blocks end at once. Of a block's place in the
//! grid 16, 12 and 8 bits are kept.

use std::fmt::Write as _;
use std::path::Path;

use cudarc::driver::sys;

use crate::device::DeviceError;

/// The environment variable that names the file which gets the timeline when the device is closed.
pub(super) const FILE: &str = "LOCKSTEP_TIMELINE";

/// Records of the ring.
const RECORDS: u64 = 1 << 22;

/// What is written of the ring: the last 4 ms.
const LAST_NS: u64 = 4_000_000;

const SYMBOL: &std::ffi::CStr = c"lockstep_timeline";

/// The text with the records, and the names of its kernels: a record has an index into them.
pub(super) fn instrument(ptx: &str) -> (String, Vec<String>) {
    let mut text = String::with_capacity(ptx.len() + ptx.len() / 8);
    let mut names: Vec<String> = Vec::new();
    let (mut inside, mut declared, mut started, mut ends) = (false, false, false, 0);
    // Braces of scopes inside a kernel that stand alone in their lines.
    let mut depth = 0_u32;
    for line in ptx.lines() {
        let bare = line.trim();
        if let Some(rest) = line.strip_prefix(".visible .entry ") {
            if names.is_empty() {
                let bytes = RECORDS * 32;
                let _ = writeln!(text, ".visible .global .align 32 .b8 {}[{bytes}];", SYMBOL.to_string_lossy());
            }
            names.push(rest.trim_end_matches('(').to_owned());
            (inside, declared, started) = (true, false, false);
        } else if inside && !declared && line == "{" {
            depth = 0;
            text.push_str("{\n\t.reg .b64 %tl<7>;\n\t.reg .b32 %tm<4>;\n\t.reg .pred %tp;\n");
            declared = true;
            continue;
        } else if inside && bare == "{" {
            depth += 1;
        } else if inside && bare == "}" && depth > 0 {
            depth -= 1;
        } else if line == "}" {
            inside = false;
        } else if inside
            && declared
            && !started
            && !bare.is_empty()
            && !bare.starts_with('.')
            && !bare.starts_with("//")
        {
            text.push_str("\tmov.u64 %tl0, %globaltimer;\n\tmov.u64 %tl1, %tl0;\n");
            started = true;
        }
        if inside && bare == "ret;" {
            ends += 1;
            let _ = write!(
                text,
                "\tmov.u32 %tm0, %tid.x;\n\
                 \tsetp.ne.u32 %tp, %tm0, 0;\n\
                 \t@%tp bra $TIMELINE_{ends};\n\
                 \tmov.u64 %tl2, %globaltimer;\n\
                 \tmov.u32 %tm1, %smid;\n\
                 \tcvt.u64.u32 %tl4, %tm1;\n\
                 \tshr.u64 %tl3, %tl2, 5;\n\
                 \tmad.lo.u64 %tl3, %tl3, 132, %tl4;\n\
                 \tand.b64 %tl3, %tl3, {mask};\n\
                 \tshl.b64 %tl3, %tl3, 5;\n\
                 \tmov.u64 %tl5, {symbol};\n\
                 \tadd.u64 %tl3, %tl3, %tl5;\n\
                 \tmov.u32 %tm2, %ctaid.x;\n\
                 \tmov.u32 %tm3, %ctaid.y;\n\
                 \tbfi.b32 %tm2, %tm3, %tm2, 16, 12;\n\
                 \tcvt.u64.u32 %tl6, %tm2;\n\
                 \tmov.u32 %tm3, %ctaid.z;\n\
                 \tcvt.u64.u32 %tl5, %tm3;\n\
                 \tbfi.b64 %tl6, %tl5, %tl6, 28, 8;\n\
                 \tbfi.b64 %tl4, %tl4, %tl6, 36, 12;\n\
                 \tor.b64 %tl4, %tl4, {kernel};\n\
                 \tst.global.v2.u64 [%tl3], {{%tl0, %tl1}};\n\
                 \tst.global.v2.u64 [%tl3+16], {{%tl2, %tl4}};\n\
                 $TIMELINE_{ends}:\n",
                mask = RECORDS - 1,
                symbol = SYMBOL.to_string_lossy(),
                kernel = (names.len() as u64 - 1) << 48,
            );
        }
        text.push_str(line);
        text.push('\n');
        if inside && bare == "griddepcontrol.wait;" {
            text.push_str("\tmov.u64 %tl1, %globaltimer;\n");
        }
    }
    (text, names)
}

/// Reads the ring of a loaded module.
///
/// # Safety
/// `module` is loaded, its context is current, and its kernels have ended.
pub(super) unsafe fn read(module: sys::CUmodule) -> Option<Vec<u64>> {
    let (mut address, mut bytes) = (0, 0);
    // SAFETY: writes the two; the module is loaded.
    let found = unsafe { sys::cuModuleGetGlobal_v2(&raw mut address, &raw mut bytes, module, SYMBOL.as_ptr()) };
    if found != sys::CUresult::CUDA_SUCCESS {
        return None;
    }
    let mut words = vec![0_u64; bytes / 8];
    // SAFETY: as many bytes as the symbol has, and `words` has room for.
    let copied = unsafe { sys::cuMemcpyDtoH_v2(words.as_mut_ptr().cast(), address, words.len() * 8) };
    (copied == sys::CUresult::CUDA_SUCCESS).then_some(words)
}

/// Writes the ring's last records: one line of comma-separated values each, in the order of their ends.
pub(super) fn write(words: &[u64], names: &[String], file: &Path) -> Result<(), DeviceError> {
    let last = words.chunks_exact(4).map(|record| record[2]).max().unwrap_or(0);
    let since = last.saturating_sub(LAST_NS);
    let mut records: Vec<&[u64]> = words.chunks_exact(4).filter(|record| record[2] > since).collect();
    records.sort_by_key(|record| record[2]);
    let first = records.iter().map(|record| record[0]).min().unwrap_or(0);
    let mut text = String::from("kernel,x,y,z,multiprocessor,start_ns,waited_ns,end_ns\n");
    for record in records {
        let (place, [start, waited, end]) = (record[3], [record[0], record[1], record[2]].map(|time| time - first));
        let name = names.get((place >> 48) as usize).map_or("?", String::as_str);
        let (x, y, z, multiprocessor) = (place & 0xffff, place >> 16 & 0xfff, place >> 28 & 0xff, place >> 36 & 0xfff);
        let _ = writeln!(text, "{name},{x},{y},{z},{multiprocessor},{start},{waited},{end}");
    }
    std::fs::write(file, text)
        .map_err(|error| DeviceError::InvalidParameter(format!("{FILE}: cannot write {}: {error}", file.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_end_of_a_kernel_has_a_record_and_every_wait_a_time() {
        let ptx = ".version 8.0\n.visible .entry first(\n\t.param .u64 a\n)\n.maxntid 32, 1, 1\n{\n\t.reg .b32 \t%r<2>;\n\n\
                   \tmov.u32 %r1, 0;\n\tgriddepcontrol.wait;\n{\n\tbar.sync 0;\n}\n\t@%p bra $L;\n\tret;\n$L:\n\tret;\n}\n\
                   .func other()\n{\n\tret;\n}\n.visible .entry second(\n)\n{\n\tret;\n}\n";
        let (text, names) = instrument(ptx);
        assert_eq!(names, ["first", "second"]);
        assert_eq!(text.matches(".global .align 32").count(), 1);
        assert_eq!(text.matches("st.global.v2.u64").count(), 2 * 3, "two ends of the first, one of the second");
        assert_eq!(text.matches("mov.u64 %tl1, %globaltimer").count(), 1);
        assert_eq!(text.matches("mov.u64 %tl0, %globaltimer").count(), 2);
        let kept: Vec<&str> = ptx.lines().filter(|line| !text.lines().any(|other| other == *line)).collect();
        assert!(kept.is_empty(), "every line stays: {kept:?}");
    }

    #[test]
    fn records_are_written_in_the_order_of_their_ends() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("timeline.csv");
        let place = 1 << 48 | 131 << 36 | 3 << 28 | 2 << 16 | 7;
        let words = [[5_000_100, 5_000_200, 5_000_400, place], [5_000_000, 5_000_050, 5_000_300, 0], [1, 1, 2, 0]];
        write(words.as_flattened(), &["a".into(), "b".into()], &file).unwrap();
        let text = std::fs::read_to_string(file).unwrap();
        let lines: Vec<&str> = text.lines().skip(1).collect();
        assert_eq!(lines, ["a,0,0,0,0,0,50,300", "b,7,2,3,131,100,200,400"]);
    }
}
