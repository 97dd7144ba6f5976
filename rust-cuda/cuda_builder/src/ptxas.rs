//! What ptxas says about each kernel: registers, shared memory, spills.

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Error;

/// What one kernel takes, on one GPU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// The entry point's name.
    pub kernel: String,
    /// Registers per thread.
    pub registers: u32,
    /// Static shared memory per block, in bytes.
    pub shared_bytes: u32,
    /// Stack per thread, in bytes.
    pub stack_bytes: u32,
    /// Bytes that each thread stores because registers ran out.
    pub spill_store_bytes: u32,
    /// Bytes that each thread loads because registers ran out.
    pub spill_load_bytes: u32,
}

/// NVIDIA's assembler.
#[derive(Clone, Debug)]
pub struct Ptxas {
    program: PathBuf,
}

impl Ptxas {
    /// The ptxas named by `LOCKSTEP_PTXAS`, or the one in `PATH`, `CUDA_HOME/bin`, `CUDA_PATH/bin`, `/usr/local/cuda/bin`.
    ///
    /// # Errors
    /// There is none.
    pub fn find() -> Result<Self, Error> {
        if let Some(named) = env::var_os("LOCKSTEP_PTXAS") {
            let program = PathBuf::from(named);
            if program.is_file() {
                return Ok(Self { program });
            }
            return Err(Error::Ptxas(format!("LOCKSTEP_PTXAS={}: there is no such file", program.display())));
        }
        let path = env::var_os("PATH").unwrap_or_default();
        let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os).map(|home| home_bin(&home));
        let mut folders = env::split_paths(&path).chain(homes).chain([PathBuf::from("/usr/local/cuda/bin")]);
        folders.find_map(|folder| Some(folder.join("ptxas")).filter(|program| program.is_file())).map_or_else(
            || {
                Err(Error::Ptxas(
                    "there is no ptxas. `pip install nvidia-cuda-nvcc` brings one; set LOCKSTEP_PTXAS to it".into(),
                ))
            },
            |program| Ok(Self { program }),
        )
    }

    /// Assembles the file for the GPU `cpu` (as in `sm_80`) and says what each kernel takes.
    ///
    /// # Errors
    /// ptxas cannot be started or refuses the file.
    pub fn report(&self, ptx: &Path, cpu: &str) -> Result<Vec<Usage>, Error> {
        let cubin = ptx.with_extension("cubin");
        let mut command = Command::new(&self.program);
        command.arg("-v").arg(format!("-arch={cpu}")).arg("-o").arg(&cubin).arg(ptx);
        let output = command.output().map_err(Error::io("start", &self.program))?;
        let said = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            return Err(Error::Ptxas(format!("ptxas refuses {} for {cpu}:\n{}", ptx.display(), said.trim_end())));
        }
        let usage = parse_usage(&said);
        // Figures that are not there read as 0: a ptxas that words them otherwise must not pass for one without spills.
        let spill_lines = said.matches(" bytes spill stores").count();
        if spill_lines < usage.len() || usage.iter().any(|kernel| kernel.registers == 0) {
            return Err(Error::Ptxas(format!("this ptxas does not say what each kernel takes:\n{}", said.trim_end())));
        }
        Ok(usage)
    }
}

fn home_bin(home: &OsStr) -> PathBuf {
    Path::new(home).join("bin")
}

/// Reads the output of `ptxas -v`. What a called function spills counts for the kernel it is printed under.
#[must_use]
pub fn parse_usage(output: &str) -> Vec<Usage> {
    let mut found: Vec<Usage> = Vec::new();
    for line in output.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let kernel = rest.split('\'').next().unwrap_or(rest).to_owned();
            found.push(Usage { kernel, ..Usage::default() });
        }
        let Some(usage) = found.last_mut() else { continue };
        // Each figure stands before its unit: "232 bytes stack frame", "Used 32 registers".
        let figure = |unit: &str| -> u32 {
            let Some((before, _)) = line.split_once(unit) else { return 0 };
            before.rsplit([' ', ',']).find(|word| !word.is_empty()).and_then(|word| word.parse().ok()).unwrap_or(0)
        };
        usage.registers = usage.registers.max(figure(" registers"));
        usage.shared_bytes = usage.shared_bytes.max(figure(" bytes smem"));
        usage.stack_bytes = usage.stack_bytes.max(figure(" bytes stack frame"));
        usage.stack_bytes = usage.stack_bytes.max(figure(" bytes cumulative stack size"));
        usage.spill_store_bytes += figure(" bytes spill stores");
        usage.spill_load_bytes += figure(" bytes spill loads");
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_output_of_a_real_ptxas_reads() {
        let usage = parse_usage(include_str!("../tests/data/ptxas-v.txt"));
        let spills = Usage {
            kernel: "spills".into(),
            registers: 32,
            shared_bytes: 0,
            stack_bytes: 232,
            spill_store_bytes: 228,
            spill_load_bytes: 228,
        };
        let scale = Usage { kernel: "scale".into(), registers: 8, shared_bytes: 1024, ..Usage::default() };
        assert_eq!(usage, [spills, scale]);
    }
}
