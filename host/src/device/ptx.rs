//! Kernel images: choosing the one for a device, and checking that its entries are what the host calls.

use std::collections::{HashMap, HashSet};

use cuda_std::launch::KernelDesc;

/// The kernels compiled for one target.
#[derive(Clone, Copy, Debug)]
pub struct KernelImage<'a> {
    /// The target as major * 10 + minor: 80 for `sm_80`.
    pub sm: u32,
    /// True for a target such as `sm_90a`, which runs on exactly that compute capability.
    pub arch_specific: bool,
    /// The PTX text.
    pub ptx: &'a str,
}

impl KernelImage<'_> {
    /// Its name, such as `sm_90a`.
    #[must_use]
    pub fn name(&self) -> String {
        format!("sm_{}{}", self.sm, if self.arch_specific { "a" } else { "" })
    }
}

/// The same kernels compiled for several targets.
#[derive(Clone, Copy, Debug)]
pub struct KernelImages<'a> {
    /// In any order.
    pub images: &'a [KernelImage<'a>],
}

impl<'a> KernelImages<'a> {
    /// The best image for a compute capability of major * 10 + minor: the specific one of exactly that architecture,
    /// else the highest general one that is not above it.
    #[must_use]
    pub fn select(&self, capability: u32) -> Option<&'a KernelImage<'a>> {
        let runs = |image: &&KernelImage<'_>| {
            if image.arch_specific { image.sm == capability } else { image.sm <= capability }
        };
        self.images.iter().filter(runs).max_by_key(|image| (image.arch_specific, image.sm))
    }
}

/// The text without the entries that are not in `kernels`: compiling PTX takes time in proportion to its length.
pub(super) fn only(ptx: &str, kernels: &[&KernelDesc]) -> String {
    let mut text = String::with_capacity(ptx.len());
    let mut left_out = false;
    for line in ptx.lines() {
        if let Some((_, rest)) = line.split_once(".entry ") {
            let name = rest.split(|c: char| c == '(' || c.is_whitespace()).next().unwrap_or_default();
            left_out = !kernels.iter().any(|kernel| kernel.name == name);
        }
        if !left_out {
            text.push_str(line);
            text.push('\n');
        }
        // A body ends with a brace of its own line, not indented.
        left_out &= line != "}";
    }
    text
}

/// The entries of a PTX text with the bytes of their parameters.
pub(super) fn entries(ptx: &str) -> HashMap<&str, Vec<usize>> {
    let mut entries = HashMap::new();
    for part in ptx.split(".entry").skip(1) {
        let head = part.split('{').next().unwrap_or_default();
        let (name, parameters) = match head.split_once('(') {
            Some((name, rest)) => (name, rest.split(')').next().unwrap_or_default()),
            None => (head, ""),
        };
        let name = name.split_whitespace().next().unwrap_or_default();
        let sizes = parameters.split(',').filter(|text| !text.trim().is_empty()).map(parameter_bytes).collect();
        entries.insert(name, sizes);
    }
    entries
}

/// The entries that wait for their predecessors themselves, and may so be launched while those still run.
pub(super) fn waiting_entries(ptx: &str) -> HashSet<&str> {
    let waits = |body: &&str| body.contains("griddepcontrol.wait;");
    let name = |body: &'_ str| body.split(|c: char| c == '(' || c.is_whitespace()).next().unwrap_or_default().len();
    ptx.split(".entry ").skip(1).filter(waits).map(|body| &body[..name(body)]).collect()
}

/// The bytes of one declaration, such as `.param .u64 .ptr .align 1 add_param_0` or `.param .align 8 .b8 add_param_2[16]`;
/// 0 for what is not understood, which equals no size that the host expects.
fn parameter_bytes(declaration: &str) -> usize {
    let mut words = declaration.split_whitespace().filter(|&word| word != ".param");
    let mut element = 0;
    let mut name = "";
    while let Some(word) = words.next() {
        match word {
            ".align" => {
                words.next();
            }
            ".ptr" | ".global" | ".shared" | ".const" | ".local" => {}
            _ => match word.strip_prefix('.') {
                // The number at the end of a type, such as f32, is its bits.
                Some(ty) => {
                    let bits: usize = ty.trim_start_matches(|c: char| c.is_ascii_alphabetic()).parse().unwrap_or(0);
                    element = bits / 8;
                }
                None => name = word,
            },
        }
    }
    let count = match name.split_once('[') {
        Some((_, rest)) => rest.trim_end_matches(']').parse().unwrap_or(0),
        None => 1,
    };
    element * count
}

/// Checks that every kernel of the table is in the PTX with parameters of the sizes that its descriptor names.
pub(super) fn check(ptx: &str, kernels: &[&KernelDesc]) -> Result<(), String> {
    let entries = entries(ptx);
    let mut faults = Vec::new();
    for kernel in kernels {
        let expected: Vec<usize> = kernel.ptx_param_bytes().collect();
        match entries.get(kernel.name) {
            None => faults.push(format!("{} is missing", kernel.name)),
            Some(found) if *found != expected => {
                faults.push(format!("{} takes parameters of {found:?} bytes, not {expected:?}", kernel.name));
            }
            Some(_) => {}
        }
    }
    if faults.is_empty() {
        Ok(())
    } else {
        Err(format!("the kernel image is not the one this program was built with: {}; rebuild it", faults.join("; ")))
    }
}

#[cfg(test)]
mod tests {
    use cuda_std::launch::{Access, ParamDesc, ParamKind};

    use super::*;

    const BUFFER: ParamKind = ParamKind::Buffer { element: "f32", access: Access::Read };
    const ADD: KernelDesc = KernelDesc {
        name: "add",
        block: 32,
        params: &[
            ParamDesc { name: "x", kind: BUFFER },
            ParamDesc { name: "scale", kind: ParamKind::Scalar { bytes: 4 } },
            ParamDesc { name: "seed", kind: ParamKind::Scalar { bytes: 8 } },
        ],
        entry: |_| {},
    };
    const EMPTY: KernelDesc = KernelDesc { name: "empty", block: 32, params: &[], entry: |_| {} };
    #[test]
    fn who_waits() {
        let ptx = ".visible .entry a(\n)\n{\n\tgriddepcontrol.wait;\n}\n.entry b\n{\n\tret;\n}\n.entry c(.param .u32 x)\n{\n\
                   griddepcontrol.launch_dependents;\n}\n.entry d {\ngriddepcontrol.wait;\n}\n";
        assert_eq!(waiting_entries(ptx), HashSet::from(["a", "d"]));
    }

    const STRUCTURE: KernelDesc = KernelDesc {
        name: "structure",
        block: 32,
        params: &[ParamDesc { name: "x", kind: ParamKind::Scalar { bytes: 16 } }],
        entry: |_| {},
    };

    const PTX: &str = "
.version 8.0
.target sm_80
.address_size 64

\t// .globl\tadd
.visible .entry add(
\t.param .u64 .ptr .align 1 add_param_0,
\t.param .b64 add_param_1,
\t.param .f32 add_param_2,
\t.param .u64 add_param_3
)
.maxntid 256, 1, 1
{
\t.reg .b32 \t%r<9>;
\tld.param.u64 \t%rd1, [add_param_0];
\tret;
}
.visible .entry empty()
{
\tret;
}
.visible .entry structure(
\t.param .align 8 .b8 structure_param_0[16]
)
{
\tret;
}
";

    #[test]
    fn entries_and_sizes_are_read() {
        let entries = entries(PTX);
        assert_eq!(entries.len(), 3);
        assert_eq!(entries["add"], [8, 8, 4, 8]);
        assert!(entries["empty"].is_empty());
        assert_eq!(entries["structure"], [16]);
    }

    #[test]
    fn what_fits_passes() {
        assert_eq!(check(PTX, &[&ADD, &EMPTY, &STRUCTURE]), Ok(()));
        assert_eq!(check(PTX, &[]), Ok(()));
    }

    #[test]
    fn every_fault_is_named() {
        const ABSENT: KernelDesc = KernelDesc { name: "absent", ..EMPTY };
        const WIDER: KernelDesc = KernelDesc { name: "structure", ..ADD };
        let text = check(PTX, &[&ADD, &ABSENT, &WIDER]).unwrap_err();
        assert!(text.contains("absent is missing"), "{text}");
        assert!(text.contains("structure takes parameters of [16] bytes, not [8, 8, 4, 8]"), "{text}");
        assert!(!text.contains("add is"), "{text}");
        let smaller = PTX.replace(".param .u64 add_param_3", ".param .u32 add_param_3");
        assert!(check(&smaller, &[&ADD]).unwrap_err().contains("add takes parameters of [8, 8, 4, 4]"));
        let fewer = PTX.replace(",\n\t.param .u64 add_param_3", "");
        assert!(check(&fewer, &[&ADD]).is_err());
        let renamed = PTX.replace("entry add(", "entry added(");
        assert!(check(&renamed, &[&ADD]).unwrap_err().contains("add is missing"));
    }

    #[test]
    fn an_unknown_type_fits_nothing() {
        assert!(check(&PTX.replace(".param .f32 add", ".param .pred add"), &[&ADD]).is_err());
    }

    #[test]
    fn the_image_suits_the_device() {
        let image = |sm, arch_specific| KernelImage { sm, arch_specific, ptx: "" };
        let all = [image(80, false), image(90, true), image(100, false)];
        let images = KernelImages { images: &all };
        let name = |capability| images.select(capability).map(KernelImage::name);
        assert_eq!(name(75), None);
        assert_eq!(name(80).as_deref(), Some("sm_80"));
        assert_eq!(name(89).as_deref(), Some("sm_80"));
        assert_eq!(name(90).as_deref(), Some("sm_90a"));
        assert_eq!(name(100).as_deref(), Some("sm_100"));
        assert_eq!(name(120).as_deref(), Some("sm_100"));
        assert!(KernelImages { images: &[] }.select(90).is_none());
    }

    #[test]
    fn entries_that_are_not_asked_for_are_left_out() {
        let text = ".version 7.4\n.func helper()\n{\n\tret;\n}\n.visible .entry keep(\n\t.param .u32 keep_0\n)\n{\n\tret;\n}\n\
                    .visible .entry keep_not(\n\t.param .u32 p\n)\n{\n\tret;\n}\n// end\n";
        let keep = KernelDesc { name: "keep", block: 32, params: &[], entry: |_| {} };
        let short = only(text, &[&keep]);
        assert_eq!(entries(&short).into_keys().collect::<Vec<_>>(), ["keep"]);
        assert!(short.contains(".func helper") && short.ends_with("// end\n") && !short.contains("keep_not"));
        assert_eq!(only(text, &[]).matches("ret;").count(), 1, "the helper stays");
    }
}
