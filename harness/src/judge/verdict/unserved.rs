//! What to call a run in which the driver has given up a device access: the fault was made again and again, nothing hung,
//! and no page came of it. That is a livelock in the textbook's sense if for *T* nobody got anywhere meanwhile, and
//! starvation if others did.

use std::time::Duration;

use super::state::State;
use super::types::{Evidence, Judgement, Limits, Source, Verdict, Weight};

/// Faults a second below which nobody can say that they were made again and again.
const LEAST_RATE: f64 = 1.0;

/// The judgement, if there is such an access.
pub(super) fn judge(state: &State, limits: &Limits) -> Option<Judgement> {
    let (_, access) = state.unserved.as_ref()?;
    let seconds = Duration::from_nanos(access.waited_ns).as_secs_f64();
    let idle = Duration::from_nanos(access.idle_ns);
    let tried = format!(
        "{} got no page for {} (page {}) in {seconds:.1} s of guest time, {} calls of hmm_range_fault() and {} of handle_mm_fault()",
        access.worker, access.call, access.page, access.tries, access.mm_faults
    );
    let mut evidence = vec![Evidence::new(Source::Storm, Weight::For, tried.clone())];
    #[expect(clippy::cast_precision_loss, reason = "a rate for a threshold")]
    let mut rate = access.tries.max(access.mm_faults) as f64 / seconds.max(1e-9);
    if rate < LEAST_RATE {
        // The one who speaks first need not be the one who has the CPU.
        if let Some((faults, time)) = by_anyone(state) {
            #[expect(clippy::cast_precision_loss, reason = "a rate for a threshold")]
            let all = faults as f64 / time.as_secs_f64().max(1e-9);
            let says = format!(
                "the drivers counted {faults} CPU and device faults in the last {:.1} s of it",
                time.as_secs_f64()
            );
            evidence.push(Evidence::new(Source::Storm, Weight::For, says));
            rate = all;
        }
    }
    if rate < LEAST_RATE {
        let says = "so few tries are no loop: it must have waited for something";
        evidence.push(Evidence::new(Source::Storm, Weight::Missing, says));
    }
    let longest = format!("{:.1} s of that time no worker completed an operation", idle.as_secs_f64());
    let (verdict, says) = if idle >= limits.no_progress {
        (Verdict::Livelock, format!("for {longest}"))
    } else {
        (Verdict::Starvation, format!("others got on: for no more than {longest}"))
    };
    evidence.push(Evidence::new(Source::Storm, Weight::For, &says));
    let device = format!("{} descriptors completed, {} queued", state.completions(), state.queued());
    evidence.push(Evidence::new(Source::Device, Weight::Note, device));

    let certain = rate >= LEAST_RATE;
    Some(Judgement {
        verdict: if certain { verdict } else { Verdict::HarnessError },
        reason: if certain {
            format!("{tried}; {says}")
        } else {
            format!("inconclusive: {tried}: it must have waited for something")
        },
        // The loop is the driver's around this function: every call returns.
        frames: if certain {
            vec!["hmm_range_fault".to_owned(), function(&access.call).to_owned()]
        } else {
            Vec::new()
        },
        spinners: Vec::new(),
        evidence,
        recovered: None,
        also: Vec::new(),
    })
}

/// Faults that all drivers counted between the last two times that they were asked: when nothing had completed for a while,
/// and when the access was given up.
fn by_anyone(state: &State) -> Option<(u64, Duration)> {
    let [.., before, last] = state.driver_faults.as_slice() else { return None };
    Some((last.1.saturating_sub(before.1), Duration::from_nanos(last.0.saturating_sub(before.0))))
}

/// The ioctl's name alone: neither GPU nor kind of access makes it another finding.
fn function(call: &str) -> &str {
    call.split_whitespace().next().unwrap_or(call)
}
