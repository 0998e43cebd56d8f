//! One short run of each scenario on the cured kernel, and a proof that its oracles and verdicts are no decoration: the
//! livelock without a drain on the stock kernel, damaged copies, a driver that refuses.

use hmmstorm_smoke::Storm;

const CURED: &[&str] = &["--variant", "wait-on-locked", "--preempt", "none"];

/// Runs a scenario on the cured kernel, where it must pass, and returns it for a closer look.
#[track_caller]
fn passes(scenario: &str, more: &[&str]) -> Storm {
    let storm = Storm::run(scenario, [scenario].iter().chain(CURED).chain(more));
    assert_eq!(storm.verdict(), "pass", "{}", storm.output);
    assert_eq!(storm.code, 0, "{}", storm.output);
    storm
}

/// The sum of a counter of all GPUs' drivers.
#[track_caller]
fn counted(storm: &Storm, name: &str) -> u64 {
    let driver = storm.verdicts[0]["driver"].as_array().expect("the driver's counters");
    driver.iter().map(|gpu| gpu[name].as_u64().unwrap_or_else(|| panic!("no {name} in {gpu}"))).sum()
}

#[test]
fn fault_storm() {
    let storm = passes("fault-storm", &["--param", "rounds=4"]);
    assert!(counted(&storm, "cpu_faults") > 100, "{}", storm.output);
}

#[test]
fn fault_storm_sees_damaged_copies() {
    let broken = ["fault-storm", "--chaos", "corrupt_every=100", "--expect", "corruption"];
    let storm = Storm::run("fault-storm-corrupted", broken.iter().chain(CURED));
    assert_eq!(storm.verdict(), "corruption", "{}", storm.output);
}

#[test]
fn lock_hog_starves_nobody_on_the_cured_kernel() {
    passes("lock-hog", &["--param", "seconds=4"]);
}

#[test]
fn lock_hog_livelocks_the_stock_kernel_without_a_drain() {
    let stock = ["lock-hog", "--variant", "trylock", "--preempt", "none", "--expect", "livelock"];
    let storm = Storm::run("lock-hog-stock", stock);
    assert_eq!(storm.verdict(), "livelock", "{}", storm.output);
    assert_eq!(storm.code, 0, "{}", storm.output);
}

#[test]
fn ref_livelock() {
    passes("ref-livelock", &["--param", "rounds=60"]);
}

#[test]
fn ping_pong() {
    let storm = passes("ping-pong", &["--param", "rounds=20"]);
    assert!(counted(&storm, "to_device") > 50, "{}", storm.output);
}

#[test]
fn peer_ping_pong() {
    let storm = passes("peer-ping-pong", &["--param", "rounds=15", "--param", "direct=true"]);
    assert!(counted(&storm, "from_peer") > 0, "{}", storm.output);
}

#[test]
fn fork_cow() {
    passes("fork-cow", &["--param", "rounds=3"]);
}

#[test]
fn unmap_race() {
    passes("unmap-race", &["--param", "rounds=20"]);
}

#[test]
fn pin() {
    passes("pin", &["--param", "rounds=8"]);
}

#[test]
fn refusing_driver() {
    passes("refusing-driver", &["--param", "rounds=2"]);
}

#[test]
fn thp_split() {
    passes("thp-split", &["--param", "rounds=5"]);
}
