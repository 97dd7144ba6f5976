//! Reads just enough PTX to find the entries, their parameters and their calls, and to add each entry's block size.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// The comment that `#[kernel(block = N)]` leaves in the body of its entry, before N.
const BLOCK_MARKER: &str = "// lockstep.block ";

/// The comment that asks for at least so many blocks at a time on a multiprocessor. A kernel that says 1 may take all
/// registers; one that says nothing leaves the choice to ptxas, which for some GPUs spills to fit more blocks.
const MIN_BLOCKS_MARKER: &str = "// lockstep.min_blocks ";

/// The comment that asks for clusters of so many blocks.
const CLUSTER_MARKER: &str = "// lockstep.cluster ";

/// The most threads that a block can have on any GPU, and more blocks than a multiprocessor holds.
const MAX_BLOCK: u32 = 1024;

/// One kernel of a PTX module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The name the host loads it by.
    pub name: String,
    /// The size of each parameter in bytes, in order.
    pub param_bytes: Vec<u32>,
    /// Threads per block, from the marker; `None` when there is no marker.
    pub block: Option<u32>,
}

/// An `.entry` or `.func`, by where it stands in the text.
pub(crate) struct Function<'a> {
    pub name: &'a str,
    pub is_entry: bool,
    /// From the directive up to the `{` or `;`.
    pub header: Range<usize>,
    /// Between the braces; `None` for a declaration.
    pub body: Option<Range<usize>>,
}

/// Every function of the module, in order.
pub(crate) fn functions(ptx: &str) -> Vec<Function<'_>> {
    let mut functions = Vec::new();
    let mut line_start = 0;
    while line_start < ptx.len() {
        let line_end = ptx[line_start..].find('\n').map_or(ptx.len(), |length| line_start + length);
        let code = ptx[line_start..line_end].split("//").next().unwrap_or("");
        let directive = words(code).find(|word| matches!(*word, ".entry" | ".func"));
        line_start = match directive.and_then(|word| function(ptx, line_start, word)) {
            Some((found, end)) => {
                functions.push(found);
                end
            }
            None => line_end + 1,
        };
    }
    functions
}

/// The function whose directive `.entry` or `.func` stands in the line at `line_start`, and where its text ends.
fn function<'a>(ptx: &'a str, line_start: usize, directive: &str) -> Option<(Function<'a>, usize)> {
    let after = line_start + ptx[line_start..].find(directive)? + directive.len();
    let header_end = after + ptx[after..].find(['{', ';'])?;
    let mut rest = ptx[after..header_end].trim_start();
    if rest.starts_with('(') {
        // The returned value, as in `.func  (.param .b32 func_retval0) name`.
        rest = &rest[rest.find(')')? + 1..];
    }
    let name = words(rest).next()?;
    let mut end = header_end + 1;
    let mut body = None;
    if ptx.as_bytes()[header_end] == b'{' {
        end = closing_brace(ptx, header_end)? + 1;
        body = Some(header_end + 1..end - 1);
    }
    Some((Function { name, is_entry: directive == ".entry", header: line_start..header_end, body }, end))
}

/// Where the brace that opens at `open` closes; comments do not count.
fn closing_brace(ptx: &str, open: usize) -> Option<usize> {
    let bytes = ptx.as_bytes();
    let (mut depth, mut at) = (0usize, open);
    while at < bytes.len() {
        match bytes[at] {
            b'/' if bytes.get(at + 1) == Some(&b'/') => at += ptx[at..].find('\n')?,
            b'{' => depth += 1,
            b'}' if depth == 1 => return Some(at),
            b'}' => depth -= 1,
            _ => {}
        }
        at += 1;
    }
    None
}

/// The identifiers and directives of a text.
fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !(c.is_ascii_alphanumeric() || matches!(c, '_' | '$' | '%' | '.'))).filter(|w| !w.is_empty())
}

/// The parameters' sizes, from a header such as `.visible .entry f(.param .u64 .ptr .align 1 f_param_0, ...)`.
fn param_bytes(header: &str) -> Result<Vec<u32>, String> {
    let (Some(open), Some(close)) = (header.find('('), header.rfind(')')) else { return Ok(Vec::new()) };
    header[open + 1..close].split(',').map(str::trim).filter(|text| !text.is_empty()).map(one_param_bytes).collect()
}

fn one_param_bytes(text: &str) -> Result<u32, String> {
    let unknown = || format!("parameter `{text}` has a type of unknown size");
    let width = words(text).find_map(|word| match word {
        ".b8" | ".u8" | ".s8" => Some(1),
        ".b16" | ".u16" | ".s16" | ".f16" | ".bf16" => Some(2),
        ".b32" | ".u32" | ".s32" | ".f32" | ".f16x2" => Some(4),
        ".b64" | ".u64" | ".s64" | ".f64" => Some(8),
        ".b128" => Some(16),
        _ => None,
    });
    let count = match (text.find('['), text.find(']')) {
        (Some(open), Some(close)) if open < close => text[open + 1..close].parse().map_err(|_| unknown())?,
        _ => 1,
    };
    Ok(width.ok_or_else(unknown)? * count)
}

/// The number behind a marker in an entry's body: one marker, or several that agree (a compiler may copy code).
fn marked(body: &str, marker: &str) -> Result<Option<u32>, String> {
    let what = marker.trim_start_matches("// ").trim_end();
    let mut number = None;
    for line in body.lines() {
        let Some((_, text)) = line.split_once(marker) else { continue };
        let value = text.trim().parse::<u32>().ok().filter(|value| (1..=MAX_BLOCK).contains(value));
        let value = value.ok_or_else(|| format!("{what} `{}` is not 1 to {MAX_BLOCK}", text.trim()))?;
        if let Some(other) = number.filter(|other| *other != value) {
            return Err(format!("{what} is both {other} and {value}"));
        }
        number = Some(value);
    }
    Ok(number)
}

/// The kernels of a PTX module, in the order of their names.
///
/// # Errors
/// An entry's parameters or block size do not read.
pub fn entries(ptx: &str) -> Result<Vec<Entry>, String> {
    let mut found = Vec::new();
    for function in functions(ptx) {
        let (true, Some(body)) = (function.is_entry, function.body) else { continue };
        let inside = |reason| format!("kernel {}: {reason}", function.name);
        found.push(Entry {
            name: function.name.to_owned(),
            param_bytes: param_bytes(&ptx[function.header]).map_err(inside)?,
            block: marked(&ptx[body], BLOCK_MARKER).map_err(inside)?,
        });
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// Adds `.maxntid N, 1, 1` to each entry, whose body holds the comment `// lockstep.block N`, and `.minnctapersm N` where it
/// holds `// lockstep.min_blocks N`, and `.reqnctapercluster N, 1, 1` where it holds `// lockstep.cluster N`; the rest stays as it is.
///
/// # Errors
/// Every entry that has no marker, more than one block size, or a `.maxntid` already.
pub fn add_block_sizes(ptx: &str) -> Result<String, Vec<String>> {
    let (mut text, mut copied, mut faults) = (String::with_capacity(ptx.len() + 1024), 0, Vec::new());
    for function in functions(ptx) {
        let (true, Some(body)) = (function.is_entry, function.body) else { continue };
        if ptx[function.header.clone()].contains(".maxntid") {
            faults.push(format!("kernel {} has a .maxntid already", function.name));
            continue;
        }
        let body = &ptx[body];
        let marks = marked(body, BLOCK_MARKER)
            .and_then(|block| Ok((block, marked(body, MIN_BLOCKS_MARKER)?, marked(body, CLUSTER_MARKER)?)));
        match marks {
            Ok((Some(block), min_blocks, cluster)) => {
                text.push_str(&ptx[copied..function.header.end]);
                if !text.ends_with('\n') {
                    text.push('\n');
                }
                text.push_str(&format!(".maxntid {block}, 1, 1\n"));
                if let Some(min_blocks) = min_blocks {
                    text.push_str(&format!(".minnctapersm {min_blocks}\n"));
                }
                if let Some(cluster) = cluster {
                    text.push_str(&format!(".explicitcluster\n.reqnctapercluster {cluster}, 1, 1\n"));
                }
                copied = function.header.end;
            }
            Ok((None, ..)) => faults.push(format!(
                "kernel {} does not say its block size: mark it #[kernel(block = THREADS)]",
                function.name
            )),
            Err(reason) => faults.push(format!("kernel {}: {reason}", function.name)),
        }
    }
    text.push_str(&ptx[copied..]);
    if faults.is_empty() { Ok(text) } else { Err(faults) }
}

/// Functions that are declared and called and defined nowhere, each in a sentence with the kernels that reach it.
/// The driver would refuse the whole module for one of them.
#[must_use]
pub fn undefined_calls(ptx: &str) -> Vec<String> {
    let functions = functions(ptx);
    let defined: BTreeSet<&str> = functions.iter().filter(|f| f.body.is_some()).map(|f| f.name).collect();
    let undefined: BTreeSet<&str> = functions.iter().map(|f| f.name).filter(|name| !defined.contains(name)).collect();
    if undefined.is_empty() {
        return Vec::new();
    }
    let mut callers: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for function in &functions {
        let Some(body) = function.body.clone() else { continue };
        for line in ptx[body].lines() {
            for word in words(line.split("//").next().unwrap_or("")) {
                if word != function.name && (defined.contains(word) || undefined.contains(word)) {
                    callers.entry(word).or_default().insert(function.name);
                }
            }
        }
    }
    let is_entry: BTreeSet<&str> = functions.iter().filter(|f| f.is_entry).map(|f| f.name).collect();
    undefined
        .into_iter()
        .map(|name| {
            let (mut reached, mut next) = (BTreeSet::from([name]), vec![name]);
            while let Some(callee) = next.pop() {
                for caller in callers.get(callee).into_iter().flatten() {
                    if reached.insert(caller) {
                        next.push(caller);
                    }
                }
            }
            let kernels: Vec<&str> = reached.intersection(&is_entry).copied().collect();
            let kernels = if kernels.is_empty() { "no kernel".to_owned() } else { kernels.join(", ") };
            format!("{name} is called and defined nowhere; called from kernel: {kernels}")
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What LLVM writes, shortened: a call through a function, a nested brace, an entry without parameters.
    const SAMPLE: &str = include_str!("../tests/data/sample.ptx");

    #[test]
    fn entries_have_their_parameters_and_block() {
        let entry = |name: &str, param_bytes: &[u32], block| Entry {
            name: name.into(),
            param_bytes: param_bytes.to_vec(),
            block: Some(block),
        };
        let expected = [entry("by_value", &[16, 2], 1024), entry("empty", &[], 32), entry("scale", &[8, 4, 4], 256)];
        assert_eq!(entries(SAMPLE).unwrap(), expected);
    }

    #[test]
    fn the_block_size_stands_between_parameters_and_body_and_nothing_else_changes() {
        let processed = add_block_sizes(SAMPLE).unwrap();
        assert!(processed.contains("scale_param_2\n)\n.maxntid 256, 1, 1\n{\n"), "{processed}");
        assert!(processed.contains(".visible .entry empty()\n.maxntid 32, 1, 1\n{"), "{processed}");
        assert_eq!(processed.matches(".maxntid").count(), 3);
        let without: String = processed.split_inclusive('\n').filter(|line| !line.starts_with(".maxntid")).collect();
        assert_eq!(without, SAMPLE);
    }

    #[test]
    fn an_entry_without_marker_or_with_two_is_named() {
        let text = SAMPLE.replacen("// lockstep.block 32\n", "// nothing\n", 1);
        assert_eq!(
            add_block_sizes(&text).unwrap_err(),
            ["kernel empty does not say its block size: mark it #[kernel(block = THREADS)]"]
        );
        let text = SAMPLE.replacen("// lockstep.block 32\n", "// lockstep.block 32\n// lockstep.block 64\n", 1);
        assert_eq!(add_block_sizes(&text).unwrap_err(), ["kernel empty: lockstep.block is both 32 and 64"]);
        let text = SAMPLE.replacen("// lockstep.block 32\n", "// lockstep.block 2048\n", 1);
        assert_eq!(add_block_sizes(&text).unwrap_err(), ["kernel empty: lockstep.block `2048` is not 1 to 1024"]);
        let twice = add_block_sizes(&add_block_sizes(SAMPLE).unwrap()).unwrap_err();
        assert_eq!(twice.len(), 3, "{twice:?}");
    }

    #[test]
    fn a_kernel_may_ask_for_its_blocks_per_multiprocessor() {
        let text = SAMPLE.replacen("// lockstep.block 256\n", "// lockstep.block 256\n// lockstep.min_blocks 1\n", 1);
        let processed = add_block_sizes(&text).unwrap();
        assert!(processed.contains(")\n.maxntid 256, 1, 1\n.minnctapersm 1\n{\n"), "{processed}");
        assert_eq!(processed.matches(".minnctapersm").count(), 1);
    }

    #[test]
    fn a_kernel_that_asks_for_clusters_gets_them() {
        let text = SAMPLE.replacen("// lockstep.block 256\n", "// lockstep.block 256\n// lockstep.cluster 2\n", 1);
        let processed = add_block_sizes(&text).unwrap();
        assert!(
            processed.contains(")\n.maxntid 256, 1, 1\n.explicitcluster\n.reqnctapercluster 2, 1, 1\n{\n"),
            "{processed}"
        );
        assert_eq!(processed.matches(".reqnctapercluster").count(), 1);
    }

    #[test]
    fn calls_that_are_defined_are_no_fault() {
        assert_eq!(undefined_calls(SAMPLE), Vec::<String>::new());
    }

    #[test]
    fn an_undefined_function_is_named_with_the_kernel_that_reaches_it() {
        let declaration = ".extern .func  (.param .b32 func_retval0) missing\n(\n\t.param .b32 missing_param_0\n)\n;\n";
        let text = SAMPLE.replacen(".address_size 64\n", &format!(".address_size 64\n{declaration}"), 1).replacen(
            "st.b32 \t[%rd1], 2;",
            "call.uni (retval0), missing, (param0);",
            1,
        );
        assert_ne!(text, SAMPLE);
        assert_eq!(undefined_calls(&text), ["missing is called and defined nowhere; called from kernel: scale"]);
    }
}
