//! Chat templates: the Jinja program, shipped with a model, that turns messages into one prompt.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, Error, ErrorKind, Value, context};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter};

use super::strftime;
use super::tokenizer::{TokenizerError, read_json, token_text};

/// Why a chat cannot be rendered.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// A file of the model folder cannot be read.
    #[error(transparent)]
    File(#[from] TokenizerError),
    /// The template is no valid Jinja, or uses something that is not supported.
    #[error("the chat template in {path} cannot be compiled: {reason}")]
    Invalid {
        /// Where it comes from.
        path: PathBuf,
        /// Where and why.
        reason: String,
    },
    /// The template does not accept these messages.
    #[error("the chat template does not accept these messages: {reason}")]
    Rejected {
        /// The template's own words.
        reason: String,
    },
}

/// A compiled template and the tokens it may name.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
}

const NAME: &str = "chat";

impl ChatTemplate {
    /// Reads `chat_template.jinja`, else `chat_template` of `tokenizer_config.json`. None when the model has neither:
    /// it can complete text, but does not chat.
    ///
    /// # Errors
    /// [`TemplateError`] for a file that cannot be read or compiled.
    pub fn load(folder: &Path) -> Result<Option<Self>, TemplateError> {
        let config_path = folder.join("tokenizer_config.json");
        let config = read_json(&config_path)?.unwrap_or_default();
        let path = folder.join("chat_template.jinja");
        let (path, source) = match std::fs::read_to_string(&path) {
            Ok(source) => (path, Some(source)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => (config_path, configured_template(&config)),
            Err(source) => return Err(TokenizerError::Read { path, source }.into()),
        };
        let Some(source) = source else { return Ok(None) };
        let token = |name: &str| config.get(name).and_then(token_text).unwrap_or_default();
        match Self::new(source, token("bos_token"), token("eos_token")) {
            Ok(template) => Ok(Some(template)),
            Err(e) => Err(TemplateError::Invalid { path, reason: describe(&e) }),
        }
    }

    /// Compiles `source` with the settings and functions that transformers gives its templates.
    ///
    /// # Errors
    /// The compiler's.
    pub fn new(source: String, bos_token: String, eos_token: String) -> Result<Self, Error> {
        let mut environment = Environment::new();
        environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |pattern: String| strftime(SystemTime::now(), &pattern));
        environment.add_filter("tojson", tojson);
        environment.add_template_owned(NAME, source)?;
        Ok(Self { environment, bos_token, eos_token })
    }

    /// The prompt for `messages` (objects with `role` and `content`). `arguments` are further variables for the
    /// template, such as `enable_thinking`; they cannot replace the messages.
    ///
    /// # Errors
    /// [`TemplateError::Rejected`] with the template's words.
    pub fn render(
        &self,
        messages: &[serde_json::Value],
        add_generation_prompt: bool,
        arguments: &serde_json::Map<String, serde_json::Value>,
    ) -> Result<String, TemplateError> {
        let own = context! {
            messages => Value::from(Serde(messages)),
            add_generation_prompt,
            bos_token => self.bos_token.as_str(),
            eos_token => self.eos_token.as_str(),
            ..Value::from(Serde(arguments))
        };
        self.environment
            .get_template(NAME)
            .and_then(|template| template.render(own))
            .map_err(|e| TemplateError::Rejected { reason: e.detail().map_or_else(|| describe(&e), str::to_owned) })
    }
}

/// `chat_template`: a string, or a list of named ones of which `default` serves.
fn configured_template(config: &serde_json::Value) -> Option<String> {
    let template = config.get("chat_template")?;
    let named = |list: &[serde_json::Value]| {
        let wanted = list.iter().find(|t| t.get("name").and_then(|n| n.as_str()) == Some("default"));
        Some(wanted.or(list.first())?.get("template")?.as_str()?.to_owned())
    };
    template.as_str().map(str::to_owned).or_else(|| named(template.as_array()?))
}

fn describe(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}

/// JSON as Python's `json.dumps` writes it: a space after `:` and `,`, and nothing escaped for HTML.
#[allow(clippy::needless_pass_by_value, reason = "the signature that minijinja asks of a filter")]
fn tojson(value: &Value, indent: Option<usize>, arguments: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = match indent {
        Some(indent) => Some(indent),
        None => arguments.get("indent")?,
    };
    // Accepted for Python's sake: this is how it is always written here.
    let _: Option<bool> = arguments.get("ensure_ascii")?;
    arguments.assert_all_used()?;
    let mut out = Vec::new();
    let written = match indent {
        Some(indent) => {
            let spaces = " ".repeat(indent);
            let pretty = PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, pretty))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, PythonSpacing)),
    };
    written.map_err(|e| Error::new(ErrorKind::InvalidOperation, format!("cannot be written as JSON: {e}")))?;
    Ok(Value::from_safe_string(String::from_utf8_lossy(&out).into_owned()))
}

struct PythonSpacing;

impl Formatter for PythonSpacing {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn render(source: &str, messages: &[serde_json::Value]) -> Result<String, TemplateError> {
        let template = ChatTemplate::new(source.into(), "<s>".into(), "</s>".into()).unwrap();
        template.render(messages, true, json!({"flag": true, "bos_token": "<other>"}).as_object().unwrap())
    }

    const CHATML: &str = "{% for message in messages %}
    {% if loop.index0 > 0 and message.role == 'system' %}
        {{ raise_exception('system must be first') }}
    {% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{% endif %}
";

    #[test]
    fn a_chat_becomes_one_prompt() {
        let messages =
            [json!({"role": "system", "content": "Be brief. "}), json!({"role": "user", "content": "<b>&日"})];
        // A `{{ }}` line keeps its newline, a `{% %}` line loses it and its indentation.
        assert_eq!(
            render(CHATML, &messages).unwrap(),
            "<|im_start|>system\nBe brief.<|im_end|>\n\n<|im_start|>user\n<b>&日<|im_end|>\n\n<|im_start|>assistant\n\n"
        );
    }

    #[test]
    fn a_template_can_refuse() {
        let messages = [json!({"role": "user", "content": "a"}), json!({"role": "system", "content": "b"})];
        let error = render(CHATML, &messages).unwrap_err();
        assert_eq!(error.to_string(), "the chat template does not accept these messages: system must be first");
    }

    #[test]
    fn python_and_its_json() {
        let source = "{{ messages[0].content.strip().upper() }}|{{ messages | tojson }}|{{ [1, {'a': '<é>'}] | tojson(indent=2) }}\
                      |{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}\
                      |{{ bos_token ~ eos_token }}|{{ flag }}|{{ missing is defined }}|{{ 'a' in {'a': 1}.keys() }}";
        let got = render(source, &[json!({"content": " hi "})]).unwrap();
        let want = "HI|[{\"content\": \" hi \"}]|[\n  1,\n  {\n    \"a\": \"<é>\"\n  }\n]|13|<s></s>|True|False|True";
        assert_eq!(got, want);
        assert_eq!(render("{{ strftime_now('%Y') | length }}", &[]).unwrap(), "4");
    }

    #[test]
    fn templates_are_found_where_models_keep_them() {
        assert_eq!(configured_template(&json!({"chat_template": "x"})).unwrap(), "x");
        let list =
            json!({"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]});
        assert_eq!(configured_template(&list).unwrap(), "d");
        assert_eq!(configured_template(&json!({})), None);
        let error = ChatTemplate::new("{% for %}".into(), String::new(), String::new()).unwrap_err();
        assert!(describe(&error).contains("chat:1"), "{error}");
    }
}
