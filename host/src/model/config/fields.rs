//! Typed access to the fields of a JSON file; every error names the file and the field.
//!
//! A field that is `null` counts as absent, as the writers of these files mean it.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::model::ModelError;

/// Counts above this are damage, and would overflow products of two.
const MAX_COUNT: u64 = i32::MAX as u64;

/// An object of a JSON file.
#[derive(Clone, Debug)]
pub(super) struct Fields {
    path: PathBuf,
    /// What comes before a field's name in messages: empty, or the enclosing field and a dot.
    prefix: String,
    map: Map<String, Value>,
}

impl Fields {
    pub(super) fn read(path: PathBuf) -> Result<Self, ModelError> {
        let Some(fields) = Self::read_optional(path.clone())? else {
            let advice = "a model folder needs it; is this the right folder?";
            return Err(ModelError::FileMissing { path, advice });
        };
        Ok(fields)
    }

    pub(super) fn read_optional(path: PathBuf) -> Result<Option<Self>, ModelError> {
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(ModelError::Unreadable { path, reason: error.to_string() }),
        };
        match serde_json::from_slice(&text) {
            Ok(Value::Object(map)) => Ok(Some(Self { path, prefix: String::new(), map })),
            Ok(_) => Err(ModelError::BadJson { path, reason: "not an object".into() }),
            Err(error) => Err(ModelError::BadJson { path, reason: error.to_string() }),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn bad(&self, field: &str, reason: impl Into<String>) -> ModelError {
        let field = format!("{}{field}", self.prefix);
        ModelError::BadField { path: self.path.clone(), field, reason: reason.into() }
    }

    pub(super) fn unsupported(&self, what: &str, supported: &'static str) -> ModelError {
        let what = format!("{}{what}", self.prefix);
        ModelError::Unsupported { path: self.path.clone(), what, supported }
    }

    fn get(&self, field: &str) -> Option<&Value> {
        self.map.get(field).filter(|value| !value.is_null())
    }

    pub(super) fn has(&self, field: &str) -> bool {
        self.get(field).is_some()
    }

    pub(super) fn has_object_inside(&self) -> bool {
        self.map.values().any(Value::is_object)
    }

    /// A positive whole number.
    pub(super) fn count(&self, field: &str) -> Result<usize, ModelError> {
        self.optional_count(field)?.ok_or_else(|| self.bad(field, "is missing"))
    }

    pub(super) fn optional_count(&self, field: &str) -> Result<Option<usize>, ModelError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_u64().filter(|count| (1..=MAX_COUNT).contains(count)) {
            Some(count) => Ok(usize::try_from(count).ok()),
            None => Err(self.bad(field, format!("is {value}; it must be a positive whole number"))),
        }
    }

    /// A positive number.
    pub(super) fn positive(&self, field: &str) -> Result<f64, ModelError> {
        self.optional_positive(field)?.ok_or_else(|| self.bad(field, "is missing"))
    }

    pub(super) fn optional_positive(&self, field: &str) -> Result<Option<f64>, ModelError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_f64().filter(|number| *number > 0.0 && number.is_finite()) {
            Some(number) => Ok(Some(number)),
            None => Err(self.bad(field, format!("is {value}; it must be a positive number"))),
        }
    }

    pub(super) fn flag(&self, field: &str) -> Result<Option<bool>, ModelError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.bad(field, format!("is {value}; it must be true or false")))
    }

    pub(super) fn text(&self, field: &str) -> Result<Option<&str>, ModelError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.bad(field, format!("is {value}; it must be a text")))
    }

    /// A list of texts; empty when absent.
    pub(super) fn texts(&self, field: &str) -> Result<Vec<&str>, ModelError> {
        let Some(value) = self.get(field) else { return Ok(Vec::new()) };
        let texts = value.as_array().and_then(|values| values.iter().map(Value::as_str).collect());
        texts.ok_or_else(|| self.bad(field, "must be a list of texts"))
    }

    pub(super) fn first_text(&self, field: &str) -> Result<Option<&str>, ModelError> {
        Ok(self.texts(field)?.into_iter().next())
    }

    /// One token id or a list of them; empty when absent.
    pub(super) fn token_ids(&self, field: &str) -> Result<Vec<u32>, ModelError> {
        let Some(value) = self.get(field) else { return Ok(Vec::new()) };
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids: Option<Vec<u32>> = match value {
            Value::Array(values) => values.iter().map(id).collect(),
            one => id(one).map(|id| vec![id]),
        };
        ids.ok_or_else(|| self.bad(field, format!("is {value}; it must be a token id or a list of them")))
    }

    pub(super) fn object(&self, field: &str) -> Result<Option<Self>, ModelError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let Value::Object(map) = value else { return Err(self.bad(field, "must be an object")) };
        let prefix = format!("{}{field}.", self.prefix);
        Ok(Some(Self { path: self.path.clone(), prefix, map: map.clone() }))
    }
}
