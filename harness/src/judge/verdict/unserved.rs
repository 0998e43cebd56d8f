//! What to call a run in which the driver has given up a device access: the fault was made again and again, nothing hung,
//! and no page came of it. That is a livelock in the textbook's sense if for *T* nobody got anywhere meanwhile, and
//! starvation if others did.

use std::time::Duration;

use hmmstorm_abi::wire::event::Unserved;

use super::state::{GivenUp, State};
use super::types::{Evidence, Judgement, Limits, Source, Verdict, Weight};

/// Faults a second below which nobody can say that they were made again and again.
const LEAST_RATE: f64 = 1.0;

/// The judgement, if there is such an access.
pub(super) fn judge(state: &State, limits: &Limits) -> Option<Judgement> {
    let first = state.unserved.first()?;
    let access = busiest(first, &state.unserved);
    let seconds = Duration::from_nanos(access.waited_ns).as_secs_f64();
    let idle = Duration::from_nanos(access.idle_ns);
    let tried = format!(
        "{} got no page for {} (page {}) in {seconds:.1} s of guest time, {} calls of hmm_range_fault() and {} of handle_mm_fault()",
        access.worker, access.call, access.page, access.tries, access.mm_faults
    );
    let mut evidence = vec![Evidence::new(Source::Storm, Weight::For, tried.clone())];
    if *access != first.access {
        let says = format!(
            "{} gave up first, after {} calls of hmm_range_fault(): another had the CPU",
            first.access.worker, first.access.tries
        );
        evidence.push(Evidence::new(Source::Storm, Weight::Note, says));
    }
    #[expect(clippy::cast_precision_loss, reason = "a rate for a threshold")]
    let mut rate = access.tries.max(access.mm_faults) as f64 / seconds.max(1e-9);
    if rate < LEAST_RATE {
        // What loops may be an access that has not been given up yet.
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

/// Of the accesses that were being tried when the first one was given up, the one that was tried most often: without
/// forced preemption, the one who speaks first may never have had the CPU.
fn busiest<'a>(first: &'a GivenUp, all: &'a [GivenUp]) -> &'a Unserved {
    let meanwhile = all.iter().filter(|one| one.guest.saturating_sub(one.access.waited_ns) <= first.guest);
    let tries = |one: &&GivenUp| one.access.tries.max(one.access.mm_faults);
    // `max_by_key()` takes the last of equals; the guest's first word is the one to keep.
    &meanwhile.rev().max_by_key(tries).unwrap_or(first).access
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
