//! Everything that can be wrong with a description, as facts.

/// A description that cannot be used. Every message is one sentence that names the file (`origin`), the field, the
/// value that was found and what would be right.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// The text is longer than any honest description.
    #[error("{origin}: the file has {got} bytes, but a description has at most {limit}")]
    TooLong {
        /// Path, for the message.
        origin: String,
        /// Bytes found.
        got: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// The text is not JSON.
    #[error("{origin}: not valid JSON at line {line}, column {column}: {reason}")]
    Json {
        /// Path, for the message.
        origin: String,
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
        /// What the parser expected.
        reason: String,
    },
    /// The JSON is not an object.
    #[error("{origin}: the top of the file is {got}, but must be a JSON object {{…}}")]
    NotAnObject {
        /// Path, for the message.
        origin: String,
        /// The value found, shortened.
        got: String,
    },
    /// A field that has no default is absent or null.
    #[error("{origin}: field `{field}` is missing; it must be {expected}")]
    Missing {
        /// Path, for the message.
        origin: String,
        /// Name of the field, dotted when nested.
        field: String,
        /// What would be right.
        expected: String,
    },
    /// A field has a value of the wrong type, out of range, or at odds with another field.
    #[error("{origin}: field `{field}` is {got}, but must be {expected}")]
    Invalid {
        /// Path, for the message.
        origin: String,
        /// Name of the field, dotted when nested.
        field: String,
        /// The value found, shortened.
        got: String,
        /// What would be right.
        expected: String,
    },
    /// A field asks for something that exists elsewhere but not here.
    #[error("{origin}: field `{field}` is {got}, which is not supported; supported is {supported}")]
    Unsupported {
        /// Path, for the message.
        origin: String,
        /// Name of the field, dotted when nested.
        field: String,
        /// The value found, shortened.
        got: String,
        /// What we can do.
        supported: String,
    },
    /// `model_type` names no family of ours.
    #[error("{origin}: field `model_type` is {got}, which is not a known family; known are {known}")]
    UnknownModelType {
        /// Path, for the message.
        origin: String,
        /// The value found, shortened.
        got: String,
        /// All known names.
        known: String,
    },
    /// A key that a `moesaic_paper` description does not have.
    #[error("{origin}: field `{field}` is not known to model_type \"moesaic_paper\"; did you mean `{nearest}`?")]
    UnknownField {
        /// Path, for the message.
        origin: String,
        /// The key found, shortened.
        field: String,
        /// The known key that is spelled most alike.
        nearest: String,
    },
    /// The text is not YAML of the plain kind that descriptions are written in.
    #[error("{origin}: not valid YAML at line {line}, column {column}: {reason}")]
    Yaml {
        /// Path, for the message.
        origin: String,
        /// Line, from 1; 0 where the parser does not know.
        line: u64,
        /// Column, from 1; 0 where the parser does not know.
        column: u64,
        /// What the parser says.
        reason: String,
    },
    /// The YAML has no keys at the top.
    #[error("{origin}: the top of the file is {got}, but must be keys with values, like `name: …`")]
    NotAMapping {
        /// Path, for the message.
        origin: String,
        /// The value found, shortened.
        got: String,
    },
    /// A key that a description of our own does not have.
    #[error("{origin}: field `{field}` is not known; did you mean `{nearest}`?")]
    UnknownKey {
        /// Path, for the message.
        origin: String,
        /// The key found, shortened, dotted when nested.
        field: String,
        /// The known key that is spelled most alike.
        nearest: String,
    },
    /// No cluster, workload, … has this name.
    #[error("no {what} is called {name}; did you mean `{nearest}`? ({what}s: {known})")]
    UnknownName {
        /// What was looked for.
        what: &'static str,
        /// The name asked for, shortened.
        name: String,
        /// The known name that is spelled most alike.
        nearest: String,
        /// All known names.
        known: String,
    },
    /// No preset has this name.
    #[error("no preset is called {name}; did you mean `{nearest}`? (presets: {known})")]
    UnknownPreset {
        /// The name asked for, shortened.
        name: String,
        /// The known name that is spelled most alike.
        nearest: String,
        /// All known names.
        known: String,
    },
    /// A cluster cannot have so many GPUs.
    #[error("cluster {cluster} cannot have {got}: it must have {expected}")]
    Grow {
        /// Its name.
        cluster: String,
        /// Nodes or GPUs asked for.
        got: String,
        /// What would be right.
        expected: String,
    },
    /// A model that is only described well enough to be planned.
    #[error("a {model_type} model like this can be planned, but not run yet: it has {reason}")]
    PlanningOnly {
        /// Its `model_type`.
        model_type: &'static str,
        /// What the runtime lacks.
        reason: String,
    },
    /// A model cannot be resized as asked.
    #[error("cannot scale the model: {what} is {got}, but must be {expected}")]
    Scale {
        /// The size asked for.
        what: String,
        /// Its value.
        got: String,
        /// What would be right.
        expected: String,
    },
}
