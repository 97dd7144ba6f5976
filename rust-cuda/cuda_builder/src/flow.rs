//! Reads the body of a PTX entry as instructions, and says which of them may run before a thread has waited for its
//! predecessors.

use std::collections::{BTreeMap, BTreeSet};

/// The instruction behind which everything that the kernels ahead wrote is visible.
pub(crate) const WAIT: &str = "griddepcontrol.wait";

/// One instruction.
#[derive(Debug)]
pub(crate) struct Instruction<'a> {
    /// With its modifiers, as in `ld.global.b32`.
    pub op: &'a str,
    /// As written.
    pub operands: &'a str,
    /// Whether a predicate decides if it runs.
    guarded: bool,
    scope: usize,
}

/// The instructions of a body, and where its labels and jump tables point.
pub(crate) struct Flow<'a> {
    pub instructions: Vec<Instruction<'a>>,
    /// By the scope (a pair of braces) they stand in, because inlined code repeats its labels.
    labels: BTreeMap<(usize, &'a str), usize>,
    tables: BTreeMap<(usize, &'a str), &'a str>,
    /// The scope around each scope; 0 is the body.
    outer: Vec<usize>,
    noreturn: &'a BTreeSet<&'a str>,
}

/// What a walk from the entry finds that has not passed a wait.
pub(crate) struct Unwaited {
    /// Instructions that may run.
    pub reached: Vec<usize>,
    /// Whether a thread may end, other than by a trap.
    pub ends: bool,
}

/// Characters of names and registers.
fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '_' | '$' | '%')
}

/// The names and registers in a text, less what is a number.
pub(crate) fn names(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c| !is_name(c)).filter(|word| !word.is_empty() && !word.starts_with(|c: char| c.is_ascii_digit()))
}

impl<'a> Flow<'a> {
    /// Reads a body without comments. A call of a function in `noreturn` ends the thread as a trap does.
    pub(crate) fn new(body: &'a str, noreturn: &'a BTreeSet<&'a str>) -> Result<Self, String> {
        let (instructions, outer) = (Vec::new(), vec![0]);
        let mut flow = Self { instructions, labels: BTreeMap::new(), tables: BTreeMap::new(), outer, noreturn };
        let (mut start, mut scope) = (0, 0);
        for (at, c) in body.char_indices() {
            let opens_or_closes = matches!(c, '{' | '}');
            if c != ';' && !opens_or_closes {
                continue;
            }
            // A brace within a statement is a vector of registers.
            let statement = flow.take_labels(&body[start..at], scope)?;
            if opens_or_closes && !statement.is_empty() {
                continue;
            }
            start = at + 1;
            match c {
                '{' => {
                    flow.outer.push(scope);
                    scope = flow.outer.len() - 1;
                }
                '}' => scope = flow.outer[scope],
                _ => flow.statement(statement, scope)?,
            }
        }
        match flow.take_labels(&body[start..], scope)? {
            "" => Ok(flow),
            rest => Err(format!("`{}` does not end", rest.lines().next().unwrap_or_default())),
        }
    }

    /// Takes the labels in front of a statement.
    fn take_labels(&mut self, statement: &'a str, scope: usize) -> Result<&'a str, String> {
        let mut rest = statement.trim();
        loop {
            let name = &rest[..rest.find(|c| !is_name(c)).unwrap_or(rest.len())];
            let Some(after) = rest[name.len()..].strip_prefix(':').filter(|_| !name.is_empty()) else {
                return Ok(rest);
            };
            rest = after.trim_start();
            if let Some(table) = rest.strip_prefix(".branchtargets") {
                self.tables.insert((scope, name), table);
                return Ok(rest);
            }
            let here = self.instructions.len();
            if self.labels.insert((scope, name), here).is_some_and(|other| other != here) {
                return Err(format!("label {name} stands in two places"));
            }
        }
    }

    fn statement(&mut self, statement: &'a str, scope: usize) -> Result<(), String> {
        let mut rest = statement;
        let guarded = rest.starts_with('@');
        if guarded {
            let end = rest.find(char::is_whitespace).ok_or_else(|| format!("`{rest}` guards nothing"))?;
            rest = rest[end..].trim_start();
        }
        // Directives: registers, shared arrays, jump tables.
        if rest.is_empty() || rest.starts_with('.') {
            return Ok(());
        }
        let end = rest.find(char::is_whitespace).unwrap_or(rest.len());
        self.instructions.push(Instruction { op: &rest[..end], operands: rest[end..].trim(), guarded, scope });
        Ok(())
    }

    /// Looks a name up in the scope and those around it.
    fn resolve<T: Copy>(&self, map: &BTreeMap<(usize, &'a str), T>, scope: usize, name: &str) -> Result<T, String> {
        let mut at = scope;
        loop {
            match map.get(&(at, name)) {
                Some(found) => return Ok(*found),
                None if at == 0 => return Err(format!("there is no label {name}")),
                None => at = self.outer[at],
            }
        }
    }

    /// The instructions that may run next, and whether the thread may end here.
    fn after(&self, at: usize) -> Result<(Vec<usize>, bool), String> {
        let Instruction { op, operands, guarded, scope } = self.instructions[at];
        let mut next = Vec::new();
        let (mut goes_on, mut ends) = (guarded, false);
        match op.split('.').next().unwrap_or_default() {
            "bra" => next.push(self.resolve(&self.labels, scope, operands)?),
            "brx" => {
                let table = operands.rsplit(',').next().unwrap_or_default().trim();
                for label in names(self.resolve(&self.tables, scope, table)?) {
                    next.push(self.resolve(&self.labels, scope, label)?);
                }
            }
            "ret" | "exit" => ends = true,
            "trap" => {}
            "call" if names(operands).any(|name| self.noreturn.contains(name)) => {}
            _ => goes_on = true,
        }
        if goes_on {
            next.push(at + 1);
        }
        Ok((next, ends))
    }

    /// Walks every path from the entry up to its first wait. A wait under a predicate does not count.
    pub(crate) fn unwaited(&self) -> Result<Unwaited, String> {
        let mut found = Unwaited { reached: Vec::new(), ends: false };
        let mut seen = vec![false; self.instructions.len()];
        let mut open = vec![0];
        while let Some(at) = open.pop() {
            let Some(seen) = seen.get_mut(at) else {
                // Behind the last instruction.
                found.ends = true;
                continue;
            };
            if std::mem::replace(seen, true) {
                continue;
            }
            let instruction = &self.instructions[at];
            if instruction.op == WAIT && !instruction.guarded {
                continue;
            }
            found.reached.push(at);
            let (next, ends) = self.after(at)?;
            found.ends |= ends;
            open.extend(next);
        }
        found.reached.sort_unstable();
        Ok(found)
    }

    /// The pointer parameters that each register's value may come from: sums, choices and copies of a pointer keep it,
    /// what is loaded and what is compared do not. `pointer` has the index of a parameter that is a pointer.
    pub(crate) fn origins(&self, pointer: impl Fn(&str) -> Option<usize>) -> BTreeMap<&'a str, BTreeSet<usize>> {
        let mut origins: BTreeMap<&str, BTreeSet<usize>> = BTreeMap::new();
        loop {
            let mut changed = false;
            for Instruction { op, operands, .. } in &self.instructions {
                let (target, sources) = match operands.strip_prefix('{') {
                    Some(vector) => vector.split_once('}').unwrap_or((vector, "")),
                    None => operands.split_once(',').unwrap_or((operands, "")),
                };
                let mut from = BTreeSet::new();
                match op.split('.').next().unwrap_or_default() {
                    "ld" if op.starts_with("ld.param") => from.extend(names(sources).filter_map(&pointer)),
                    "ld" | "ldu" | "setp" | "set" | "atom" | "st" | "red" => {}
                    _ => from.extend(names(sources).filter_map(|name| origins.get(name)).flatten().copied()),
                }
                if from.is_empty() {
                    continue;
                }
                for register in names(target) {
                    let held = origins.entry(register).or_default();
                    let before = held.len();
                    held.extend(&from);
                    changed |= held.len() > before;
                }
            }
            if !changed {
                return origins;
            }
        }
    }
}
