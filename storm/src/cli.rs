//! The command line, for the guest's shell.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};

use crate::gpu;
use crate::machine::Machine;
use crate::scenario::definition::{Definition, DefinitionError};
use crate::scenario::{definitions, prepare};
use crate::sink::Sink;
use crate::supervisor::{Outcome, supervise};

/// Fault storms on device-private memory.
#[derive(Debug, Parser)]
#[command(name = "storm", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// What storms there are; with a name, all about that one
    List {
        /// Scenario
        scenario: Option<String>,
    },
    /// Run one and check what it leaves behind
    Run {
        /// Scenario
        scenario: String,
        /// Set a parameter of the scenario (see `storm list SCENARIO`)
        #[arg(short, long = "param", value_name = "NAME=VALUE", value_parser = name_and_value)]
        params: Vec<(String, String)>,
        /// Run a control: the scenario with one of its conditions removed
        #[arg(short, long)]
        control: Option<String>,
        /// Seed of every choice
        #[arg(short, long, default_value_t = 0)]
        seed: u64,
        /// Milliseconds between two progress lines
        #[arg(long, value_name = "MS", default_value_t = 500, value_parser = clap::value_parser!(u64).range(10..=60_000))]
        heartbeat: u64,
    },
    /// The driver's counters, for each GPU
    Stats,
}

fn name_and_value(text: &str) -> Result<(String, String), String> {
    let (name, value) =
        text.split_once('=').ok_or_else(|| format!("`{text}` is not of the form NAME=VALUE"))?;
    Ok((name.to_owned(), value.to_owned()))
}

/// Does what the arguments say.
pub(crate) fn run() -> ExitCode {
    let done = match Cli::parse().command {
        Command::List { scenario } => list(scenario.as_deref()).map_err(|e| (2, e.to_string())),
        Command::Run { scenario, params, control, seed, heartbeat } => {
            storm(&scenario, &params, control.as_deref(), seed, Duration::from_millis(heartbeat))
        }
        Command::Stats => stats().map_err(|e| (3, e.to_string())),
    };
    match done {
        Ok(status) => ExitCode::from(status),
        Err((status, message)) => {
            eprintln!("storm: {message}");
            ExitCode::from(status)
        }
    }
}

fn storm(
    name: &str,
    params: &[(String, String)],
    control: Option<&str>,
    seed: u64,
    heartbeat: Duration,
) -> Result<u8, (u8, String)> {
    let machine = Machine::detect();
    let overrides = params.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    let prepared = prepare(name, control, overrides, machine).map_err(|e| (2, e.to_string()))?;
    let model = preempt_model();
    if let Some(wanted) =
        control.and_then(|control| preempt_of(name, control)).filter(|wanted| *wanted != model)
    {
        let message =
            format!("this control needs a guest booted with preempt={wanted}, and this one has {model}");
        return Err((2, message));
    }
    let outcome = supervise(&prepared, seed, &Sink::Terminal, heartbeat).map_err(|e| (3, e.to_string()))?;
    println!(
        "{}",
        match outcome {
            Outcome::Clean => "Every page held what it should, and everything was given back.",
            Outcome::Wrong => "An oracle failed: see above.",
            Outcome::Failed => "The storm could not be finished: see above.",
        }
    );
    Ok(outcome.status())
}

fn preempt_of(scenario: &str, control: &str) -> Option<String> {
    let definitions = definitions().ok()?;
    definitions.iter().find(|d| d.name == scenario)?.control(control).ok()?.preempt.clone()
}

/// The preemption model in force, as far as it can be seen.
pub(crate) fn preempt_model() -> String {
    // Like "none voluntary (full) lazy".
    let models = std::fs::read_to_string("/sys/kernel/debug/sched/preempt").unwrap_or_default();
    let chosen =
        models.split_once('(').and_then(|(_, rest)| rest.split_once(')')).map(|(model, _)| model.to_owned());
    chosen.unwrap_or_else(|| "unknown".to_owned())
}

fn list(scenario: Option<&str>) -> Result<u8, DefinitionError> {
    let definitions = definitions()?;
    let Some(name) = scenario else {
        for definition in &definitions {
            println!("{:<16} {}", definition.name, definition.summary);
        }
        println!(
            "\n`storm list NAME` tells what one provokes, its parameters and its controls; `storm run NAME` runs it."
        );
        return Ok(0);
    };
    let known = || definitions.iter().map(|d| d.name.as_str()).collect::<Vec<_>>().join(", ");
    let definition = definitions
        .iter()
        .find(|d| d.name == name)
        .ok_or_else(|| DefinitionError::UnknownScenario { name: name.to_owned(), known: known() })?;
    print!("{}", describe(definition));
    Ok(0)
}

fn describe(definition: &Definition) -> String {
    let Definition { name, summary, provokes, needs, .. } = definition;
    let mut text = format!("{name}: {summary}\n\n{provokes}\n");
    text += &format!(
        "Needs {} GPUs and {} CPUs; shows under preempt={}.\n",
        needs.gpus,
        needs.cpus,
        needs.preempt.join("|")
    );
    let expected: Vec<_> =
        definition.expect.iter().map(|(variant, verdict)| format!("{variant}: {verdict}")).collect();
    text += &format!("Expected on kernel variants: {}\n", expected.join(", "));
    if !definition.conditions.is_empty() {
        text += "\nConditions, all of which must hold:\n";
    }
    for condition in &definition.conditions {
        text += &format!("  {:<22} {}\n  {:<22} ({})\n", condition.id, condition.text, "", condition.source);
    }
    text += "\nParameters (--param NAME=VALUE):\n";
    for parameter in &definition.parameters {
        let kind = &parameter.kind;
        text +=
            &format!("  {:<12} {}\n", format!("{}={}", parameter.name, kind.default_value()), parameter.doc);
        text += &format!("  {:<12} {}\n", "", kind.allowed());
    }
    if !definition.controls.is_empty() {
        text += "\nControls (--control NAME), each with one condition removed:\n";
    }
    for control in &definition.controls {
        let boot =
            control.preempt.iter().map(|model| format!(" Boot with preempt={model}.")).collect::<String>();
        text += &format!(
            "  {:<22} {}{boot} Removes {}; expected: {}\n",
            control.name, control.summary, control.removes, control.expect
        );
    }
    text
}

fn stats() -> Result<u8, gpu::GpuError> {
    let all = gpu::all_stats()?;
    if all.is_empty() {
        println!("There is no GPU: /dev/hmm_dmirror0 does not exist.");
        return Ok(3);
    }
    for (index, stats) in all.iter().enumerate() {
        println!("GPU {index}");
        for (name, value) in gpu::named(stats) {
            println!("  {name:<22} {value}");
        }
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
        let cli =
            Cli::try_parse_from(["storm", "run", "smoke", "-p", "rounds=3", "--seed", "9"]).expect("valid");
        let Command::Run { params, seed: 9, .. } = cli.command else { panic!("not a run with seed 9") };
        assert_eq!(params, [("rounds".to_owned(), "3".to_owned())]);
        assert!(Cli::try_parse_from(["storm", "run", "smoke", "-p", "rounds"]).is_err());
    }

    #[test]
    fn a_description_names_every_parameter_and_control() {
        for definition in definitions().expect("valid") {
            let text = describe(&definition);
            assert!(definition.parameters.iter().all(|p| text.contains(&format!("{}=", p.name))));
            assert!(definition.controls.iter().all(|c| text.contains(&c.name)));
        }
    }
}
