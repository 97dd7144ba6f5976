//! Golden digests: what the answers to fixed requests were, per device and model, so that days and builds can be compared.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::Line;
use super::rehearsal::{alone, request, tokens, watched_greedy, watched_sampled};
use crate::device::{Device, DeviceError};
use crate::engine::{Request, Sampling};
use crate::model::Model;

/// The CPU's bits are the executor's, the same on every processor.
const CPU: &str = "CPU executor";

/// Why a file of golden digests cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum GoldenError {
    /// It cannot be read or written.
    #[error("{path}: {error}")]
    File {
        /// Its path.
        path: String,
        /// Why.
        error: std::io::Error,
    },
    /// It is not what `--write-golden` writes.
    #[error("{path} is no file of golden digests ({error}); write one with --write-golden")]
    Content {
        /// Its path.
        path: String,
        /// Why.
        error: serde_json::Error,
    },
}

/// What one model answers on one device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Golden {
    /// The weights, by their digest in hexadecimal.
    weights: String,
    /// The digest of the tokens and log-probabilities of each request's answer, in hexadecimal.
    answers: BTreeMap<String, String>,
}

/// Golden digests by device, then by model.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Goldens(BTreeMap<String, BTreeMap<String, Golden>>);

impl Goldens {
    /// Reads a file.
    ///
    /// # Errors
    /// There is none, or it is no such file.
    pub fn read(path: &Path) -> Result<Self, GoldenError> {
        let name = || path.display().to_string();
        let bytes = std::fs::read(path).map_err(|error| GoldenError::File { path: name(), error })?;
        serde_json::from_slice(&bytes).map_err(|error| GoldenError::Content { path: name(), error })
    }

    /// Writes the file.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), GoldenError> {
        let name = || path.display().to_string();
        let mut text =
            serde_json::to_string_pretty(self).map_err(|error| GoldenError::Content { path: name(), error })?;
        text.push('\n');
        std::fs::write(path, text).map_err(|error| GoldenError::File { path: name(), error })
    }

    /// Whether there is an entry for this device and the model called `name`.
    #[must_use]
    pub fn has(&self, device: &Device, name: &str) -> bool {
        self.0.get(&device_name(device)).is_some_and(|models| models.contains_key(name))
    }

    /// Replaces the entry of the model's device and `name` by what it answers now. Returns the device's name.
    ///
    /// # Errors
    /// The device's error.
    pub fn record(&mut self, model: &Arc<Model>, name: &str) -> Result<String, DeviceError> {
        let device = device_name(model.device());
        let golden = Golden::of(model)?;
        self.0.entry(device.clone()).or_default().insert(name.to_owned(), golden);
        Ok(device)
    }

    /// Compares what the model answers now with the entry of its device and `name`: a line for each request. Without an
    /// entry, a line that fails.
    ///
    /// # Errors
    /// The device's error.
    pub fn check(&self, model: &Arc<Model>, name: &str) -> Result<Vec<Line>, DeviceError> {
        let device = device_name(model.device());
        let Some(golden) = self.0.get(&device).and_then(|models| models.get(name)) else {
            let detail = "none; --write-golden writes it".to_owned();
            return Ok(vec![Line::new(format!("golden digests of {name} on {device}"), detail, false)]);
        };
        Ok(golden.compare(&Golden::of(model)?))
    }
}

impl Golden {
    fn of(model: &Arc<Model>) -> Result<Self, DeviceError> {
        let mut answers = BTreeMap::new();
        for (name, request) in requests(model) {
            answers.insert(name.to_owned(), hex(&alone(model, &request)?.digest()));
        }
        Ok(Self { weights: hex(&model.fingerprint()), answers })
    }

    /// A line for the weights where they are others, else a line for each request that one of the two has.
    fn compare(&self, now: &Self) -> Vec<Line> {
        if self.weights != now.weights {
            let detail = format!("{:.16} was recorded, this model is {:.16}", self.weights, now.weights);
            return vec![Line::new("golden digests are of the same weights", detail, false)];
        }
        let names: std::collections::BTreeSet<&String> = self.answers.keys().chain(now.answers.keys()).collect();
        let line = |name: &String| {
            let none = "none".to_owned();
            let [was, is] = [self, now].map(|golden| golden.answers.get(name).unwrap_or(&none));
            let detail = if was == is { format!("{is:.16}") } else { format!("{was:.16} was recorded, now {is:.16}") };
            Line::new(format!("request {name} = its golden digest"), detail, was == is)
        };
        names.into_iter().map(line).collect()
    }
}

fn device_name(device: &Device) -> String {
    if device.is_cuda() { device.name() } else { CPU.to_owned() }
}

/// What is asked. A change here makes every recorded digest void.
fn requests(model: &Model) -> [(&'static str, Request); 4] {
    let sampling = Sampling { temperature: 0.8, seed: 7, ..Sampling::default() };
    [
        ("greedy", watched_greedy(model)),
        ("sampled", watched_sampled(model)),
        ("long", request(tokens(model, 300, 2), 16, sampling.clone(), Some(20))),
        ("short", request(tokens(model, 1, 3), 130, sampling, Some(0))),
    ]
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |text, byte| format!("{text}{byte:02x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn golden(weights: &str, answers: &[(&str, &str)]) -> Golden {
        let answers = answers.iter().map(|&(name, digest)| (name.to_owned(), digest.to_owned())).collect();
        Golden { weights: weights.to_owned(), answers }
    }

    fn failing(was: &Golden, is: &Golden) -> usize {
        was.compare(is).iter().filter(|line| !line.holds).count()
    }

    #[test]
    fn any_other_digest_missing_answer_or_weight_fails() {
        let was = golden("w", &[("a", "1"), ("b", "2")]);
        assert_eq!((was.compare(&was).len(), failing(&was, &was)), (2, 0));
        assert_eq!(failing(&was, &golden("w", &[("a", "1"), ("b", "3")])), 1);
        assert_eq!(failing(&was, &golden("w", &[("a", "1")])), 1);
        assert_eq!(failing(&was, &golden("w", &[("a", "1"), ("b", "2"), ("c", "3")])), 1);
        assert_eq!(failing(&was, &golden("x", &[("a", "1"), ("b", "2")])), 1);
    }

    #[test]
    fn a_file_comes_back_as_it_was_written() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut goldens = Goldens::default();
        goldens.0.entry(CPU.to_owned()).or_default().insert("m".to_owned(), golden("w", &[("a", "1")]));
        goldens.write(file.path()).unwrap();
        assert_eq!(Goldens::read(file.path()).unwrap(), goldens);
        std::fs::write(file.path(), "[1]").unwrap();
        assert!(Goldens::read(file.path()).unwrap_err().to_string().contains("--write-golden"));
        assert!(Goldens::read(Path::new("/nowhere/golden.json")).is_err());
    }
}
