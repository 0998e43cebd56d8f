//! Scenarios as a Markdown page, from their definitions alone: `docs/scenarios.md` is what this prints.

use std::fmt::Write;
use std::path::Path;

use serde::Deserialize;

use crate::cli::Error;

/// What stands before the scenarios.
const HEAD: &str = include_str!("scenarios.head.md");

/// A definition, as far as it is for people.
#[derive(Deserialize)]
struct Definition {
    name: String,
    summary: String,
    provokes: String,
    needs: Needs,
    limits: toml::Table,
    #[serde(default)]
    expect: toml::Table,
    #[serde(default)]
    conditions: Vec<Condition>,
    #[serde(default)]
    parameters: Vec<Parameter>,
    #[serde(default)]
    controls: Vec<Control>,
}

#[derive(Deserialize)]
struct Needs {
    gpus: u32,
    cpus: u32,
    preempt: Vec<String>,
}

#[derive(Deserialize)]
struct Condition {
    id: String,
    text: String,
    source: String,
}

#[derive(Deserialize)]
struct Parameter {
    name: String,
    doc: String,
    default: toml::Value,
    min: Option<i64>,
    max: Option<i64>,
    choices: Option<Vec<String>>,
}

#[derive(Deserialize)]
struct Control {
    name: String,
    removes: String,
    summary: String,
    expect: String,
}

/// The page on all scenarios in `dir`.
///
/// # Errors
/// A file that cannot be read, or lacks something.
pub(super) fn page(dir: &Path) -> Result<String, Error> {
    let mut files: Vec<_> = std::fs::read_dir(dir)
        .map_err(|e| super::unreadable(dir, e))?
        .map(|file| file.map(|file| file.path()))
        .collect::<Result<_, _>>()?;
    files.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
    files.sort();
    let mut page = HEAD.to_owned();
    for file in files {
        page.push('\n');
        page.push_str(&section(&super::read::<Definition>(&file)?));
    }
    Ok(page)
}

/// What a table's cell can hold.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

fn plural(count: u32, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

fn section(definition: &Definition) -> String {
    let Definition { name, summary, provokes, needs, limits, expect, conditions, parameters, controls } =
        definition;
    let mut text = format!("## `{name}`\n\n{summary}.\n\n{}\n", provokes.trim());
    let needed: Vec<_> = needs.preempt.iter().map(|model| format!("`{model}`")).collect();
    let mut line = |line: String| {
        // Writing to a string cannot fail.
        let _written = writeln!(text, "{line}");
    };
    line(format!(
        "\nNeeds {} and {}; shows what it is for under preempt={}.",
        plural(needs.gpus, "GPU"),
        plural(needs.cpus, "CPU"),
        needed.join(", ")
    ));
    let limits: Vec<_> = limits.iter().map(|(name, value)| format!("`{name}` {value}")).collect();
    line(format!("Limits: {}.", limits.join(", ")));
    if !expect.is_empty() {
        let expected: Vec<_> = expect
            .iter()
            .map(|(variant, verdict)| format!("`{variant}` {}", verdict.as_str().unwrap_or("?")))
            .collect();
        line(format!("Expected with default parameters: {}.", expected.join(", ")));
    }
    if !conditions.is_empty() {
        line("\n| condition | what must hold | where to read it | control that removes it |".to_owned());
        line("|---|---|---|---|".to_owned());
    }
    for condition in conditions {
        let removed_by: Vec<_> = controls
            .iter()
            .filter(|control| control.removes == condition.id)
            .map(|control| format!("`{}` ({}): {}", control.name, control.expect, control.summary))
            .collect();
        line(format!(
            "| `{}` | {} | {} | {} |",
            condition.id,
            cell(&condition.text),
            cell(&condition.source),
            cell(&removed_by.join("; "))
        ));
    }
    if !parameters.is_empty() {
        line("\n| parameter | default | may be | what it does |".to_owned());
        line("|---|---|---|---|".to_owned());
    }
    for parameter in parameters {
        let default = parameter.default.as_str().map_or_else(|| parameter.default.to_string(), str::to_owned);
        let range = match (&parameter.choices, parameter.min, parameter.max) {
            (Some(choices), ..) => choices.join(", "),
            (None, Some(min), Some(max)) => format!("{min} to {max}"),
            _ if parameter.default.is_bool() => "true, false".to_owned(),
            _ => "any word".to_owned(),
        };
        line(format!("| `{}` | {default} | {range} | {} |", parameter.name, cell(&parameter.doc)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_in_docs_is_up_to_date() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let page = page(&root.join("storm/scenarios")).expect("scenarios");
        let kept = std::fs::read_to_string(root.join("docs/scenarios.md")).unwrap_or_default();
        assert!(
            page == kept,
            "docs/scenarios.md is not what the definitions say; \
             run `target/release/hmmstorm list scenarios --markdown > docs/scenarios.md`"
        );
    }

    #[test]
    fn a_bar_in_a_text_does_not_end_its_cell() {
        assert_eq!(cell("a|b\nc"), "a\\|b c");
    }
}
