//! Each variant beside the one that it is compared with.

use maud::{Markup, html};

use crate::report::compare::{Comparisons, Tally, probability};
use crate::report::{Counted, Report};
use crate::statistics::Call;

/// Differences listed, at most.
const ROWS: usize = 200;

/// The section; nothing if nothing could be compared.
pub(super) fn section(report: &Report) -> Option<Markup> {
    let comparisons = report.comparisons.as_ref()?;
    Some(html! {
        p {
            "Each variant against " code { (comparisons.base) } " in every cell that both have: "
            (Counted(comparisons.made, "comparison")) ", their probabilities corrected for that number (Holm). "
            "A difference is said to be shown at p < 0.05; \"no difference shown\" is not \"there is none\"."
        }
        (tallies(comparisons))
        (shown(comparisons))
    })
}

fn tallies(comparisons: &Comparisons) -> Markup {
    html! {
        h3 id="comparison-cells" { "Cells in which a variant is better or worse than " (comparisons.base) }
        div.scroll tabindex="0" role="region" aria-labelledby="comparison-cells" {
            table aria-labelledby="comparison-cells" {
                thead {
                    tr {
                        th scope="col" { "variant" }
                        @for quantity in &comparisons.quantities {
                            th scope="col" { (quantity.name()) br; small.faint { (quantity.test()) } }
                        }
                    }
                }
                tbody {
                    @for (variant, tallies) in &comparisons.variants {
                        tr {
                            th scope="row" { (variant) }
                            @for tally in tallies { td { (tally_cell(*tally)) } }
                        }
                    }
                }
            }
        }
    }
}

fn tally_cell(tally: Tally) -> Markup {
    let of = tally.cells();
    html! {
        @if of == 0 { span.faint { "not comparable" } }
        @if tally.better > 0 { span.tag.better { "better " (tally.better) "/" (of) } " " }
        @if tally.worse > 0 { span.tag.worse { "worse " (tally.worse) "/" (of) } " " }
        @if of > 0 && tally.same == of { span.faint { "no difference shown (" (of) ")" } }
    }
}

fn shown(comparisons: &Comparisons) -> Markup {
    html! {
        @if !comparisons.shown.is_empty() {
            details {
                summary { (Counted(comparisons.shown.len(), "difference")) " shown, one by one" }
                div.inside {
                    div.scroll tabindex="0" role="region" aria-label="Differences" {
                        table {
                            thead {
                                tr {
                                    th scope="col" { "variant" } th scope="col" { "where" } th scope="col" { "what" }
                                    th scope="col" { (comparisons.base) } th scope="col" { "variant" } th scope="col" { "call" }
                                    th scope="col" { "test" }
                                }
                            }
                            tbody {
                                @for one in comparisons.shown.iter().take(ROWS) {
                                    tr {
                                        th scope="row" { (one.variant) }
                                        td { (one.place) }
                                        td { (one.quantity.name()) }
                                        td.w { (one.was) }
                                        td.w { (one.is) }
                                        td.w { span class={ "tag " (if one.call == Call::Better { "better" } else { "worse" }) } { (one.call) } }
                                        td.w { (one.quantity.test()) ", " (probability(one.p)) }
                                    }
                                }
                            }
                        }
                    }
                    @if comparisons.shown.len() > ROWS { p.faint { "and " (comparisons.shown.len() - ROWS) " more" } }
                }
            }
        }
    }
}
