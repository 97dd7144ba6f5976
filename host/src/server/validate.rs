//! Reads typed values out of a JSON object and says which field is wrong. Unknown fields are left alone: routers and
//! client libraries add their own.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::error::ApiError;

/// A JSON object. `null` counts as absent.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a>(pub(super) &'a Map<String, Value>);

impl<'a> Fields<'a> {
    pub(super) fn get(self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|v| !v.is_null())
    }

    pub(super) fn boolean(self, name: &'static str) -> Result<Option<bool>, ApiError> {
        self.typed(name, "true or false", Value::as_bool)
    }

    pub(super) fn string(self, name: &'static str) -> Result<Option<&'a str>, ApiError> {
        self.typed(name, "a string", Value::as_str)
    }

    pub(super) fn object(self, name: &'static str) -> Result<Option<&'a Map<String, Value>>, ApiError> {
        self.typed(name, "an object", Value::as_object)
    }

    pub(super) fn integer(self, name: &'static str, range: RangeInclusive<i64>) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.typed(name, "an integer", Value::as_i64)? else { return Ok(None) };
        if range.contains(&value) {
            return Ok(Some(value));
        }
        let (low, high) = (range.start(), range.end());
        Err(ApiError::invalid(name, format!("{name} is {value}; it must be from {low} to {high}")))
    }

    /// A number from `low` to `high`, both allowed.
    pub(super) fn number(self, name: &'static str, low: f64, high: f64) -> Result<Option<f32>, ApiError> {
        let Some(value) = self.typed(name, "a number", Value::as_f64)? else { return Ok(None) };
        if (low..=high).contains(&value) {
            return Ok(Some(value as f32));
        }
        Err(ApiError::invalid(name, format!("{name} is {value}; it must be from {low:?} to {high:?}")))
    }

    fn typed<T>(
        self,
        name: &'static str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        match self.get(name) {
            None => Ok(None),
            Some(value) => match read(value) {
                Some(value) => Ok(Some(value)),
                None => Err(ApiError::invalid(name, format!("{name} is {}; it must be {expected}", kind_of(value)))),
            },
        }
    }
}

/// What a value is, in words; the value itself may be private.
pub(super) fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(n) if n.is_f64() => "a fractional number",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
