//! What the host asks for on the kernel command line.

use std::time::Duration;

use hmmstorm_abi::wire::event::cmdline as keys;
use thiserror::Error;

use crate::supervisor::HEARTBEAT;

/// What PID 1 is to do after boot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Run the scenario, if one is named, and power off.
    Run,
    /// Give a shell.
    #[default]
    Shell,
}

/// The storm's part of the kernel command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Config {
    /// What to do.
    pub(crate) mode: Mode,
    /// Scenario to run.
    pub(crate) scenario: Option<String>,
    /// Seed of the workload.
    pub(crate) seed: u64,
    /// Parameters of the scenario, as text.
    pub(crate) parameters: Vec<(String, String)>,
    /// Modules to load, in order.
    pub(crate) modules: Vec<String>,
    /// GPUs to wait for.
    pub(crate) gpus: usize,
    /// Guest time between two heartbeats.
    pub(crate) heartbeat: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            mode: Mode::default(),
            scenario: None,
            seed: 0,
            parameters: Vec::new(),
            modules: vec!["hsgpu".to_owned()],
            gpus: 2,
            heartbeat: HEARTBEAT,
        }
    }
}

/// A `storm.*` parameter of the kernel command line that means nothing.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum CmdlineError {
    /// Unknown name.
    #[error("the kernel command line has `{0}`, which storm does not know")]
    Unknown(String),
    /// A value that cannot be.
    #[error("the kernel command line has `{key}={value}`: it must be {allowed}")]
    Value {
        /// The name.
        key: &'static str,
        /// Its value.
        value: String,
        /// What it may be.
        allowed: &'static str,
    },
    /// Parameters without a scenario.
    #[error("the kernel command line has scenario parameters and no {}", keys::SCENARIO)]
    NoScenario,
}

impl Config {
    /// Reads `/proc/cmdline`'s text; everything that does not begin with `storm.` is others'.
    ///
    /// # Errors
    /// [`CmdlineError`].
    pub(crate) fn parse(cmdline: &str) -> Result<Self, CmdlineError> {
        let mut config = Self::default();
        for word in cmdline.split_ascii_whitespace().filter(|word| word.starts_with("storm.")) {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            let bad = |key, allowed| CmdlineError::Value { key, value: value.to_owned(), allowed };
            match key {
                keys::MODE => {
                    config.mode = match value {
                        "run" => Mode::Run,
                        "shell" => Mode::Shell,
                        _ => return Err(bad(keys::MODE, "run or shell")),
                    }
                }
                keys::SCENARIO => config.scenario = Some(value.to_owned()).filter(|name| !name.is_empty()),
                keys::SEED => {
                    config.seed =
                        value.parse().map_err(|_| bad(keys::SEED, "an integer from 0 to 2^64 - 1"))?
                }
                keys::MODULES => {
                    config.modules =
                        value.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect();
                    if config.modules.iter().any(|name| name.contains('/')) {
                        return Err(bad(keys::MODULES, "names of modules in /lib/modules, by comma"));
                    }
                }
                keys::GPUS => {
                    let gpus = value.parse().ok().filter(|gpus| *gpus <= 16);
                    config.gpus = gpus.ok_or_else(|| bad(keys::GPUS, "an integer from 0 to 16"))?;
                }
                keys::HEARTBEAT_MS => {
                    let ms = value.parse().ok().filter(|ms| (10..=60_000).contains(ms));
                    let ms = ms.ok_or_else(|| bad(keys::HEARTBEAT_MS, "an integer from 10 to 60000"))?;
                    config.heartbeat = Duration::from_millis(ms);
                }
                _ => match key.strip_prefix(keys::PARAMETER_PREFIX) {
                    Some(name) => config.parameters.push((name.to_owned(), value.to_owned())),
                    None => return Err(CmdlineError::Unknown(key.to_owned())),
                },
            }
        }
        if config.scenario.is_none() && !config.parameters.is_empty() {
            return Err(CmdlineError::NoScenario);
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_is_ours_and_leaves_the_rest() {
        let config = Config::parse(
            "console=ttyS0 storm.mode=run storm.scenario=smoke storm.seed=7 storm.p.rounds=3 storm.p.order=a=b \
             storm.modules=test_hmm,hsgpu storm.gpus=1 storm.heartbeat_ms=100 quiet stormy.x=1\n",
        );
        let expected = Config {
            mode: Mode::Run,
            scenario: Some("smoke".to_owned()),
            seed: 7,
            parameters: vec![("rounds".to_owned(), "3".to_owned()), ("order".to_owned(), "a=b".to_owned())],
            modules: vec!["test_hmm".to_owned(), "hsgpu".to_owned()],
            gpus: 1,
            heartbeat: Duration::from_millis(100),
        };
        assert_eq!(config, Ok(expected));
        assert_eq!(Config::parse("quiet"), Ok(Config::default()));
        assert_eq!(
            Config::parse("storm.modules= storm.gpus=0").map(|c| (c.modules, c.gpus)),
            Ok((vec![], 0))
        );
    }

    #[test]
    fn refuses_what_means_nothing() {
        let error = |text| Config::parse(text).expect_err("refused").to_string();
        assert!(error("storm.sede=1").contains("`storm.sede`"));
        assert!(error("storm.seed=x").contains("`storm.seed=x`"));
        assert!(error("storm.mode").contains("run or shell"));
        assert!(error("storm.gpus=17").contains("0 to 16"));
        assert!(error("storm.heartbeat_ms=0").contains("10 to 60000"));
        assert!(error("storm.modules=../x").contains("/lib/modules"));
        assert!(error("storm.p.rounds=1").contains("no storm.scenario"));
    }
}
