//! The builder: committed PTX while it is fresh, the compiler's otherwise.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;

use crate::source::sha256_hex;
use crate::{
    Entry, Error, Manifest, ManifestKernel, ManifestTarget, Search, Sources, Toolchain, add_block_sizes, compile,
    entries, undefined_calls,
};

/// Counts as part of the cached result: raise it when the same sources shall give other PTX.
const VERSION: u32 = 1;

/// One GPU to compile for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The GPU, as in `sm_80`.
    pub cpu: String,
    /// The version of the PTX language, as in `ptx74`: the oldest that has every instruction used, because a driver
    /// loads no newer PTX than it knows.
    pub isa: String,
}

impl Target {
    /// A GPU and the version of PTX to write for it.
    #[must_use]
    pub fn new(cpu: &str, isa: &str) -> Self {
        Self { cpu: cpu.to_owned(), isa: isa.to_owned() }
    }

    /// The name of its PTX file.
    #[must_use]
    pub fn file(&self) -> String {
        format!("{}.ptx", self.cpu)
    }
}

/// The PTX of one GPU, ready to load.
#[derive(Clone, Debug)]
pub struct Module {
    /// What it is for.
    pub target: Target,
    /// The text.
    pub ptx: String,
    /// Its kernels.
    pub entries: Vec<Entry>,
}

/// What [`Builder::build`] made or found.
#[derive(Clone, Debug)]
pub struct Built {
    /// The PTX file of each target, in the order they were asked for.
    pub files: Vec<(Target, PathBuf)>,
    /// `None` when the committed PTX was fresh; otherwise why it was not, and the compiler used instead.
    pub compiled: Option<String>,
}

/// Whether committed PTX may be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Freshness {
    /// It was made from the sources as they are, and its files are as they were made.
    Fresh(Manifest),
    /// It was not, or cannot be read: in a sentence.
    Stale(String),
}

/// Compiles one package of kernels for some GPUs.
#[derive(Clone, Debug)]
pub struct Builder {
    package: PathBuf,
    library: String,
    sources: Sources,
    targets: Vec<Target>,
    committed: Option<PathBuf>,
    work: PathBuf,
    search: Search,
}

impl Builder {
    /// A builder of the library `library` of the package in the folder `package`; what it writes goes below `work`.
    pub fn new(package: impl Into<PathBuf>, library: &str, sources: Sources, work: impl Into<PathBuf>) -> Self {
        Self {
            package: package.into(),
            library: library.to_owned(),
            sources,
            targets: Vec::new(),
            committed: None,
            work: work.into(),
            search: Search::from_env(),
        }
    }

    /// The GPUs to compile for, in place of those set before.
    #[must_use]
    pub fn targets(mut self, targets: Vec<Target>) -> Self {
        self.targets = targets;
        self
    }

    /// A folder with PTX and a [`Manifest`] that is used while it is fresh.
    #[must_use]
    pub fn committed(mut self, folder: impl Into<PathBuf>) -> Self {
        self.committed = Some(folder.into());
        self
    }

    /// Where to look for the compiler, in place of [`Search::from_env`].
    #[must_use]
    pub fn search(mut self, search: Search) -> Self {
        self.search = search;
        self
    }

    /// The files and folders that the result depends on, for `cargo::rerun-if-changed`.
    #[must_use]
    pub fn watched(&self) -> Vec<PathBuf> {
        let lock = compile::workspace_root(&self.package).join("Cargo.lock");
        self.sources.watched().chain(self.committed.clone()).chain(Some(lock).filter(|path| path.is_file())).collect()
    }

    /// The PTX files: the committed ones while they are fresh, else compiled ones.
    ///
    /// # Errors
    /// They are stale and there is no compiler, or it refuses the kernels.
    pub fn build(&self) -> Result<Built, Error> {
        let reason = match (&self.committed, self.freshness()?) {
            (Some(folder), Freshness::Fresh(_)) => {
                let files = self.targets.iter().map(|target| (target.clone(), folder.join(target.file()))).collect();
                return Ok(Built { files, compiled: None });
            }
            (_, Freshness::Stale(reason)) => reason,
            (None, Freshness::Fresh(_)) => "no PTX is committed".to_owned(),
        };
        let toolchain = self.search.find(&reason)?;
        let key = self.key(&toolchain)?;
        let mut files = Vec::new();
        for (target, built) in self.each_target(|target| self.cached(&toolchain, target, &key)) {
            files.push((target, built?));
        }
        Ok(Built { files, compiled: Some(format!("{reason}; compiled with {}", toolchain.version)) })
    }

    /// Compiles every target, whatever is committed or cached, and says with which compiler.
    ///
    /// # Errors
    /// There is no compiler, it refuses the kernels, or the targets disagree on the kernels.
    pub fn compile(&self) -> Result<(Toolchain, Vec<Module>), Error> {
        let toolchain = self.search.find("asked for")?;
        let mut modules = Vec::new();
        for (_, module) in self.each_target(|target| self.module(&toolchain, target)) {
            modules.push(module?);
        }
        if let Some(other) = modules.iter().find(|module| module.entries != modules[0].entries) {
            let faults = vec![format!("its kernels are not those of {}", modules[0].target.cpu)];
            return Err(Error::Ptx { target: other.target.cpu.clone(), faults });
        }
        Ok((toolchain, modules))
    }

    /// The manifest that vouches for these modules.
    ///
    /// # Errors
    /// The sources cannot be read.
    pub fn manifest(&self, toolchain: &Toolchain, modules: &[Module]) -> Result<Manifest, Error> {
        let target = |module: &Module| ManifestTarget {
            cpu: module.target.cpu.clone(),
            isa: module.target.isa.clone(),
            file: module.target.file(),
            sha256: sha256_hex(module.ptx.as_bytes()),
        };
        let kernels = modules.first().map(|module| module.entries.iter().map(ManifestKernel::from).collect());
        Ok(Manifest {
            source: self.sources.hash()?,
            compiler: toolchain.version.clone(),
            targets: modules.iter().map(target).collect(),
            kernels: kernels.unwrap_or_default(),
        })
    }

    /// Whether the committed PTX was made from the sources as they are now, and is whole.
    ///
    /// # Errors
    /// The sources cannot be read.
    pub fn freshness(&self) -> Result<Freshness, Error> {
        let stale = |reason: String| Ok(Freshness::Stale(reason));
        let Some(folder) = &self.committed else { return stale("no PTX is committed".into()) };
        let Ok(text) = fs::read_to_string(folder.join(Manifest::FILE)) else {
            return stale(format!("{} has no {}", folder.display(), Manifest::FILE));
        };
        let manifest = match Manifest::parse(&text) {
            Ok(manifest) => manifest,
            Err(error) => return stale(error.to_string()),
        };
        if manifest.source != self.sources.hash()? {
            return stale("their sources changed since the PTX was committed".into());
        }
        for target in &self.targets {
            let Some(made) = manifest.targets.iter().find(|made| made.cpu == target.cpu) else {
                return stale(format!("no PTX for {} is committed", target.cpu));
            };
            if made.isa != target.isa || made.file != target.file() {
                return stale(format!("the committed PTX for {} is {} in {}", made.cpu, made.isa, made.file));
            }
            match fs::read(folder.join(&made.file)) {
                Ok(ptx) if sha256_hex(&ptx) == made.sha256 => {}
                Ok(_) => return stale(format!("the committed {} is not what its manifest says", made.file)),
                Err(error) => return stale(format!("the committed {} cannot be read: {error}", made.file)),
            }
        }
        Ok(Freshness::Fresh(manifest))
    }

    /// What a compiled file depends on, in one word.
    fn key(&self, toolchain: &Toolchain) -> Result<String, Error> {
        let lock = fs::read(compile::workspace_root(&self.package).join("Cargo.lock")).unwrap_or_default();
        let parts = [self.sources.hash()?, sha256_hex(&lock), toolchain.version.clone(), VERSION.to_string()];
        Ok(sha256_hex(parts.join("\n").as_bytes()))
    }

    /// Where one target is compiled. One folder per checkout and compiler: cargo would call the assembly of one fresh
    /// when another's lies there under the same name.
    fn folder(&self, toolchain: &Toolchain, target: &Target) -> PathBuf {
        let whose = sha256_hex(format!("{}\n{}", self.package.display(), toolchain.version).as_bytes());
        self.work.join(format!("{}-{}-{}", target.cpu, target.isa, &whose[..8]))
    }

    /// The compiled file of one target, kept beside the key it was made with.
    fn cached(&self, toolchain: &Toolchain, target: &Target, key: &str) -> Result<PathBuf, Error> {
        let folder = self.folder(toolchain, target);
        let (ptx, made) = (folder.join(format!("{key}.ptx")), folder.join(format!("{key}.sha256")));
        let is_whole = fs::read(&ptx)
            .is_ok_and(|text| fs::read_to_string(&made).is_ok_and(|expected| sha256_hex(&text) == expected.trim()));
        if !is_whole {
            let module = self.module(toolchain, target)?;
            fs::write(&ptx, &module.ptx).map_err(Error::io("write", &ptx))?;
            fs::write(&made, sha256_hex(module.ptx.as_bytes())).map_err(Error::io("write", &made))?;
        }
        Ok(ptx)
    }

    /// Compiles one target and makes its PTX ready to load.
    fn module(&self, toolchain: &Toolchain, target: &Target) -> Result<Module, Error> {
        let folder = self.folder(toolchain, target);
        fs::create_dir_all(&folder).map_err(Error::io("make", &folder))?;
        // Two builds of one target take turns from the compiler's start until its file is read.
        let lock_path = folder.join("lock");
        let lock = fs::File::create(&lock_path).map_err(Error::io("write", &lock_path))?;
        lock.lock().map_err(Error::io("lock", &lock_path))?;
        let raw = compile::compile(toolchain, &self.package, &self.library, target, &folder)?;
        drop(lock);

        let refused = |faults| Error::Ptx { target: target.cpu.clone(), faults };
        let undefined = undefined_calls(&raw);
        if !undefined.is_empty() {
            return Err(refused(undefined));
        }
        let ptx = add_block_sizes(&raw).map_err(refused)?;
        let entries = entries(&ptx).map_err(|fault| refused(vec![fault]))?;
        if entries.is_empty() {
            return Err(refused(vec!["it has no kernel".into()]));
        }
        Ok(Module { target: target.clone(), ptx, entries })
    }

    /// Runs `work` for every target, each on its own thread, and keeps their order.
    fn each_target<T: Send>(&self, work: impl Fn(&Target) -> T + Sync) -> Vec<(Target, T)> {
        thread::scope(|scope| {
            let threads: Vec<_> =
                self.targets.iter().map(|target| (target.clone(), scope.spawn(|| work(target)))).collect();
            let join = |thread: thread::ScopedJoinHandle<'_, T>| {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            threads.into_iter().map(|(target, thread)| (target, join(thread))).collect()
        })
    }
}

/// What differs between the kernels that the sources declare (name and place) and those that a PTX module has.
#[must_use]
pub(crate) fn missing_and_extra(declared: &BTreeMap<String, String>, entries: &[Entry]) -> Vec<String> {
    let missing = declared
        .iter()
        .filter(|(name, _)| !entries.iter().any(|entry| &entry.name == *name))
        .map(|(name, place)| format!("kernel {name} ({place}) is missing from the PTX"));
    let extra = entries
        .iter()
        .filter(|entry| !declared.contains_key(&entry.name))
        .map(|entry| format!("kernel {} is in the PTX and in no source", entry.name));
    missing.chain(extra).collect()
}

/// Writes the modules and their manifest into `folder`, and removes PTX that no target asks for any more.
pub(crate) fn write_committed(folder: &Path, manifest: &Manifest, modules: &[Module]) -> Result<(), Error> {
    fs::create_dir_all(folder).map_err(Error::io("make", folder))?;
    for entry in fs::read_dir(folder).map_err(Error::io("list", folder))?.flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == "ptx") {
            fs::remove_file(&path).map_err(Error::io("remove", &path))?;
        }
    }
    for module in modules {
        let path = folder.join(module.target.file());
        fs::write(&path, &module.ptx).map_err(Error::io("write", &path))?;
    }
    let path = folder.join(Manifest::FILE);
    fs::write(&path, manifest.render()).map_err(Error::io("write", &path))
}
