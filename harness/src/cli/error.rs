//! How a command ends: an [`Outcome`], or an [`Error`] that becomes an exit code and a message.

use std::error::Error as StdError;
use std::fmt::Write;

/// What a command that worked has to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Outcome {
    /// All is as it should be, or as `--expect` says: exit code 0.
    Pass,
    /// A problem was found in what was examined: exit code 1.
    Problem,
    /// Nothing can be said of what was examined, and `git bisect` is to try another commit: exit code 125.
    Skip,
}

/// Why a command could not do its work. Any typed error converts into [`Error::Harness`] by `?`.
#[derive(Debug)]
pub enum Error {
    /// The command line asks for something that does not exist or does not go together: exit code 2.
    Usage(String),
    /// The user ended it (Ctrl-C, SIGTERM); everything that was started is ended: exit code 3.
    Interrupted,
    /// The bench failed; this says nothing about the kernel under test: exit code 3.
    Harness(Box<dyn StdError + Send + Sync>),
}

impl Error {
    /// A usage error with this message.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::Usage(message.into())
    }

    /// A harness error with this message, for the rare place that has no typed error to give.
    pub fn harness(message: impl Into<String>) -> Self {
        Self::Harness(message.into().into())
    }

    /// The process's exit code.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            Self::Interrupted | Self::Harness(_) => 3,
        }
    }

    /// The message with its chain of causes, one a line, ready for stderr.
    pub fn report(&self) -> String {
        match self {
            Self::Usage(message) => format!("error: {message}\n\nFor more, try '--help'.\n"),
            Self::Interrupted => "interrupted; everything that was started is ended\n".into(),
            Self::Harness(error) => {
                let mut text = format!("error: {error}\n");
                let mut said = error.to_string();
                let mut cause = error.source();
                while let Some(error) = cause {
                    // A message that already quotes its cause is not repeated.
                    let why = error.to_string();
                    if !said.contains(&why) {
                        let _ = writeln!(text, "  caused by: {why}");
                        said = why;
                    }
                    cause = error.source();
                }
                text
            }
        }
    }
}

impl<E: StdError + Send + Sync + 'static> From<E> for Error {
    fn from(error: E) -> Self {
        Self::Harness(Box::new(error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn report_names_the_causes() {
        let error = Error::from(Outer(std::io::Error::other("inner")));
        assert_eq!(error.report(), "error: outer\n  caused by: inner\n");
        assert_eq!(error.exit_code(), 3);
    }

    #[test]
    fn usage_is_two() {
        assert_eq!(Error::usage("no such scenario").exit_code(), 2);
    }
}
