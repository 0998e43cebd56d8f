//! The argument in small: the bug shows on the stock kernel, is gone with the cure, is gone when any of its
//! conditions is, and `pass` means that data was checked. `ci/plans/counts.toml` counts over many seeds.

use hmmstorm_smoke::Storm;

const STOCK: &[&str] = &["drain-livelock", "--variant", "trylock", "--preempt", "none"];

fn storm(name: &str, arguments: &[&str], more: &[&str]) -> Storm {
    Storm::run(name, arguments.iter().chain(more))
}

#[track_caller]
fn expect(storm: &Storm, verdict: &str, code: i32) {
    assert_eq!(storm.verdict(), verdict, "{}", storm.output);
    assert_eq!(storm.code, code, "{}", storm.output);
}

/// The named cycle must close: the CPU that spins is the CPU that the holder of the folio waits for.
#[track_caller]
fn cycle_closes(verdict: &serde_json::Value) {
    let cycle = &verdict["cycle"];
    assert!(cycle.is_object(), "no cycle in {verdict:#}");
    assert!(cycle["spinners"].as_array().is_some_and(|s| !s.is_empty()), "no spinner in {cycle:#}");
    assert!(cycle["closed"].as_bool() == Some(true), "the cycle does not close: {cycle:#}");
}

/// The same must come out of the guest's memory, where drgn can be had.
#[track_caller]
fn cycle_closes_in_memory(storm: &Storm) {
    let structures = &storm.verdicts[0]["structures"];
    if structures.is_null() {
        println!("not read from memory: no drgn on this host");
        return;
    }
    assert!(structures["closed"].as_bool() == Some(true), "{structures:#}");
    let spinners = structures["spinners"].as_array().expect("spinners");
    assert!(
        spinners.iter().all(|s| s["memory"] == "MEMORY_DEVICE_PRIVATE" && s["locked"] == true),
        "spinners at something else than a locked device-private folio: {structures:#}"
    );
}

#[test]
fn stock_kernel_livelocks_in_real_time() {
    let storm = storm("livelock", STOCK, &["--seed", "1", "--expect", "livelock"]);
    expect(&storm, "livelock", 0);
    cycle_closes(&storm.verdicts[0]);
    cycle_closes_in_memory(&storm);
}

#[test]
fn unexpected_verdict_is_exit_code_one() {
    let storm = storm("livelock-unexpected", STOCK, &["--seed", "2", "--deterministic"]);
    expect(&storm, "livelock", 1);
}

#[test]
fn same_seed_gives_the_same_bytes() {
    let hashes: Vec<_> = (1..=2)
        .map(|run| {
            let name = format!("deterministic-{run}");
            let storm = storm(&name, STOCK, &["--seed", "3", "--deterministic", "--expect", "livelock"]);
            expect(&storm, "livelock", 0);
            cycle_closes(&storm.verdicts[0]);
            let files = &storm.verdicts[0]["files"];
            let hash = |file: &str| files[file]["sha256"].as_str().map(str::to_owned).expect(file);
            (hash("console.log"), hash("events.jsonl"))
        })
        .collect();
    assert_eq!(hashes[0], hashes[1], "two runs of one seed differ: target/smoke/deterministic-1 and -2");
}

#[test]
fn cure_passes() {
    let cured = ["drain-livelock", "--variant", "wait-on-locked", "--preempt", "none", "--runs", "2"];
    let storm = Storm::run("cure", cured);
    assert_eq!(storm.code, 0, "{}", storm.output);
    assert_eq!(storm.verdicts.len(), 2);
    for verdict in &storm.verdicts {
        assert_eq!(verdict["verdict"], "pass", "{}", storm.output);
        let faults = verdict["progress"]["faults"].as_u64().expect("progress.faults");
        assert!(faults >= 5_000, "only {faults} faults resolved: too few to call it a storm");
    }
}

/// Runs the stock kernel with one condition of the bug removed.
fn control(name: &str) {
    let storm = storm(&format!("control-{name}"), STOCK, &["--control", name]);
    expect(&storm, "pass", 0);
}

#[test]
fn control_device_page_before_system_page() {
    control("device-before-system");
}

#[test]
fn control_mapcount_1() {
    control("mapcount-1");
}

#[test]
fn control_same_owner() {
    control("same-owner");
}

#[test]
fn control_drained_cpu() {
    control("drained-cpu");
}

#[test]
fn control_preempt_full() {
    let storm = Storm::run("control-preempt-full", ["drain-livelock", "--control", "preempt-full"]);
    expect(&storm, "pass", 0);
}

#[test]
fn broken_copy_is_corruption() {
    let storm = Storm::run("corruption", ["smoke", "--chaos", "corrupt_every=100", "--expect", "corruption"]);
    expect(&storm, "corruption", 0);
}

#[test]
fn healthy_device_passes_the_same_scenario() {
    expect(&Storm::run("smoke", ["smoke"]), "pass", 0);
    expect(&Storm::run("smoke-deterministic", ["smoke", "--deterministic"]), "pass", 0);
}

#[test]
fn more_memory_than_vram_loses_nothing() {
    let storm = Storm::run("evict-pressure", ["evict-pressure"]);
    expect(&storm, "pass", 0);
    let driver = storm.verdicts[0]["driver"].as_array().expect("the driver's counters");
    let evicted = driver[0]["evicted"].as_u64().expect("evicted");
    assert!(evicted >= 2048, "only {evicted} pages evicted: that is no pressure on a VRAM of 2048");
}

#[test]
fn cpu_and_gpu_work_on_one_memory() {
    let storm = Storm::run("svm", ["svm", "--cpus", "2"]);
    expect(&storm, "pass", 0);
    let driver = storm.verdicts[0]["driver"].as_array().expect("the driver's counters");
    let counter = |name: &str| driver[0][name].as_u64().expect("a counter");
    assert!(counter("gpu_faults") > 0 && counter("evicted") > 0 && counter("jobs") > 0);
    assert_eq!(counter("gpu_mapped"), counter("gpu_unmapped"), "pages are left in GPU page tables");
}

/// The scenario itself counts one huge page on its way there and back: one folio, one copy, one entry.
#[test]
fn huge_pages_go_to_the_gpu_whole() {
    let storm = Storm::run("svm-huge", ["svm", "--cpus", "2", "--param", "chunk=2M", "--param", "factor=4"]);
    expect(&storm, "pass", 0);
    let driver = storm.verdicts[0]["driver"].as_array().expect("the driver's counters");
    let counter = |name: &str| driver[0][name].as_u64().expect("a counter");
    assert!(counter("huge_to_device") > 1 && counter("huge_to_system") > 1 && counter("gpu_mapped_huge") > 1);
    assert_eq!(counter("gpu_mapped"), counter("gpu_unmapped"), "pages are left in GPU page tables");
}

/// Pages in the coherent memory of GPU 1 are a peer's for jobs of GPU 0.
#[test]
fn gpus_work_on_coherent_memory_of_others() {
    let run = ["svm", "--cpus", "2", "--param", "factor=1", "--append", "hsgpu.coherent_mib=2"];
    let storm = Storm::run("svm-coherent", run);
    expect(&storm, "pass", 0);
    let driver = storm.verdicts[0]["driver"].as_array().expect("the driver's counters");
    assert_eq!(driver.len(), 2, "nodes of coherent memory are no GPUs");
    assert!(driver[1]["to_device"].as_u64() > Some(0), "nothing went to the coherent memory of GPU 1");
}

#[test]
fn jobs_see_a_broken_copy() {
    let storm = Storm::run(
        "svm-corruption",
        ["svm", "--cpus", "2", "--chaos", "corrupt_every=100", "--expect", "corruption"],
    );
    expect(&storm, "corruption", 0);
}

#[test]
fn jobs_end_whatever_they_lose() {
    expect(&Storm::run("gpu-endings", ["gpu-endings", "--cpus", "2"]), "pass", 0);
}

/// The scenario fails if what the plan is to break does not break.
#[track_caller]
fn ending(name: &str, chaos: &str) -> Storm {
    let ending = format!("ending={name}");
    let run = ["gpu-endings", "--cpus", "2", "--param", &ending, "--param", "rounds=1", "--chaos", chaos];
    let storm = Storm::run(&format!("gpu-endings-{name}"), run);
    expect(&storm, "pass", 0);
    storm
}

#[test]
fn a_device_that_is_pulled_out_leaves_errors_and_no_driver_behind() {
    ending("surprise", "dead_after=80");
}

/// The CPU reaches coherent memory without a fault, so all of it has to go before anybody reads all ones there.
#[test]
fn what_was_in_its_coherent_memory_is_an_error_too() {
    let coherent = ["--param", "memory=coherent", "--append", "hsgpu.coherent_mib=4"];
    let surprise = ["--param", "ending=surprise", "--param", "rounds=1", "--chaos", "dead_after=80"];
    let run = ["gpu-endings", "--cpus", "2"].into_iter().chain(surprise).chain(coherent);
    expect(&Storm::run("gpu-endings-coherent", run), "pass", 0);
}

#[test]
fn poisoned_pages_are_errors_and_no_others() {
    ending("poison", "poison_first=128,poison_pages=4");
}

#[test]
fn a_channel_that_hangs_is_reset() {
    ending("hang", "hang_channel=4,hang_after=4");
}

#[test]
fn lost_reports_of_page_faults_are_made_up_for() {
    let chaos = "drop_fault_every=7,overflow_fault_every=5,drop_interrupt_every=9";
    let run = ["svm", "--cpus", "2", "--param", "factor=1", "--chaos", chaos];
    let storm = Storm::run("svm-lost-reports", run);
    expect(&storm, "pass", 0);
    let driver = storm.verdicts[0]["driver"].as_array().expect("the driver's counters");
    assert!(driver[0]["fault_overflows"].as_u64() > Some(0), "no overflow");
}

#[test]
fn atomics_of_cpus_and_gpus_add_up_in_ram() {
    let storm = Storm::run("exclusive-atomics", ["exclusive-atomics", "--param", "jobs=4"]);
    expect(&storm, "pass", 0);
    let driver = storm.verdicts[0]["driver"].as_array().expect("the driver's counters");
    assert!(driver.iter().all(|gpu| gpu["exclusive"].as_u64() > Some(0)), "a GPU had no page for itself");
}
