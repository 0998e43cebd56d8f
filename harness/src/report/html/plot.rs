//! Plots as inline SVG, drawn for the width of a phone: a page lays several out beside each other.
//!
//! Colours are those of the light page ([`SERIES`]); `style.css` replaces each by the page's own, so that one drawing
//! serves both. Nothing that the guest wrote gets into a drawing: names are in the legend, which is HTML.

use plotters::coord::Shift;
use plotters::coord::ranged1d::ValueFormatter;
use plotters::prelude::*;

use crate::report::Error;
use crate::report::compare::{duration, short};

const SIZE: (u32, u32) = (400, 270);
const INK: RGBColor = RGBColor(0x16, 0x1a, 0x22);
const FAINT: RGBColor = RGBColor(0x54, 0x5d, 0x6e);
const LINE: RGBColor = RGBColor(0xd9, 0xdd, 0xe5);

/// Colours of series, `--s0` and so on of `style.css`.
pub(super) const SERIES: [RGBColor; 8] = [
    RGBColor(0x0b, 0x62, 0xa8),
    RGBColor(0xc2, 0x4e, 0x00),
    RGBColor(0x00, 0x79, 0x5a),
    RGBColor(0xa4, 0x29, 0x7c),
    RGBColor(0x8a, 0x6d, 0x00),
    RGBColor(0x5b, 0x4b, 0xb7),
    RGBColor(0xb3, 0x26, 0x1e),
    RGBColor(0x4d, 0x56, 0x66),
];

/// Style rules that give the series the page's colours.
#[must_use]
pub(super) fn rules() -> String {
    let rule = |(index, RGBColor(r, g, b)): (usize, &RGBColor)| {
        let colour = format!("#{r:02X}{g:02X}{b:02X}");
        format!(
            ".plot [stroke=\"{colour}\"] {{ stroke: var(--s{index}); }} .plot [fill=\"{colour}\"] {{ fill: var(--s{index}); }}\n"
        )
    };
    SERIES.iter().enumerate().map(rule).collect()
}

/// A line of a plot.
#[derive(Clone, Debug, Default)]
pub(super) struct Line {
    /// Its points.
    pub(super) points: Vec<(f64, f64)>,
    /// Lower and upper end of its interval, at the same places.
    pub(super) band: Vec<(f64, f64, f64)>,
    /// Marks on it.
    pub(super) marks: Vec<(f64, f64)>,
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

fn draw(
    what: &str,
    paint: impl FnOnce(&Area<'_>) -> Result<(), DrawingAreaErrorKind<std::io::Error>>,
) -> Result<String, Error> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        paint(&area)
            .and_then(|()| area.present())
            .map_err(|error| Error::Plot { what: what.to_owned(), why: error.to_string() })?;
    }
    Ok(svg)
}

fn text(size: u32) -> TextStyle<'static> {
    ("sans-serif", size).into_font().color(&INK)
}

/// Latency by quantile. The horizontal axis counts nines, so that the tail has the room that it deserves; the vertical
/// one is logarithmic. Marks are at p50, p99, p99.9.
pub(super) fn latency(lines: &[Line]) -> Result<String, Error> {
    let values = || lines.iter().flat_map(|line| &line.points);
    let nines = values().map(|point| point.0).fold(3.0, f64::max);
    let low = values().map(|point| point.1).fold(f64::INFINITY, f64::min);
    // Without values there is no least one, and plotters never comes to the end of an infinite axis.
    let low = if low.is_finite() { low.max(1.0) } else { 1.0 };
    let high = values().map(|point| point.1).fold(low, f64::max);
    // Whole decades, so that at least two labels stand on the axis.
    let (low, high) =
        (10f64.powf(low.log10().floor()), 10f64.powf(high.log10().ceil().max(low.log10().floor() + 1.0)));
    draw("latency", |area| {
        let mut chart = ChartBuilder::on(area)
            .margin(8)
            .margin_right(14)
            .x_label_area_size(38)
            .y_label_area_size(58)
            .build_cartesian_2d(0.0..nines, (low..high).log_scale())?;
        let axes = Axes {
            x: "operations that took at most so long",
            x_label: &|nines| quantile(*nines),
            y_label: &|value| duration(*value),
            y_labels: 8,
        };
        fill(&mut chart, &axes, lines)
    })
}

/// Shares that survived, by time.
pub(super) fn survival(lines: &[Line], unit: &str) -> Result<String, Error> {
    let end = lines.iter().flat_map(|line| &line.points).map(|point| point.0).fold(0.0, f64::max);
    let end = if end > 0.0 { end } else { 1.0 };
    draw("survival", |area| {
        let mut chart = ChartBuilder::on(area)
            .margin(8)
            .margin_right(14)
            .x_label_area_size(38)
            .y_label_area_size(48)
            .build_cartesian_2d(0.0..end * 1.02, 0.0..1.02)?;
        let axes = Axes {
            x: unit,
            x_label: &|value| short(*value),
            y_label: &|share| format!("{:.0} %", share * 100.0),
            y_labels: 5,
        };
        fill(&mut chart, &axes, lines)
    })
}

/// How the axes of a plot are labelled.
struct Axes<'a> {
    /// What the horizontal one is.
    x: &'a str,
    x_label: &'a dyn Fn(&f64) -> String,
    y_label: &'a dyn Fn(&f64) -> String,
    y_labels: usize,
}

/// Draws mesh, axes and lines.
fn fill<X, Y>(
    chart: &mut ChartContext<'_, SVGBackend<'_>, Cartesian2d<X, Y>>,
    axes: &Axes<'_>,
    lines: &[Line],
) -> Result<(), DrawingAreaErrorKind<std::io::Error>>
where
    X: Ranged<ValueType = f64> + ValueFormatter<f64>,
    Y: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(LINE)
        .axis_style(FAINT)
        .label_style(text(13))
        .axis_desc_style(text(13))
        .x_labels(6)
        .y_labels(axes.y_labels)
        .x_label_formatter(axes.x_label)
        .y_label_formatter(axes.y_label)
        .x_desc(axes.x)
        .draw()?;
    for (line, colour) in lines.iter().zip(SERIES.iter().cycle()) {
        if !line.band.is_empty() {
            let upper = line.band.iter().map(|&(x, _, high)| (x, high));
            let lower = line.band.iter().rev().map(|&(x, low, _)| (x, low));
            let outline: Vec<_> = upper.chain(lower).collect();
            chart.draw_series(std::iter::once(Polygon::new(outline, colour.mix(0.13))))?;
        }
    }
    for (line, colour) in lines.iter().zip(SERIES.iter().cycle()) {
        chart.draw_series(LineSeries::new(line.points.iter().copied(), colour.stroke_width(2)))?;
        chart.draw_series(line.marks.iter().map(|&mark| Circle::new(mark, 3, colour.filled())))?;
    }
    Ok(())
}

/// A number of nines as per cent: 2 is 99 %.
fn quantile(nines: f64) -> String {
    // One digit more for each nine behind the second.
    let digits =
        (3..=6).rev().find(|&digits| nines > f64::from(digits) - 0.5).map_or(0, |digits| digits as usize - 2);
    format!("{:.digits$} %", (1.0 - 10f64.powf(-nines)) * 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles() {
        assert_eq!(quantile(0.0), "0 %");
        assert_eq!(quantile(1.0), "90 %");
        assert_eq!(quantile(2.0), "99 %");
        assert_eq!(quantile(3.0), "99.9 %");
    }

    #[test]
    fn the_page_knows_the_colours_of_every_series() {
        let css = include_str!("style.css");
        for (index, RGBColor(r, g, b)) in SERIES.iter().enumerate() {
            assert!(css.contains(&format!("--s{index}: #{r:02x}{g:02x}{b:02x};")), "--s{index}");
        }
    }

    #[test]
    fn plots_are_drawn_of_few_and_of_many_values() {
        let line = |n: u32| Line {
            points: (0..n).map(|i| (f64::from(i), 1000.0 * f64::from(i + 1))).collect(),
            band: (0..n).map(|i| (f64::from(i), 0.1, 0.9)).collect(),
            marks: vec![(1.0, 1000.0)],
        };
        for lines in [vec![], vec![line(1)], vec![line(5); 12]] {
            for svg in [latency(&lines), survival(&lines, "seconds")] {
                let svg = svg.expect("a plot");
                assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{svg}");
            }
        }
    }
}
