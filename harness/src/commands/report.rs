//! `hmmstorm report`: what run records say, as a page, a mail, or for other tools.

use std::io::Write;
use std::path::{Path, PathBuf};

use super::list;
use crate::build::{BuildError, Pins};
use crate::cli::{Context, Error, Outcome};
use crate::matrix::{CellSpec, Plan, Shard, expand};
use crate::report::input::{self, Input};
use crate::report::{self, Counted, Format, Report};

/// Options of `hmmstorm report`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder of a matrix or of storms, or files with run records: JSON lines, verdict.json, the file of `storm --json`
    #[arg(required = true, value_name = "DIR|RECORDS")]
    places: Vec<PathBuf>,
    /// How to write it [default: by the ending of --out, else html]
    #[arg(long, value_enum)]
    format: Option<Format>,
    /// File to write to; `-` is stdout [default: report.html in the folder, or stdout for other formats]
    #[arg(long, short, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Write nothing but the tables of this Markdown file, which says in comments what runs they are of (docs/report.md)
    #[arg(long, value_name = "FILE", conflicts_with_all = ["format", "out", "plan", "base"])]
    fill: Option<PathBuf>,
    /// Plan that the runs were made by, to say what is missing of it [default: the matrix's own]
    #[arg(long, value_name = "PLAN.toml")]
    plan: Option<PathBuf>,
    /// Variant that the others are compared with [default: the stock kernel]
    #[arg(long, value_name = "VARIANT")]
    base: Option<String>,
}

/// Runs the command.
pub fn run(args: Args, ctx: &Context) -> Result<Outcome, Error> {
    let format = args.format.or_else(|| by_name(args.out.as_deref()?)).unwrap_or(Format::Html);
    let plan = plan(&args, ctx)?;
    let input = match Input::read(&args.places) {
        // A matrix that was ended before its first run came to an end has nothing but a plan.
        Err(input::Error::Empty { .. }) if !plan.is_empty() => Input::default(),
        Err(error @ input::Error::Empty { .. }) => return Err(Error::usage(error.to_string())),
        result => result?,
    };
    if input.repeated > 0 {
        ctx.detail(format_args!("{} met more than once", Counted(input.repeated, "record")));
    }
    for trouble in &input.troubles {
        ctx.note(format_args!("{}: {}", trouble.place, trouble.what));
    }
    for conflict in &input.conflicts {
        ctx.note(conflict);
    }
    if let Some(file) = &args.fill {
        return fill(file, &input, ctx);
    }
    let report =
        Report::new(input, &plan, list::variants(&ctx.repo).unwrap_or_default(), args.base.as_deref());
    let text = report.render(format)?;
    let default = || match (format, args.places.as_slice()) {
        (Format::Html, [folder]) if folder.is_dir() => Some(folder.join("report.html")),
        _ => None,
    };
    match args.out.clone().or_else(default).filter(|out| out != Path::new("-")) {
        Some(out) => {
            write(&out, &text)?;
            ctx.note(format_args!("{}; written to {}", report.headline(), out.display()));
        }
        None => match std::io::stdout().write_all(text.as_bytes()) {
            // `hmmstorm report ... | head` is no error.
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {}
            result => result?,
        },
    }
    Ok(Outcome::Pass)
}

/// `--fill`.
fn fill(file: &Path, input: &Input, ctx: &Context) -> Result<Outcome, Error> {
    let text = std::fs::read_to_string(file)
        .map_err(|error| Error::usage(format!("cannot read {}: {error}", file.display())))?;
    let variants: Vec<String> =
        list::variants(&ctx.repo).unwrap_or_default().into_iter().map(|(name, _)| name).collect();
    let filled = report::fill::fill(&text, &input.runs, &variants)
        .map_err(|error| Error::usage(format!("{}: {error}", file.display())))?;
    if filled == text {
        ctx.note(format_args!("{} is as its runs say", file.display()));
    } else {
        write(file, &filled)?;
        ctx.note(format_args!("{}: tables of {}", file.display(), Counted(input.runs.len(), "run")));
    }
    Ok(Outcome::Pass)
}

/// The cells of the plan: of the one that was named, or of the one that the matrix's folder was made by.
fn plan(args: &Args, ctx: &Context) -> Result<Vec<CellSpec>, Error> {
    let usage = |error: crate::matrix::plan::Error| Error::usage(error.to_string());
    let plan = match &args.plan {
        Some(file) => Plan::load(file).map_err(usage)?,
        None => match args.places.iter().find_map(|place| known_plan(place)) {
            Some(plan) => plan,
            None => return Ok(Vec::new()),
        },
    };
    let pins = Pins::load(&ctx.repo).map_err(BuildError::into_cli)?;
    let reference = pins.kernel(None).map_err(BuildError::into_cli)?.name.clone();
    expand(&plan, &ctx.repo.join("storm/scenarios"), &reference).map_err(usage)
}

/// The plan of a matrix's folder. A shard alone is not measured by the whole plan.
fn known_plan(place: &Path) -> Option<Plan> {
    let folder = if place.is_dir() { place } else { place.parent()? };
    let matrix: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.join("matrix.json")).ok()?).ok()?;
    if matrix["shard"] != Shard::WHOLE.to_string() {
        return None;
    }
    serde_json::from_value(matrix["definition"].clone()).ok()
}

/// The format that a file's name asks for.
fn by_name(out: &Path) -> Option<Format> {
    Some(match out.extension()?.to_str()? {
        "html" | "htm" => Format::Html,
        "md" | "txt" | "eml" => Format::Markdown,
        "ktap" | "tap" => Format::Ktap,
        "xml" => Format::Junit,
        "json" => Format::Json,
        _ => return None,
    })
}

/// Writes it so that it is there whole or not at all.
pub(super) fn write(out: &Path, text: &str) -> Result<(), Error> {
    let failed = |error: std::io::Error| Error::harness(format!("cannot write {}: {error}", out.display()));
    let folder = out.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new().prefix(".hmmstorm-").tempfile_in(folder).map_err(failed)?;
    file.write_all(text.as_bytes()).map_err(failed)?;
    let file = file.persist(out).map_err(|error| failed(error.error))?;
    // A temporary file is its owner's alone; a report is for everybody who may look into the folder.
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    file.set_permissions(mode).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_asks_for_a_format() {
        assert_eq!(by_name(Path::new("x/report.html")), Some(Format::Html));
        assert_eq!(by_name(Path::new("junit.xml")), Some(Format::Junit));
        assert_eq!(by_name(Path::new("mail")), None);
    }
}
