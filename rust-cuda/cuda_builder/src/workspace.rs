//! This repository's kernels, and the three commands of the program `ptx`.

use std::collections::BTreeMap;
use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use crate::build::{missing_and_extra, write_committed};
use crate::{
    Builder, Entry, Error, Freshness, Manifest, ManifestKernel, Module, Ptxas, Sources, Target, Usage,
    declared_kernels, declared_parameters, entries, overlap_faults, overlaps, parse_early_uses,
};

/// The folder of the committed PTX, from the repository's root.
pub const COMMITTED: &str = "kernels-gpu/ptx";

/// What kernels may do before they wait for the kernels ahead, from the repository's root.
pub const EARLY_USES: &str = "kernels-gpu/overlap.txt";

/// The GPUs whose PTX is committed. Drivers from 470 on load the first, from 525 on the second.
#[must_use]
pub fn released_targets() -> Vec<Target> {
    // ptx74 brings the cache hints of `ld.global`, ptx80 the instructions of sm_90a.
    vec![Target::new("sm_80", "ptx74"), Target::new("sm_90a", "ptx80")]
}

/// The GPUs that every kernel must assemble for without a spill.
#[must_use]
pub fn gate_targets() -> Vec<Target> {
    let mut targets = released_targets();
    targets.extend([Target::new("sm_100", "ptx86"), Target::new("sm_120", "ptx87")]);
    targets
}

/// The builder of `kernels-gpu` below the repository's root, for the released GPUs.
pub fn builder(root: &Path, work: impl Into<PathBuf>) -> Builder {
    // The CPU executor and the launch descriptors never reach the GPU.
    let sources = Sources::new(root)
        .include("kernels-gpu/Cargo.toml")
        .include("kernels-gpu/src")
        .include("rust-cuda/cuda_std/Cargo.toml")
        .include("rust-cuda/cuda_std/src")
        .include("rust-cuda/cuda_std_macros/Cargo.toml")
        .include("rust-cuda/cuda_std_macros/src")
        .exclude("rust-cuda/cuda_std/src/cpu")
        .exclude("rust-cuda/cuda_std/src/cpu.rs")
        .exclude("rust-cuda/cuda_std/src/launch.rs");
    Builder::new(root.join("kernels-gpu"), "kernels_gpu", sources, work)
        .targets(released_targets())
        .committed(root.join(COMMITTED))
}

/// Where a build script may keep what it compiles: beside the host's profiles, so that they share it.
#[must_use]
pub fn work_folder(out_dir: &Path) -> PathBuf {
    // Cargo keeps these files at the top of its target folder; without them, the script's own folder does.
    let is_top = |folder: &&Path| [".rustc_info.json", "CACHEDIR.TAG"].iter().any(|file| folder.join(file).is_file());
    let top = out_dir.ancestors().find(is_top);
    top.unwrap_or(out_dir).join("ptx")
}

/// Where the program `ptx` keeps what it compiles: `ptx` in cargo's target folder.
#[must_use]
pub fn default_work_folder(root: &Path) -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |folder| root.join(folder)).join("ptx")
}

/// Compiles the kernels and rewrites the committed PTX.
///
/// # Errors
/// They do not compile, or the PTX has not the kernels that the sources declare.
pub fn build(root: &Path, work: &Path) -> Result<String, Error> {
    let builder = builder(root, work);
    let (toolchain, modules) = builder.compile()?;
    for module in &modules {
        let faults = missing_and_extra(&declared_kernels(&root.join("kernels-gpu/src"))?, &module.entries);
        if !faults.is_empty() {
            return Err(Error::Ptx { target: module.target.cpu.clone(), faults });
        }
    }
    write_committed(&root.join(COMMITTED), &builder.manifest(&toolchain, &modules)?, &modules)?;
    let targets: Vec<&str> = modules.iter().map(|module| module.target.cpu.as_str()).collect();
    let kernels = modules.first().map_or(0, |module| module.entries.len());
    Ok(format!("{COMMITTED}: {kernels} kernels for {} by {}", targets.join(" and "), toolchain.version))
}

/// Compiles the kernels aside and compares the committed PTX: byte for byte when the same compiler made it, else by
/// the kernels' names, parameters and block sizes.
///
/// # Errors
/// The committed PTX is stale, is not what the sources give, or nothing can be compiled.
pub fn check(root: &Path, work: &Path) -> Result<String, Error> {
    let builder = builder(root, work);
    let refused = |faults: Vec<String>| Error::Ptx { target: "the released GPUs".into(), faults };
    // Missing kernels first: it is the reason that helps most.
    let declared = declared_kernels(&root.join("kernels-gpu/src"))?;
    let committed = read_committed(&root.join(COMMITTED))?;
    let faults = kernel_faults(&declared, &committed);
    if !faults.is_empty() {
        return Err(refused(faults));
    }
    let manifest = match builder.freshness()? {
        Freshness::Fresh(manifest) => manifest,
        Freshness::Stale(reason) => return Err(refused(vec![format!("stale: {reason}"), REBUILD.to_owned()])),
    };
    let mut faults = Vec::new();
    for (target, ptx) in &committed {
        faults.extend(early_faults(root, target, ptx)?.1);
    }
    if !faults.is_empty() {
        return Err(refused(faults));
    }

    let (toolchain, modules) = builder.compile()?;
    let same_compiler = toolchain.version == manifest.compiler;
    let faults = compiled_faults(&committed, &manifest, &modules, same_compiler);
    if !faults.is_empty() {
        return Err(refused(faults));
    }
    let kernels = declared.len();
    Ok(if same_compiler {
        format!(
            "{COMMITTED} is fresh: {kernels} kernels, byte for byte what {} makes of the sources",
            manifest.compiler
        )
    } else {
        format!(
            "{COMMITTED} is fresh: its source hash is right, and {kernels} kernels have the names, parameters and block \
             sizes that {} gives. The bytes were not compared, because {} made them",
            toolchain.version, manifest.compiler
        )
    })
}

const REBUILD: &str = "rebuild it: cargo run -p lockstep-cuda-builder --bin ptx -- build";

/// The committed text of each released GPU.
fn read_committed(folder: &Path) -> Result<Vec<(Target, String)>, Error> {
    let read = |target: Target| {
        let path = folder.join(target.file());
        Ok((target, fs::read_to_string(&path).map_err(Error::io("read", &path))?))
    };
    released_targets().into_iter().map(read).collect()
}

/// Kernels that the sources declare and committed PTX lacks, or the other way round.
fn kernel_faults(declared: &BTreeMap<String, String>, committed: &[(Target, String)]) -> Vec<String> {
    let mut faults = Vec::new();
    for (target, ptx) in committed {
        match entries(ptx) {
            Ok(found) => faults
                .extend(missing_and_extra(declared, &found).into_iter().map(|f| format!("{}: {f}", target.file()))),
            Err(fault) => faults.push(format!("{}: {fault}", target.file())),
        }
    }
    faults
}

/// How committed PTX differs from what was compiled now.
fn compiled_faults(
    committed: &[(Target, String)],
    manifest: &Manifest,
    modules: &[Module],
    same_compiler: bool,
) -> Vec<String> {
    let mut faults = Vec::new();
    for module in modules {
        let file = module.target.file();
        let Some((_, text)) = committed.iter().find(|(target, _)| *target == module.target) else {
            faults.push(format!("{file} is not committed"));
            continue;
        };
        if same_compiler && *text != module.ptx {
            let same = text.lines().zip(module.ptx.lines()).take_while(|(old, new)| old == new).count();
            faults.push(format!("{file} is not what the same compiler makes of the sources, from line {}", same + 1));
        }
        if entries(text).as_ref() != Ok(&module.entries) {
            faults.push(format!("{file}: a kernel's parameters or block size are not those of the sources"));
        }
        if !module.entries.iter().map(ManifestKernel::from).eq(manifest.kernels.iter().cloned()) {
            faults.push(format!("{}: its kernels are not those of {file}", Manifest::FILE));
        }
    }
    if !faults.is_empty() {
        faults.push(REBUILD.to_owned());
    }
    faults
}

/// How many kernels of a target's PTX overlap with those ahead, and what they do too early: see [`overlaps`].
///
/// # Errors
/// The sources, or the table [`EARLY_USES`], do not read.
pub fn early_faults(root: &Path, target: &Target, ptx: &str) -> Result<(usize, Vec<String>), Error> {
    // Older GPUs run one kernel after the other.
    if sm(target) < 90 {
        return Ok((0, Vec::new()));
    }
    let path = root.join(EARLY_USES);
    let text = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
    let table = parse_early_uses(&text).map_err(|reason| Error::Source(format!("{EARLY_USES}, {reason}")))?;
    let parameters = declared_parameters(&root.join("kernels-gpu/src"))?;
    let cpu = &target.cpu;
    let found = match overlaps(ptx) {
        Ok(found) => found,
        Err(reason) => return Ok((0, vec![format!("{cpu}: {reason}")])),
    };
    let faults = overlap_faults(&found, &table, &parameters);
    Ok((found.len(), faults.into_iter().map(|fault| format!("{cpu}: {fault}")).collect()))
}

/// 90 of `sm_90a`.
fn sm(target: &Target) -> u32 {
    let digits: String = target.cpu.chars().filter(char::is_ascii_digit).collect();
    digits.parse().unwrap_or(0)
}

/// Compiles the kernels for every GPU of [`gate_targets`] and assembles each with ptxas: a table, and the faults.
///
/// # Errors
/// Something does not compile or assemble.
pub fn gate(root: &Path, work: &Path) -> Result<(String, Vec<String>), Error> {
    let ptxas = Ptxas::find()?;
    let declared = declared_kernels(&root.join("kernels-gpu/src"))?;
    let (toolchain, modules) = builder(root, work).targets(gate_targets()).compile()?;
    let (mut table, mut faults) = (format!("compiled by {}\n", toolchain.version), Vec::new());
    for module in &modules {
        let path = work.join(format!("gate-{}", module.target.file()));
        fs::write(&path, &module.ptx).map_err(Error::io("write", &path))?;
        let usage = ptxas.report(&path, &module.target.cpu)?;
        table.push_str(&usage_table(&module.target, &usage));
        faults.extend(gate_faults(&declared, module, &usage));
        let (overlapping, early) = early_faults(root, &module.target, &module.ptx)?;
        let _ = writeln!(
            table,
            "{overlapping} kernels overlap with those ahead; {} of their uses are too early",
            early.len()
        );
        faults.extend(early);
    }
    let _ = write!(table, "\n{} kernels for {} GPUs", declared.len(), modules.len());
    Ok((table, faults))
}

/// One GPU's rows.
fn usage_table(target: &Target, usage: &[Usage]) -> String {
    let width = usage.iter().map(|kernel| kernel.kernel.len()).max().unwrap_or(0).max(6);
    let mut table = format!(
        "\n{} ({})\n{:width$}  registers  shared B  spill store B  spill load B  stack B\n",
        target.cpu, target.isa, "kernel"
    );
    let mut rows: Vec<&Usage> = usage.iter().collect();
    rows.sort_by(|a, b| a.kernel.cmp(&b.kernel));
    for row in rows {
        // Writing to a String cannot fail.
        let _ = writeln!(
            table,
            "{:width$}  {:>9}  {:>8}  {:>13}  {:>12}  {:>7}",
            row.kernel, row.registers, row.shared_bytes, row.spill_store_bytes, row.spill_load_bytes, row.stack_bytes
        );
    }
    table
}

/// Spills, and kernels that the sources, the PTX and ptxas do not agree on.
fn gate_faults(declared: &BTreeMap<String, String>, module: &Module, usage: &[Usage]) -> Vec<String> {
    let cpu = &module.target.cpu;
    let mut faults = missing_and_extra(declared, &module.entries);
    let is_assembled = |entry: &&Entry| usage.iter().any(|kernel| kernel.kernel == entry.name);
    let lost = module.entries.iter().filter(|entry| !is_assembled(entry));
    faults.extend(lost.map(|entry| format!("kernel {} is in the PTX and ptxas does not report it", entry.name)));
    faults.extend(usage.iter().filter(|kernel| kernel.spill_store_bytes + kernel.spill_load_bytes > 0).map(|kernel| {
        format!(
            "kernel {} spills: {} bytes stored, {} bytes loaded per thread",
            kernel.kernel, kernel.spill_store_bytes, kernel.spill_load_bytes
        )
    }));
    faults.into_iter().map(|fault| format!("{cpu}: {fault}")).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use std::ops::Deref;
    use std::process;

    use super::*;
    use crate::{Search, add_block_sizes, parse_usage};

    /// A folder of one test's own, gone when the test ends.
    pub(crate) struct Scratch(PathBuf);

    pub(crate) fn scratch(name: &str) -> Scratch {
        let folder = env::temp_dir().join(format!("lockstep-cuda-builder-{}-{name}", process::id()));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        Scratch(folder)
    }

    impl Deref for Scratch {
        type Target = Path;

        fn deref(&self) -> &Path {
            &self.0
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    const SAMPLE: &str = include_str!("../tests/data/sample.ptx");

    fn sample_modules() -> Vec<Module> {
        let ptx = add_block_sizes(SAMPLE).unwrap();
        let module = |target| Module { target, entries: entries(&ptx).unwrap(), ptx: ptx.clone() };
        released_targets().into_iter().map(module).collect()
    }

    fn sample_declared() -> BTreeMap<String, String> {
        ["by_value", "empty", "scale"].map(|name| (name.to_owned(), format!("src/{name}.rs:1"))).into()
    }

    /// A repository with committed PTX that is fresh.
    fn repository(name: &str) -> Scratch {
        let root = scratch(name);
        for folder in ["kernels-gpu", "rust-cuda/cuda_std", "rust-cuda/cuda_std_macros"] {
            fs::create_dir_all(root.join(folder).join("src/cpu")).unwrap();
            fs::write(root.join(folder).join("Cargo.toml"), "[package]\n").unwrap();
            fs::write(root.join(folder).join("src/lib.rs"), "//! Nothing.\n").unwrap();
        }
        let modules = sample_modules();
        let toolchain = crate::Toolchain {
            rustc: "rustc".into(),
            cargo: "cargo".into(),
            version: "rustc 1.96.0 (0123abcd 2026-01-02), LLVM 22.1.8".into(),
            sysroot: "/usr".into(),
            needs_bootstrap: true,
        };
        let manifest = builder(&root, root.join("work")).manifest(&toolchain, &modules).unwrap();
        write_committed(&root.join(COMMITTED), &manifest, &modules).unwrap();
        root
    }

    fn stale_reason(root: &Path) -> String {
        match builder(root, root.join("work")).freshness().unwrap() {
            Freshness::Stale(reason) => reason,
            Freshness::Fresh(_) => panic!("fresh"),
        }
    }

    #[test]
    fn what_is_compiled_lies_at_the_top_of_the_target_folder() {
        let target = scratch("work-folder");
        let out_dir = target.join("debug/build/lockstep-0123/out");
        fs::create_dir_all(&out_dir).unwrap();
        assert_eq!(work_folder(&out_dir), out_dir.join("ptx"));
        fs::write(target.join(".rustc_info.json"), "{}").unwrap();
        assert_eq!(work_folder(&out_dir), target.join("ptx"));
    }

    #[test]
    fn fresh_ptx_is_used_without_a_compiler() {
        let root = repository("fresh");
        let built = builder(&root, root.join("work")).search(Search::default()).build().unwrap();
        assert_eq!(built.compiled, None);
        let files: Vec<_> = built.files.iter().map(|(target, path)| (target.cpu.as_str(), path.clone())).collect();
        assert_eq!(
            files,
            [("sm_80", root.join("kernels-gpu/ptx/sm_80.ptx")), ("sm_90a", root.join("kernels-gpu/ptx/sm_90a.ptx"))]
        );
        assert!(!root.join("work").exists(), "something was compiled");
    }

    #[test]
    fn one_byte_of_a_source_makes_it_stale_and_without_a_compiler_an_error() {
        for source in ["kernels-gpu/src/lib.rs", "kernels-gpu/Cargo.toml", "rust-cuda/cuda_std_macros/src/lib.rs"] {
            let root = repository("stale-source");
            let path = root.join(source);
            let mut text = fs::read(&path).unwrap();
            text[0] ^= 1;
            fs::write(&path, text).unwrap();
            assert!(stale_reason(&root).contains("sources changed"), "{source}");
            let error = builder(&root, root.join("work")).search(Search::default()).build().unwrap_err().to_string();
            assert!(error.contains("sources changed") && error.contains("apt-get install rustc-web"), "{error}");
        }
    }

    #[test]
    fn code_of_the_cpu_side_does_not_make_it_stale() {
        let root = repository("cpu-side");
        for source in ["rust-cuda/cuda_std/src/cpu/mod.rs", "rust-cuda/cuda_std/src/launch.rs"] {
            fs::write(root.join(source), "// new\n").unwrap();
        }
        assert!(matches!(builder(&root, root.join("work")).freshness().unwrap(), Freshness::Fresh(_)));
    }

    #[test]
    fn a_damaged_or_absent_file_makes_it_stale() {
        let root = repository("stale-file");
        let ptx = root.join("kernels-gpu/ptx/sm_90a.ptx");
        let text = fs::read_to_string(&ptx).unwrap();
        fs::write(&ptx, text.replacen("ret;", "nop;", 1)).unwrap();
        assert!(stale_reason(&root).contains("sm_90a.ptx is not what its manifest says"));
        fs::remove_file(&ptx).unwrap();
        assert!(stale_reason(&root).contains("cannot be read"));
        fs::write(root.join("kernels-gpu/ptx/manifest.txt"), "format 2\n").unwrap();
        assert!(stale_reason(&root).contains("line 1"));
        fs::remove_file(root.join("kernels-gpu/ptx/manifest.txt")).unwrap();
        assert!(stale_reason(&root).contains("has no manifest.txt"));
    }

    #[test]
    fn ptx_for_another_version_of_the_language_is_stale() {
        let root = repository("stale-isa");
        let newer = vec![Target::new("sm_80", "ptx81")];
        let reason = builder(&root, root.join("work")).targets(newer).freshness().unwrap();
        assert_eq!(reason, Freshness::Stale("the committed PTX for sm_80 is ptx74 in sm_80.ptx".into()));
    }

    #[test]
    fn a_missing_kernel_and_an_extra_one_are_named() {
        let committed: Vec<_> = sample_modules().into_iter().map(|module| (module.target, module.ptx)).collect();
        assert_eq!(kernel_faults(&sample_declared(), &committed), Vec::<String>::new());

        let mut declared = sample_declared();
        declared.insert("planted".into(), "src/planted.rs:7".into());
        declared.remove("scale");
        assert_eq!(
            kernel_faults(&declared, &committed[..1]),
            [
                "sm_80.ptx: kernel planted (src/planted.rs:7) is missing from the PTX",
                "sm_80.ptx: kernel scale is in the PTX and in no source",
            ]
        );
    }

    #[test]
    fn committed_ptx_that_differs_from_the_compiled_is_refused() {
        let modules = sample_modules();
        let manifest =
            Manifest { kernels: modules[0].entries.iter().map(ManifestKernel::from).collect(), ..Manifest::default() };
        let mut committed: Vec<_> = modules.iter().map(|module| (module.target.clone(), module.ptx.clone())).collect();
        assert_eq!(compiled_faults(&committed, &manifest, &modules, true), Vec::<String>::new());

        committed[0].1 = committed[0].1.replacen("ret;", "nop;", 1);
        let faults = compiled_faults(&committed, &manifest, &modules, true);
        assert!(faults[0].starts_with("sm_80.ptx is not what the same compiler makes"), "{faults:?}");
        // Another compiler's bytes differ by right.
        assert_eq!(compiled_faults(&committed, &manifest, &modules, false), Vec::<String>::new());
        // Its parameters do not.
        committed[1].1 = committed[1].1.replacen(".param .u16 by_value", ".param .u32 by_value", 1);
        let faults = compiled_faults(&committed, &manifest, &modules, false);
        assert!(faults[0].starts_with("sm_90a.ptx: a kernel's parameters"), "{faults:?}");
        assert_eq!(compiled_faults(&committed, &Manifest::default(), &modules, false).len(), 4);
    }

    #[test]
    fn kernels_wait_in_time_in_the_committed_ptx() {
        let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
        for (target, ptx) in read_committed(&root.join(COMMITTED)).unwrap() {
            let (overlapping, faults) = early_faults(root, &target, &ptx).unwrap();
            assert_eq!(faults, Vec::<String>::new());
            assert_eq!(overlapping > 20, target.cpu == "sm_90a", "{overlapping} for {}", target.cpu);
            // The same text, with no kernel that waits.
            let never = ptx.replace("griddepcontrol.wait;", "");
            let (overlapping_still, faults) = early_faults(root, &target, &never).unwrap();
            assert!(overlapping_still <= overlapping && faults.len() >= overlapping, "{faults:?}");
        }
    }

    #[test]
    fn a_spill_is_a_fault_of_the_gate() {
        let module = &sample_modules()[0];
        let usage = |kernel: &str| Usage { kernel: kernel.into(), registers: 8, ..Usage::default() };
        let mut all = ["by_value", "empty", "scale"].map(usage);
        assert_eq!(gate_faults(&sample_declared(), module, &all), Vec::<String>::new());
        all[2].spill_load_bytes = 4;
        assert_eq!(
            gate_faults(&sample_declared(), module, &all),
            ["sm_80: kernel scale spills: 0 bytes stored, 4 bytes loaded per thread"]
        );
        assert_eq!(
            gate_faults(&sample_declared(), module, &all[..2]),
            ["sm_80: kernel scale is in the PTX and ptxas does not report it"]
        );
        let table = usage_table(&module.target, &parse_usage(include_str!("../tests/data/ptxas-v.txt")));
        assert!(table.contains("spills         32         0            228           228      232"), "{table}");
    }
}
